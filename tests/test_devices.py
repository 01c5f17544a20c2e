"""The devices here, as a process finds them out that does not import vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray_platform

from vllm_cosmos3 import devices
from vllm_cosmos3.errors import Unsupported


@pytest.fixture(autouse=True)
def _asked_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    devices._asked.cache_clear()
    yield
    monkeypatch.undo()  # the path, before others ask
    devices._asked.cache_clear()


def test_the_version_says_what_vllm_finds() -> None:
    assert devices._asked() == devices.look()


def test_vllm_is_asked_where_another_package_brings_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray_platform.install(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = devices._asked()
    assert (found.type, found.ray_key, found.count) == ("cpu", "GPU", None)


def test_a_vllm_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray_platform.install(tmp_path)
    (tmp_path / "vllm.py").write_text("raise ImportError('libcudart.so.13 is missing')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(Unsupported, match=r"libcudart.so.13 is missing.*vllm-cosmos3 doctor"):
        devices._asked()
