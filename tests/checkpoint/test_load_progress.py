"""Counts of loaded values cross processes as files: one a rank, the slowest is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_cosmos3.checkpoint import load_progress


def test_nobody_has_to_listen() -> None:
    load_progress.count(1)


def test_the_slowest_rank_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_progress, "WRITE_SECONDS", 0.0)
    assert load_progress.slowest(tmp_path) == 0
    with load_progress.counted(tmp_path, 0):
        load_progress.count(5)
        load_progress.count(7)
        assert load_progress.slowest(tmp_path) == 12
        with load_progress.counted(tmp_path, 1):
            load_progress.count(3)
            assert load_progress.slowest(tmp_path) == 3
        load_progress.count(1)
        assert load_progress.slowest(tmp_path) == 3  # it stays when that rank is done
    load_progress.forget(tmp_path)
    assert load_progress.slowest(tmp_path) == 0
    assert list(tmp_path.iterdir()) == []


def test_an_error_while_loading_ends_the_count(tmp_path: Path) -> None:
    def load() -> None:
        with load_progress.counted(tmp_path, 0):
            load_progress.count(5)
            raise OSError("lost")

    with pytest.raises(OSError, match="lost"):
        load()
    load_progress.count(7)
    assert load_progress.slowest(tmp_path) == 5
