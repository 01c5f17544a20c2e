"""Replicas: several stages behind one queue, each on its own devices.

Requests wait here, in the `Scheduler` of all replicas, and go to the one where they are expected to be
done first. A replica that dies fails what it was making and is started again; what waits is served by
the others meanwhile.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from vllm_cosmos3.checkpoint.config import ModelConfig
from vllm_cosmos3.engine_options import EngineConfig
from vllm_cosmos3.errors import (
    Cancelled,
    Cosmos3Error,
    DeadlineExceeded,
    InvalidRequest,
    WorkerDied,
)
from vllm_cosmos3.stage.client import StageClient
from vllm_cosmos3.stage.config import StageConfig
from vllm_cosmos3.stage.job import StageJob, Stages
from vllm_cosmos3.stage.maintenance import UNDO
from vllm_cosmos3.stage.messages import Accepted, Failure, Status, Submit
from vllm_cosmos3.stage.placement import Placement
from vllm_cosmos3.stage.scheduler import QueueConfig, Scheduler

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.1  # between looks at deadlines and at replicas that come back
RETRY_SECONDS = 30.0  # until a replica that cannot start is tried again, while others serve


def check_sessions(model: ModelConfig, config: EngineConfig) -> None:
    """Refuse replicas of a simulator, whose sessions stay where their history is."""
    if model.causal is not None and config.data_parallel_size > 1:
        possible = "1, as a session of a simulator stays on the devices that have its history"
        raise InvalidRequest("data_parallel_size", config.data_parallel_size, possible)


def start_stages(
    stage: StageConfig,
    queue: QueueConfig | None = None,
    *,
    placements: Sequence[Placement] | None = None,
    drain_seconds: float = 600.0,
) -> Stages:
    """Start the stages of as many replicas as the engine options say. Returns at once.

    ``placements`` are those of the replicas, None if this process does not choose devices.

    Raises:
        InvalidRequest: the backend cannot run here.
    """
    count = stage.engine.data_parallel_size
    placements = [Placement()] * count if placements is None else placements
    queue = queue or QueueConfig()
    one = replace(stage, engine=replace(stage.engine, data_parallel_size=1))
    if count == 1:
        devices = placements[0].devices
        return StageClient(one, queue, drain_seconds=drain_seconds, devices=devices)
    return Replicas(replace(one, anywhere=True), queue, placements, drain_seconds=drain_seconds)


def outdated(members: Sequence[Stages]) -> set[int]:
    """Replicas that have lost the weights of a trainer, with their ranks, while others have them.

    They take no request until the next update: answers would differ by who gives them.
    """
    updates = [member.updates for member in members]
    return {at for at, count in enumerate(updates) if count == 0 < max(updates)}


@dataclass(slots=True, eq=False)
class _Accepted:
    """A request of the queue. ``expires`` is when its time is over."""

    job: StageJob
    request: Submit
    expires: float | None


class Replicas(Stages):
    """Stages of one configuration, one for each placement.

    Raises:
        InvalidRequest: the backend cannot run here.
    """

    def __init__(
        self,
        stage: StageConfig,
        queue: QueueConfig,
        placements: Sequence[Placement],
        *,
        drain_seconds: float = 600.0,
    ) -> None:
        self._stage, self._queue, self._drain_seconds = stage, queue, drain_seconds
        self._scheduler = Scheduler(queue, len(placements))
        self._jobs: dict[str, _Accepted] = {}
        self._lock = threading.RLock()  # of the two above; a stage's own lock is taken within it
        self._closing = threading.Event()
        self._given_up: dict[int, float] = {}  # replica -> when it is tried again
        self._placements = tuple(placements)
        self._members = [self._start(placement) for placement in placements]
        self._thread = threading.Thread(target=self._watch, name="replicas", daemon=True)
        self._thread.start()

    @property
    def members(self) -> tuple[Stages, ...]:
        return tuple(self._members)

    @property
    def can_serve(self) -> bool:
        return any(self._serving())

    @property
    def error(self) -> Cosmos3Error | None:
        errors = [member.error for member in self._members]
        return errors[0] if all(errors) else None

    @property
    def silent(self) -> bool:
        return all(member.silent for member in self._members)

    def last_sign_of_life(self) -> float:
        return min(member.last_sign_of_life() for member in self._members)

    def wait_ready(self, timeout: float | None = None) -> None:
        """Wait until every replica can serve."""
        end = None if timeout is None else time.monotonic() + timeout
        for member in self.members:
            member.wait_ready(None if end is None else max(0.0, end - time.monotonic()))

    def status(self, timeout: float = 10.0) -> Status:
        """Of all together: ready if one is."""
        members = self.members
        found = [member.status(timeout / len(members)) for member in members]
        up, old = self._serving(), outdated(members)
        weights = {one.weights for at, one in enumerate(found) if at not in old}
        states = [status.state for status in found]
        alive = [state for state in states if state != "failed"]
        busiest = max(found, key=lambda status: status.call_seconds)
        with self._lock:
            waiting, seconds = len(self._scheduler.waiting), self._scheduler.waiting_seconds
        return Status(
            state="ready" if any(up) else (alive or states)[0],
            waiting=waiting + sum(status.waiting for status in found),
            waiting_seconds=seconds + sum(status.waiting_seconds for status in found),
            running=sum(status.running for status in found),
            limit=self._queue.max_waiting,
            restarts=sum(status.restarts for status in found),
            weights=weights.pop() if len(weights) == 1 else None,
            updates=self.updates,
            given_up=max(status.given_up for status in found),
            loaded=max(status.loaded for status in found),
            call=busiest.call,
            call_seconds=busiest.call_seconds,
        )

    @property
    def updates(self) -> int:
        return max(member.updates for member in self._members)

    def _maintain(self, method: str, *args: Any, patience: float) -> Any:
        """On all replicas together: where one fails, the others do not stay asleep or half updated."""
        members = self.members

        def call(member: Stages, method: str, *args: Any) -> Any:
            return member._maintain(method, *args, patience=patience)

        with ThreadPoolExecutor(len(members)) as pool:
            calls = [pool.submit(call, member, method, *args) for member in members]
            errors = {at: error for at, one in enumerate(calls) if (error := one.exception())}
            if not errors:
                return calls[0].result()
            if (undo := UNDO.get(method)) is not None:
                undone = [
                    pool.submit(call, m, undo) for at, m in enumerate(members) if at not in errors
                ]
                for one in undone:
                    one.exception()
        raise errors[min(errors)]

    def cancel(self, name: str) -> None:
        with self._lock:
            at = self._scheduler.replica_of(name)
            if at is not None:
                self._members[at].cancel(name)
                return
            accepted = self._withdraw(name)
        if accepted is not None:
            accepted.job.handle(Failure(name, Cancelled("the request was cancelled")))

    def release(self, name: str) -> None:
        for member in self.members:
            member.release(name)

    def close(self) -> None:
        if self._closing.is_set():
            return
        self._closing.set()
        self._thread.join()
        for name in list(self._jobs):
            self._end(name, WorkerDied("the stage was closed"))
        with ThreadPoolExecutor(len(self._members)) as pool:
            list(pool.map(lambda member: member.close(), self._members))

    # The queue.

    def _take(self, job: StageJob, request: Submit) -> None:
        expires = None if request.deadline is None else time.monotonic() + request.deadline
        with self._lock:
            if self._closing.is_set():
                raise WorkerDied("the stage was closed")
            if (error := self.error) is not None:
                raise error
            self._scheduler.submit(job.name, request.seconds, request.batch)
            self._jobs[job.name] = _Accepted(job, request, expires)
            job.handle(Accepted(job.name, self._scheduler.position(job.name)))
        job.future.add_done_callback(lambda _: self._forget(job.name))
        self._dispatch()

    def _dispatch(self) -> None:
        """Hand requests over as long as a replica takes one."""
        with self._lock:
            if self._closing.is_set():
                return
            self._scheduler.closed = {at for at, up in enumerate(self._serving()) if not up}
            for entry in self._scheduler.resident:
                progress = self._jobs[entry.name].job.progress
                if progress is not None and progress.steps:
                    self._scheduler.progress(entry.name, progress.step / progress.steps)
            while (name := self._scheduler.admit()) is not None:
                self._hand_over(name)
            for index, entry in enumerate(self._scheduler.waiting):
                job = self._jobs[entry.name].job
                if job.position != index:
                    job.handle(Accepted(entry.name, index))

    def _serving(self) -> list[bool]:
        """Which replicas can take requests."""
        old = outdated(self._members)
        return [member.can_serve and at not in old for at, member in enumerate(self._members)]

    def _hand_over(self, name: str) -> None:
        at, accepted = self._scheduler.replica_of(name), self._jobs[name]
        assert at is not None
        expires, member = accepted.expires, self._members[at]
        left = None if expires is None else max(0.0, expires - time.monotonic())
        try:
            member.hand_over(accepted.job, replace(accepted.request, deadline=left))
        except Cosmos3Error:  # it went at this moment
            self._scheduler.closed.add(at)
            self._scheduler.readmit(name)

    def _forget(self, name: str) -> None:
        """A request has ended, wherever it was: there is room for another."""
        with self._lock:
            self._jobs.pop(name, None)
            self._scheduler.remove(name)
        self._dispatch()

    def _end(self, name: str, error: Cosmos3Error) -> None:
        """End a request if it waits here. Its owner is told outside of the lock."""
        with self._lock:
            accepted = self._withdraw(name)
        if accepted is not None:
            accepted.job.handle(Failure(name, error))

    def _withdraw(self, name: str) -> _Accepted | None:
        """Take a request out of the queue; None if it does not wait there any more."""
        if self._scheduler.replica_of(name) is not None:
            return None
        self._scheduler.remove(name)
        return self._jobs.pop(name, None)

    # Life.

    def _start(self, placement: Placement) -> StageClient:
        stage = replace(self._stage, engine=placement.engine_options(self._stage.engine))
        return StageClient(
            stage, self._queue, drain_seconds=self._drain_seconds, devices=placement.devices
        )

    def _watch(self) -> None:
        """Keep deadlines, notice replicas that come back, and try those again that were given up."""
        while not self._closing.wait(LOOK_SECONDS):
            now = time.monotonic()
            with self._lock:
                jobs = list(self._jobs.items())
            gone = self.error
            for name, accepted in jobs:
                if gone is not None:
                    self._end(name, WorkerDied(f"the stage ended: {gone}"))
                if accepted.expires is not None and now > accepted.expires:
                    self._end(name, DeadlineExceeded("the request has run out of its time"))
            self._retry(now)
            self._dispatch()

    def _retry(self, now: float) -> None:
        """Start a replica again that could not be started, unless all of them could not."""
        for at, member in enumerate(self._members):
            if member.error is None or self.error is not None:
                self._given_up.pop(at, None)
            elif now > self._given_up.setdefault(at, now + RETRY_SECONDS):
                logger.warning("replica %d is started again: %s", at, member.error)
                member.close()
                try:
                    self._members[at] = self._start(self._placements[at])
                except OSError as error:  # no process, no folder: a moment later there may be room
                    logger.warning("replica %d was not started: %s", at, error)
                    self._given_up[at] = now + RETRY_SECONDS
