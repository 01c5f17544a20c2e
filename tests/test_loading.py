"""Counts of loaded values cross processes as files: one a rank, the slowest is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_cosmos3 import loading


def test_nobody_has_to_listen() -> None:
    loading.count(1)


def test_the_slowest_rank_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "WRITE_SECONDS", 0.0)
    assert loading.slowest(tmp_path) == 0
    with loading.counted(tmp_path, 0):
        loading.count(5)
        loading.count(7)
        assert loading.slowest(tmp_path) == 12
        with loading.counted(tmp_path, 1):
            loading.count(3)
            assert loading.slowest(tmp_path) == 3
        loading.count(1)
        assert loading.slowest(tmp_path) == 3  # it stays when that rank is done
    loading.forget(tmp_path)
    assert loading.slowest(tmp_path) == 0
    assert list(tmp_path.iterdir()) == []


def test_an_error_while_loading_ends_the_count(tmp_path: Path) -> None:
    def load() -> None:
        with loading.counted(tmp_path, 0):
            loading.count(5)
            raise OSError("lost")

    with pytest.raises(OSError, match="lost"):
        load()
    loading.count(7)
    assert loading.slowest(tmp_path) == 5
