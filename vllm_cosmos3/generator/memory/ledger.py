"""A ledger of bytes: what is alive while code runs, and the most that ever was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Ledger:
    """Counts what the code that it follows would allocate; allocates nothing itself."""

    def __init__(self) -> None:
        self.live = 0
        self.kept = 0  # outlives scopes
        self.peak = 0

    def take(self, *sizes: int) -> None:
        """So many bytes more are alive, until they are given back or the scope ends."""
        self.live += sum(sizes)
        self.peak = max(self.peak, self.live + self.kept)

    def give(self, *sizes: int) -> None:
        self.live -= sum(sizes)

    def keep(self, size: int) -> None:
        """So many bytes more, or with a minus fewer, outlive the scope."""
        self.kept += size
        self.peak = max(self.peak, self.live + self.kept)

    @contextmanager
    def scope(self) -> Iterator[None]:
        """What is taken inside is given back at the end."""
        before = self.live
        yield
        self.live = before

    def moment(self, *sizes: int) -> None:
        """All of ``sizes`` are alive together, for a moment."""
        with self.scope():
            self.take(*sizes)
