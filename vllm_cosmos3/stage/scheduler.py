"""Scheduler of requests: a bounded queue, a few residents, and fair turns between them.

Pure bookkeeping: no clock, no process. A resident has its state on the ranks and takes turns, one
call each. Seconds are estimates of a request's whole work where nothing else is said.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_cosmos3.errors import Busy, InvalidRequest

POLICIES = ("short-first", "fifo")


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueConfig:
    """Policy and bounds of the queue.

    "fifo" serves one after the other. "short-first" lets one long request and others of at most
    ``short_seconds`` of work be resident together: waiting short ones come first, the shortest
    before the others, but none is passed over more than ``max_passed`` times; long ones keep their
    order. Turns go to the resident that was served least.

    ``max_waiting`` and ``max_waiting_seconds`` bound the queue; what comes then is Busy.
    """

    policy: str = "short-first"
    max_waiting: int = 64
    max_waiting_seconds: float = 24 * 3600.0
    max_resident: int = 4
    short_seconds: float = 20.0
    max_passed: int = 8

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise InvalidRequest("policy", self.policy, " or ".join(POLICIES))
        for field in ("max_waiting", "max_resident"):
            if getattr(self, field) < 1:
                raise InvalidRequest(field, getattr(self, field), "at least 1")


@dataclass(slots=True, eq=False)
class QueueEntry:
    """One request in the queue or resident."""

    name: str
    seconds: float
    passed: int = 0  # how often a later request was admitted before
    served: float = 0.0  # seconds of turns, counted from the least served at admission
    alone: bool = False  # waits until nothing is resident: there was no memory for it beside others


class Scheduler:
    """Requests by name: ``submit``, then ``admit`` until it gives none, then ``turn``."""

    def __init__(self, config: QueueConfig) -> None:
        self.config = config
        self.waiting: list[QueueEntry] = []  # in order of arrival
        self.resident: list[QueueEntry] = []  # in order of admission

    @property
    def waiting_seconds(self) -> float:
        return sum(entry.seconds for entry in self.waiting)

    def submit(self, name: str, seconds: float) -> None:
        """Put a request at the end of the queue.

        Raises:
            Busy: the queue is full.
        """
        count, limit = len(self.waiting), self.config.max_waiting
        if count >= limit:
            raise Busy(f"the queue is full: {count} of {limit} requests wait")
        total, most = self.waiting_seconds, self.config.max_waiting_seconds
        if self.waiting and total + seconds > most:
            raise Busy(f"the queue is full: {total:.0f} of {most:.0f} seconds of work wait")
        self.waiting.append(QueueEntry(name, seconds))

    def admit(self) -> str | None:
        """Make the next waiting request resident; None if none may come in now."""
        candidates = [entry for entry in self.waiting if self._fits(entry)]
        overdue = [e for e in self.waiting if e.alone and e.passed >= self.config.max_passed]
        if overdue and self.resident:
            return None  # the residents end, and then it is its turn
        if not candidates:
            return None
        chosen = min(candidates, key=self._rank)
        for entry in self.waiting[: self._order(chosen)]:
            if entry in candidates or entry.alone:
                entry.passed += 1
        self.waiting.remove(chosen)
        chosen.served = min((entry.served for entry in self.resident), default=0.0)
        self.resident.append(chosen)
        return chosen.name

    def turn(self) -> str | None:
        """The resident whose turn it is."""
        if not self.resident:
            return None
        return min(self.resident, key=lambda entry: entry.served).name

    def charge(self, name: str, seconds: float) -> None:
        """A turn of ``name`` took ``seconds``."""
        next(entry for entry in self.resident if entry.name == name).served += seconds

    def readmit(self, name: str, *, alone: bool = False) -> None:
        """Put a resident back to the front of the queue: its state is lost, or was never made."""
        entry = next(entry for entry in self.resident if entry.name == name)
        entry.alone |= alone
        self.resident.remove(entry)
        self.waiting.insert(0, entry)

    def remove(self, name: str) -> None:
        """Forget a request wherever it is."""
        self.waiting = [entry for entry in self.waiting if entry.name != name]
        self.resident = [entry for entry in self.resident if entry.name != name]

    def position(self, name: str) -> int:
        """The number of requests before it in the queue; 0 for the first and for residents."""
        names = [entry.name for entry in self.waiting]
        return names.index(name) if name in names else 0

    def _is_short(self, entry: QueueEntry) -> bool:
        return entry.seconds <= self.config.short_seconds

    def _fits(self, entry: QueueEntry) -> bool:
        if entry.alone and self.resident:
            return False
        if self.config.policy == "fifo":
            return not self.resident
        if len(self.resident) >= self.config.max_resident:
            return False
        return self._is_short(entry) or all(map(self._is_short, self.resident))

    def _rank(self, entry: QueueEntry) -> tuple[bool, bool, float, int]:
        """Smaller is admitted earlier."""
        if self.config.policy == "fifo" or entry.passed >= self.config.max_passed:
            return (False, False, 0.0, self._order(entry))
        short = self._is_short(entry)
        return (True, not short, entry.seconds if short else 0.0, self._order(entry))

    def _order(self, entry: QueueEntry) -> int:
        return self.waiting.index(entry)
