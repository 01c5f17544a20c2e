"""Scheduler of requests: a bounded queue, a few residents on each replica, fair turns between them.

Pure bookkeeping: no clock, no process. A resident has its state on the ranks of a replica and takes
turns there, one call each. Seconds are estimates of a request's whole work where nothing else is said.
The stage process has a scheduler for its own ranks, and `replicas` has one for several stages.

Requests of one batch are resident together and count as one resident. Those that come after they have
begun wait until they have ended, and are the next batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_cosmos3.errors import Busy, InvalidRequest
from vllm_cosmos3.request.plan import Batch

POLICIES = ("short-first", "fifo")
Kind = tuple[bool, bool, Batch | None]  # short, alone, of a batch


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueConfig:
    """Policy and bounds of the queue.

    "fifo" serves one after the other. "short-first" lets one long request and others of at most
    ``short_seconds`` of work be resident together: waiting short ones come first, the shortest
    before the others, but none is passed over more than ``max_passed`` times; long ones keep their
    order. Turns go to the resident that was served least.

    ``max_waiting`` and ``max_waiting_seconds`` bound the queue; what comes then is Busy. The bounds
    of residents are those of each replica.
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
    """One request in the queue or resident. ``costs`` are its seconds on each replica."""

    name: str
    costs: tuple[float, ...]
    batch: Batch | None = None
    begun: bool = False  # with the steps that it shares
    passed: int = 0  # how often a later request was admitted before
    served: float = 0.0  # seconds of turns, counted from the least served at admission
    share: float = 0.0  # of its work that is done, where somebody says so
    replica: int = 0  # where it is resident
    alone: bool = False  # waits until nothing is resident: there was no memory for it beside others

    @property
    def seconds(self) -> float:
        """Its work where it is done fastest."""
        return min(self.costs)

    @property
    def remaining(self) -> float:
        """Seconds of work that a resident has left."""
        return self.costs[self.replica] * (1 - self.share)


class Scheduler:
    """Requests by name: ``submit``, then ``admit`` until it gives none, then ``turn``.

    ``closed`` are the replicas that take nothing new.
    """

    def __init__(self, config: QueueConfig, replicas: int = 1) -> None:
        self.config = config
        self.waiting: list[QueueEntry] = []  # in order of arrival
        self.resident: list[QueueEntry] = []  # in order of admission
        self.closed: set[int] = set()
        self._replicas = range(replicas)

    @property
    def waiting_seconds(self) -> float:
        return sum(entry.seconds for entry in self.waiting)

    def submit(
        self, name: str, seconds: float | Sequence[float], batch: Batch | None = None
    ) -> None:
        """Put a request at the end of the queue. ``seconds`` may differ by replica.

        Others of the same ``batch`` may be resident with it.

        Raises:
            Busy: the queue is full.
        """
        costs = (
            tuple(seconds) if isinstance(seconds, Sequence) else (seconds,) * len(self._replicas)
        )
        entry = QueueEntry(name, costs, batch)
        count, limit = len(self.waiting), self.config.max_waiting
        if count >= limit:
            raise Busy(f"the queue is full: {count} of {limit} requests wait")
        total, most = self.waiting_seconds, self.config.max_waiting_seconds
        if self.waiting and total + entry.seconds > most:
            raise Busy(f"the queue is full: {total:.0f} of {most:.0f} seconds of work wait")
        self.waiting.append(entry)

    def admit(self) -> str | None:
        """Make the next waiting request resident; None if none may come in now.

        It goes where it is expected to be done first, see `replica_of`.
        """
        kinds = [self._kind(entry) for entry in self.waiting]
        places = {kind: self._places(kind) for kind in set(kinds)}
        candidates = [e for e, kind in zip(self.waiting, kinds, strict=True) if places[kind]]
        if not candidates:
            return None
        chosen = min(candidates, key=self._rank)
        for entry in self.waiting[: self._order(chosen)]:
            if entry in candidates or entry.alone:
                entry.passed += 1
        chosen.replica = min(places[self._kind(chosen)], key=lambda at: self._expected(chosen, at))
        self.waiting.remove(chosen)
        chosen.served = min((entry.served for entry in self.residents(chosen.replica)), default=0.0)
        self.resident.append(chosen)
        return chosen.name

    def residents(self, replica: int = 0) -> list[QueueEntry]:
        """The requests on a replica."""
        return [entry for entry in self.resident if entry.replica == replica]

    def replica_of(self, name: str) -> int | None:
        """Where a request is resident; None if it waits or is not known."""
        return next((entry.replica for entry in self.resident if entry.name == name), None)

    def mates(self, name: str) -> list[str]:
        """A resident and all others of its batch on its replica."""
        entry = self._resident(name)
        if entry.batch is None:
            return [name]
        return [e.name for e in self.residents(entry.replica) if e.batch == entry.batch]

    def begin(self, name: str) -> None:
        """The batch of a resident begins with those of it that are resident."""
        for mate in self.mates(name):
            self._resident(mate).begun = True

    def has_room(self, name: str) -> bool:
        """Whether others may still join the batch of a resident."""
        batch = self._resident(name).batch
        mates = [self._resident(mate) for mate in self.mates(name)]
        return batch is not None and self._may_join(batch, mates)

    def turn(self, replica: int = 0) -> str | None:
        """The resident of a replica whose turn it is."""
        here = self.residents(replica)
        return min(here, key=lambda entry: entry.served).name if here else None

    def charge(self, name: str, seconds: float) -> None:
        """A turn of ``name`` took ``seconds``."""
        self._resident(name).served += seconds

    def progress(self, name: str, share: float) -> None:
        """So much of the work of a resident is done, from 0 to 1."""
        self._resident(name).share = share

    def readmit(self, name: str, *, alone: bool = False) -> None:
        """Put a resident back to the front of the queue: its state is lost, or was never made.

        If it is to be ``alone``, it comes when nothing is resident, and is not batched.
        """
        entry = self._resident(name)
        entry.alone |= alone
        entry.batch = None if alone else entry.batch
        entry.share, entry.begun = 0.0, False
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

    def _resident(self, name: str) -> QueueEntry:
        return next(entry for entry in self.resident if entry.name == name)

    def _is_short(self, entry: QueueEntry) -> bool:
        return entry.seconds <= self.config.short_seconds

    def _kind(self, entry: QueueEntry) -> Kind:
        """What decides where a request fits: whether it is short, whether it has to be alone, its batch."""
        return self._is_short(entry), entry.alone, entry.batch

    def _places(self, kind: Kind) -> list[int]:
        """The replicas that could take a request of this kind now."""
        overdue = any(e.alone and e.passed >= self.config.max_passed for e in self.waiting)
        return [
            at
            for at in self._replicas
            if at not in self.closed and self._fits(kind, self.residents(at), overdue=overdue)
        ]

    def _fits(self, kind: Kind, here: list[QueueEntry], *, overdue: bool) -> bool:
        short, alone, batch = kind
        if not here:
            return True
        if alone or overdue:  # the residents end, and then it is its turn
            return False
        mates = [entry for entry in here if batch is not None and entry.batch == batch]
        if batch is not None and mates:
            return self._may_join(batch, mates)
        groups = {entry.batch or entry.name for entry in here}
        if self.config.policy == "fifo" or len(groups) >= self.config.max_resident:
            return False
        return short or all(map(self._is_short, here))

    def _may_join(self, batch: Batch, mates: list[QueueEntry]) -> bool:
        return len(mates) < batch.size and not any(entry.begun for entry in mates)

    def _expected(self, entry: QueueEntry, replica: int) -> tuple[float, int, float]:
        """When a request is done on a replica: its turns and those of the others until then."""
        here, cost = self.residents(replica), entry.costs[replica]
        turns = [e for e in here if entry.batch is None or e.batch != entry.batch]  # not its mates
        seconds = cost + sum(min(other.remaining, cost) for other in turns)
        return (seconds, len(here), sum(other.remaining for other in here))

    def _rank(self, entry: QueueEntry) -> tuple[bool, bool, float, int]:
        """Smaller is admitted earlier."""
        if self.config.policy == "fifo" or entry.passed >= self.config.max_passed:
            return (False, False, 0.0, self._order(entry))
        short = self._is_short(entry)
        return (True, not short, entry.seconds if short else 0.0, self._order(entry))

    def _order(self, entry: QueueEntry) -> int:
        return self.waiting.index(entry)
