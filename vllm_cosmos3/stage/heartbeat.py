"""Heartbeats of the stage process and of its ranks: files of the stage's folder that are touched.

A process that is stopped, or that swaps, or whose interpreter is held by a library, leaves none. Ranks
that wait in a collective do: what tells of them is how long their call takes.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from pathlib import Path

HEARTBEAT_SECONDS = 1.0


class Heartbeat:
    """The heartbeat of one process, ``name`` in ``folder``."""

    def __init__(self, folder: Path, name: str) -> None:
        self._file, self._due = folder / f"alive-{name}", 0.0

    def beat(self) -> None:
        """Leave a sign of life, unless the last one is recent.

        The time is that of the monotonic clock, which all processes share and nobody sets, and it is
        the file's own, for which a full disk has room.
        """
        now = time.monotonic()
        if now >= self._due:
            self._file.touch()
            os.utime(self._file, (now, now))
            self._due = now + HEARTBEAT_SECONDS / 2

    def start(self) -> None:
        """Beat in a thread of its own until the folder is gone."""
        threading.Thread(target=self._beat_on, name="heartbeat", daemon=True).start()

    def _beat_on(self) -> None:
        while self._file.parent.is_dir():
            with suppress(OSError):  # the folder goes, or the disk is full and has no file yet
                self.beat()
            time.sleep(HEARTBEAT_SECONDS)


def silence(folder: Path) -> float:
    """Seconds since the last sign of life of the process that is silent longest; 0 where none has begun."""
    oldest = now = time.monotonic()
    for file in folder.glob("alive-*"):
        try:
            oldest = min(oldest, file.stat().st_mtime)
        except FileNotFoundError:  # forgotten at this moment
            continue
    return now - oldest


def forget(folder: Path) -> None:
    """The processes that have beaten here are about to be replaced."""
    for file in folder.glob("alive-*"):
        file.unlink(missing_ok=True)
