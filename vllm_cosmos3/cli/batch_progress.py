"""Progress of a batch: one line, rewritten on a terminal and now and then repeated in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

LOG_SECONDS = 60.0  # between two lines in a log
WARNINGS = 20  # that are said; the others are in the records of the samples


def described(*, done: int, failed: int, total: int, made: int, seconds: float) -> str:
    """The line: how far a batch is, and when it ends at the rate so far.

    ``made`` records were made in ``seconds``; ``done`` also has those of earlier runs.
    """
    words = [f"{done} of {total} done, {failed} failed"]
    if made and seconds > 0:
        left = max(0, total - done - failed)
        words.append(f"{made / seconds * 3600:,.0f} an hour")
        words.append(f"ETA {_clock(left * seconds / made)}")
    return ", ".join(words)


class ProgressLine:
    """The line of a run over ``total`` records."""

    def __init__(self, total: int) -> None:
        self._total, self._made, self._shown = total, 0, ""
        self._start = self._said = time.perf_counter()
        self._terminal = sys.stderr.isatty()
        self._warned = 0

    def update(self, *, done: int, failed: int, made: bool) -> None:
        """One more record has ended; ``made`` if by this run."""
        self._made += made
        now = time.perf_counter()
        self._shown = described(
            done=done, failed=failed, total=self._total, made=self._made, seconds=now - self._start
        )
        if self._terminal:
            print(f"\r\x1b[K{self._shown}", end="", file=sys.stderr, flush=True)
        elif now - self._said >= LOG_SECONDS:
            self._said = now
            print(self._shown, file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line above this one."""
        clear = "\r\x1b[K" if self._terminal else ""
        print(f"{clear}{text}", file=sys.stderr, flush=True)

    def warn(self, where: str, warnings: Sequence[str]) -> None:
        """The warnings of a record, as long as there are not too many of all."""
        for warning in warnings:
            self._warned += 1
            if self._warned <= WARNINGS:
                self.say(f"warning: {where}: {warning}")
            elif self._warned == WARNINGS + 1:
                self.say("further warnings are in the sample_outputs.json of their records")

    def close(self) -> None:
        """The last state of the line."""
        if self._shown:
            self.say(self._shown)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    clock = f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{days} d {clock}" if days else clock
