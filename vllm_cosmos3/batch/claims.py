"""Claims: which run makes a record, so that several runs on one output make each record once.

A claim is the file ``.cosmos3/claims/NAME.N``, which holds the name of a run and was created only
because it was not there: on a local disk, on NFS and on object stores one of several runs gets it.
Each run rewrites ``.cosmos3/runs/RUN.json`` every few seconds. The claims of a run are dead

- where that file is gone,
- where its process, on the same machine and among the same processes, does not live any more,
- where the file has not changed for `STALE_SECONDS` by the clock of the run that looks: clocks of
  different machines are never compared.

A dead claim is taken over by creating the next one, ``NAME.N+1``, which again one of several gets. A
run that was only slow finds that one before it publishes, and drops what it has made.

Runs write their common index one after the other by a claim as well, see `Claims.alone`.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from vllm_cosmos3.batch.store import Store

logger = logging.getLogger(__name__)

STATE = ".cosmos3"
CLAIMS, RUNS = f"{STATE}/claims", f"{STATE}/runs"
HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
WAIT_SECONDS = 0.1  # between tries to be alone


class LostClaim(Exception):
    """Another run has taken a record over: this one was too slow to tell that it lives."""


class Claims:
    """The claims of a run. ``run`` names one that lives in another process, for which this works.

    On a store that cannot create files in one step nothing is claimed, and everything is free.
    """

    def __init__(
        self,
        store: Store,
        run: str | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.run = run or f"{time.strftime('%Y%m%dT%H%M%S')}-{uuid.uuid4().hex[:8]}"
        self._store, self._clock = store, clock
        self._held: dict[str, int] = {}
        # Of other runs on other machines, and of claims without a run: the file, since when, and how
        # often it has changed.
        self._seen: dict[str, tuple[bytes, float, int]] = {}
        self._share = (0, 1)
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self.left = {claim.rpartition(".")[0] for claim in self._store.names(CLAIMS)}

    def start(self, share: tuple[int, int]) -> None:
        """Say that this run lives, from now until `close`. It makes the part ``share`` of a batch:
        an index, and of how many parts."""
        self._share = share
        if self._store.exclusive:
            self._beat(0)
            self._thread = threading.Thread(target=self._beats, daemon=True)
            self._thread.start()

    def take(self, name: str) -> bool:
        """Claim a record. A claim of this run itself is one of a worker that has died."""
        if not self._store.exclusive:
            return True
        generation = 0
        while True:
            claim = _claim(name, generation)
            if self._store.create(claim, self.run.encode()):
                self._held[name] = generation
                return True
            owner = self._store.read(claim)
            if owner is None:  # given up in between
                generation = 0
            elif owner == self.run.encode() or self._abandoned(claim, owner.decode()):
                generation += 1
            else:
                return False

    def holds(self, name: str) -> bool:
        """Whether a claim that was taken is still that of this run."""
        if not self._store.exclusive:
            return True
        mine = self._held.get(name)
        return (
            mine is not None
            and self._store.read(_claim(name, mine)) == self.run.encode()
            and not self._store.exists(_claim(name, mine + 1))
        )

    def release(self, name: str) -> None:
        """Give a claim up, with the dead ones before it; who has taken it over gives it up instead."""
        held = self.holds(name)
        generation = self._held.pop(name, None)
        if held and generation is not None:
            for earlier in range(generation + 1):
                self._store.delete(_claim(name, earlier))

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Hold a claim, after the living run that has it; on a store without claims nobody waits."""
        while not self.take(name):
            time.sleep(WAIT_SECONDS)
        try:
            yield
        finally:
            self.release(name)

    def dead(self, run: str) -> bool:
        """Whether another run has ended without giving up its claims, as far as is known by now."""
        state = self._store.read(_state(run))
        if state is None:
            return True
        try:
            here = _alive_here(json.loads(state))
        except (ValueError, LookupError, TypeError):  # being written, or never was
            here = None
        return self._stale(run, state) if here is None else not here

    def undecided(self) -> bool:
        """Whether of a run that was met it is not known yet whether it lives."""
        now = self._clock()
        return any(
            beats == 0 and now - since < STALE_SECONDS for _, since, beats in self._seen.values()
        )

    def rivals(self, share: tuple[int, int]) -> bool:
        """Whether another run lives that makes records of the same part of a batch."""
        found = False
        for name in self._store.names(RUNS):
            run = name.removesuffix(".json")
            state = self._store.read(_state(run))
            if state and run != self.run and not self.dead(run):
                index, count = json.loads(state)["share"]
                found |= count != share[1] or index == share[0]
        return found

    def close(self) -> None:
        """Give up all claims, and remove what dead runs have left of themselves."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
        for name in list(self._held):
            self.release(name)
        if not self._store.exclusive:
            return
        self._store.delete(_state(self.run))
        for name in self._store.names(RUNS):
            if self.dead(name.removesuffix(".json")):
                self._store.delete(f"{RUNS}/{name}")
        for folder in (CLAIMS, RUNS, STATE):  # where they are empty
            self._store.delete(folder)

    def _abandoned(self, claim: str, run: str) -> bool:
        """Whether a claim is that of a dead run, or of one that has not written its name in time."""
        return self.dead(run) if run else self._stale(claim, b"")

    def _stale(self, name: str, state: bytes) -> bool:
        """Whether something of another run has been the same for too long."""
        before, since, changes = self._seen.get(name, (None, 0.0, -1))
        if state != before:
            self._seen[name] = (state, self._clock(), changes + 1)
            return False
        return self._clock() - since >= STALE_SECONDS

    def _beats(self) -> None:
        for beat in count(1):
            if self._stopped.wait(HEARTBEAT_SECONDS):
                return
            try:
                self._beat(beat)
            except Exception as error:  # noqa: BLE001 - s3fs has its own
                # For now; others wait for several beats.
                logger.warning("the heartbeat of this run was not written: %s", error)

    def _beat(self, number: int) -> None:
        state = {"run": self.run, "share": self._share, **_process(os.getpid()), "beat": number}
        self._store.write(_state(self.run), json.dumps(state).encode())


def _claim(name: str, generation: int) -> str:
    return f"{CLAIMS}/{name}.{generation}"


def _state(run: str) -> str:
    return f"{RUNS}/{run}.json"


def _process(pid: int) -> dict[str, Any]:
    """A process, so that another one of the same machine can tell whether it lives."""
    return {"machine": _machine(), "pid": pid, "started": _started(pid)}


def _machine() -> str:
    """This boot of this machine and its set of processes, which containers have of their own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return uuid.uuid4().hex  # no machine that anybody knows


def _started(pid: int) -> str | None:
    """When a process began, in ticks since the boot: its number may be another's later."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "ZX" else fields[18]


def _alive_here(state: dict[str, Any]) -> bool | None:
    """Whether the process of a run lives; None where it is not one of this machine."""
    if state["machine"] != _machine():
        return None
    return state["started"] is not None and _started(state["pid"]) == state["started"]
