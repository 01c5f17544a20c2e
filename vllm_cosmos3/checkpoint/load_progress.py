"""How much of the weights is in place: counted where they are filled in, read by whoever waits.

Ranks and those who wait for them are different processes, so each rank leaves its count in a file.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

WRITE_SECONDS = 0.1  # between two writes of a count


def _nobody(values: int) -> None:
    """Nobody waits."""


_tell: ContextVar[Callable[[int], None]] = ContextVar("tell", default=_nobody)


def count(values: int) -> None:
    """So many values of a checkpoint were just put in place, or left to other ranks."""
    _tell.get()(values)


@contextmanager
def told(report: Callable[[int], None]) -> Iterator[None]:
    """Tell ``report`` the sum of what `count` is told within the block, in this thread."""
    total = 0

    def tell(values: int) -> None:
        nonlocal total
        total += values
        report(total)

    token = _tell.set(tell)
    try:
        yield
    finally:
        _tell.reset(token)


@contextmanager
def counted(folder: Path, rank: int) -> Iterator[None]:
    """Leave what `count` is told within the block in ``folder``, for `slowest` to read.

    It stays there when the block ends.
    """
    file, total, due = folder / f"loaded-{rank}", 0, 0.0

    def tell(values: int) -> None:
        nonlocal total, due
        total += values
        if time.monotonic() >= due:
            _write(file, total)
            due = time.monotonic() + WRITE_SECONDS

    token = _tell.set(tell)
    try:
        yield
    finally:
        _tell.reset(token)
        _write(file, total)


def slowest(folder: Path) -> int:
    """The count of the rank that is furthest behind; 0 where none has begun."""
    return min((int(file.read_text()) for file in folder.glob("loaded-*")), default=0)


def forget(folder: Path) -> None:
    """Ranks are about to begin again."""
    for file in folder.glob("loaded-*"):
        file.unlink()


def _write(file: Path, total: int) -> None:
    """In one piece, as a reader may come at any time."""
    new = file.with_name(f"new-{file.name}")
    new.write_text(str(total))
    new.replace(file)
