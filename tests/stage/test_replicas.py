"""Several stages behind one queue: who gets what, and what is left when one dies."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from generators import eventually
from limits import HANG
from toy_plan import ToyPlan, stage

from vllm_cosmos3.errors import (
    Busy,
    Cancelled,
    CheckpointError,
    Cosmos3Error,
    DeadlineExceeded,
    WorkerDied,
)
from vllm_cosmos3.stage.client import StageClient
from vllm_cosmos3.stage.job import StageJob
from vllm_cosmos3.stage.placement import Placement
from vllm_cosmos3.stage.replicas import Replicas, outdated
from vllm_cosmos3.stage.scheduler import QueueConfig

LONG = 1000.0  # seconds of work in the scheduler's eyes: one on each replica
QUEUE = QueueConfig(max_waiting=3)


@pytest.fixture(scope="module")
def replicas() -> Iterator[Replicas]:
    """Two stages of one rank, which the tests leave able to serve."""
    made = Replicas(stage(), QUEUE, [Placement(devices="0"), Placement(devices="1")])
    made.wait_ready(HANG)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def nothing_is_left(replicas: Replicas) -> None:
    """The last replica of an earlier test is idle a moment after its owner has been told of the end."""
    idle(replicas)


def idle(replicas: Replicas) -> None:
    """Wait until a request would find all replicas idle."""
    eventually(lambda: not replicas._jobs)


def long(replicas: Replicas, **submitted: float) -> tuple[StageJob, threading.Event]:
    """A request that does not end by itself, and what is set when it has begun."""
    begun = threading.Event()
    plan = ToyPlan(steps=100_000, seconds=0.01)
    job = replicas.submit(plan, seconds=LONG, report=lambda _: begun.set(), **submitted)
    return job, begun


def cancelled(*jobs: StageJob) -> None:
    """End these, and wait until they have ended."""
    for job in jobs:
        job.cancel()
    for job in jobs:
        with pytest.raises(Cancelled):
            job.result(HANG)


def test_replicas_sleep_together_or_not_at_all(replicas: Replicas) -> None:
    job, begun = long(replicas)
    assert begun.wait(HANG)
    with pytest.raises(Busy, match="1 request is still running"):
        replicas.maintain("sleep", patience=0.1)
    assert [member.status().state for member in replicas.members] == ["ready", "ready"]
    cancelled(job)
    replicas.maintain("sleep")
    waiting = replicas.submit(ToyPlan(steps=1))
    status = replicas.status()
    assert (status.state, status.waiting, status.running) == ("sleeping", 1, 0)
    replicas.maintain("wake_up")
    assert len(waiting.result(HANG).pids) == 1
    assert replicas.status().state == "ready"


def test_replicas_are_updated_together(replicas: Replicas) -> None:
    replicas.maintain("start_weight_update")
    assert replicas.status().state == "updating"
    replicas.maintain("update_weights", {})
    replicas.maintain("finish_weight_update", "second")
    status = replicas.status()
    assert (status.state, status.weights) == ("ready", "second")


def weights_of(replicas: Replicas) -> list[int]:
    """Of each replica, by a request to it alone."""
    return [member.submit(ToyPlan(steps=1)).result(HANG).weights for member in replicas.members]


def test_an_update_that_one_replica_cannot_finish_is_undone_on_all(replicas: Replicas) -> None:
    before = weights_of(replicas)
    replicas.maintain("start_weight_update")
    for _ in range(2):
        replicas.maintain("update_weights", {})
    with pytest.raises(Cosmos3Error, match="this replica fails"):
        replicas.maintain("finish_weight_update", "fails on 1")
    assert weights_of(replicas) == before == [1, 1]
    assert (replicas.status().state, replicas.status().weights) == ("ready", "second")


def test_a_replica_that_has_lost_new_weights_serves_again_after_the_next_update(
    replicas: Replicas,
) -> None:
    (pid,) = replicas.members[0].submit(ToyPlan(steps=1)).result(HANG).pids
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: replicas.members[0].status().restarts == 1)
    assert outdated(replicas.members) == {0}
    assert weights_of(replicas) == [0, 1]
    jobs = [replicas.submit(ToyPlan(steps=1)) for _ in range(3)]
    assert {job.result(HANG).weights for job in jobs} == {1}
    assert (replicas.status().state, replicas.status().weights) == ("ready", "second")
    replicas.maintain("start_weight_update")
    replicas.maintain("update_weights", {})
    replicas.maintain("finish_weight_update", "third")
    assert outdated(replicas.members) == set()
    assert weights_of(replicas) == [1, 1]
    assert replicas.status().weights == "third"


def test_requests_run_at_the_same_time_on_different_replicas(replicas: Replicas) -> None:
    jobs = [long(replicas) for _ in range(2)]
    for _, begun in jobs:
        assert begun.wait(HANG)
    waiting, _ = long(replicas)
    assert waiting.position == 0
    status = replicas.status()
    assert (status.state, status.running, status.waiting, status.limit) == ("ready", 2, 1, 3)
    assert status.waiting_seconds == LONG
    cancelled(waiting, *(job for job, _ in jobs))
    pids = set()
    for _ in range(2):
        idle(replicas)
        pids |= set(replicas.submit(ToyPlan(steps=1)).result(HANG).pids)
    assert len(pids) == 1  # both were idle


def test_a_short_request_runs_beside_a_long_one(replicas: Replicas) -> None:
    jobs = [long(replicas) for _ in range(2)]
    assert replicas.submit(ToyPlan(steps=3), seconds=1.0).result(HANG).total == 0
    cancelled(*(job for job, _ in jobs))


def test_the_queue_is_one_and_has_an_end(replicas: Replicas) -> None:
    jobs = [long(replicas) for _ in range(2)]
    waiting = [long(replicas)[0] for _ in range(3)]
    assert [job.position for job in waiting] == [0, 1, 2]
    with pytest.raises(Busy, match="3 of 3 requests wait"):
        replicas.submit(ToyPlan(), seconds=LONG)
    cancelled(waiting[1])
    eventually(lambda: waiting[2].position == 1)
    late, _ = long(replicas, deadline=0.2)
    with pytest.raises(DeadlineExceeded):
        late.result(HANG)
    cancelled(waiting[0], waiting[2], *(job for job, _ in jobs))


def test_a_replica_that_dies_fails_its_own_and_comes_back(replicas: Replicas) -> None:
    first, second = long(replicas), long(replicas)
    for _, begun in (first, second):
        assert begun.wait(HANG)
    waiting = [replicas.submit(ToyPlan(steps=2), seconds=LONG) for _ in range(2)]
    killed = cast("StageClient", replicas.members[0])
    serving: list[list[bool]] = []  # when its end is told
    first[0].future.add_done_callback(
        lambda _: serving.append([member.can_serve for member in replicas.members])
    )
    os.kill(killed._process.pid, signal.SIGKILL)
    with pytest.raises(WorkerDied, match="the stage process ended with status -9"):
        first[0].result(HANG)
    assert not second[0].future.done()
    eventually(lambda: serving == [[False, True]])
    assert replicas.status().state == "ready"
    assert replicas.error is None
    second[0].cancel()  # which makes room on the replica that is left
    assert [job.result(HANG).total for job in waiting] == [0, 0]
    replicas.wait_ready(HANG)
    assert [member.process_restarts for member in replicas.members] == [1, 0]


def test_what_waits_ends_with_the_replicas(replicas: Replicas) -> None:
    jobs = [long(replicas)[0] for _ in range(3)]
    replicas.close()
    replicas.close()
    for job in jobs:
        with pytest.raises((WorkerDied, Cancelled)):
            job.result(HANG)
    with pytest.raises(WorkerDied, match="was closed"):
        replicas.submit(ToyPlan())


def test_a_replica_is_tried_again_until_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first time its checkpoint is missing, the second time the machine has no memory."""
    monkeypatch.setattr("vllm_cosmos3.stage.replicas.RETRY_SECONDS", 0.0)
    start, starts = Replicas._start, []

    def failing(replicas: Replicas, placement: Placement) -> StageClient:
        if placement.devices == "0":
            starts.append(placement)
            if len(starts) == 1:
                return StageClient(stage(model=tmp_path / "none"), QUEUE)
            if len(starts) == 2:
                raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return start(replicas, placement)

    monkeypatch.setattr(Replicas, "_start", failing)
    replicas = Replicas(stage(), QUEUE, [Placement(devices="0"), Placement(devices="1")])
    eventually(lambda: [member.can_serve for member in replicas.members] == [True, True])
    assert len(starts) == 3
    replicas.close()


def test_replicas_that_cannot_start_say_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect, submitted = StageClient._connect, threading.Event()

    def late(client: StageClient) -> Any:
        assert submitted.wait(HANG)
        return connect(client)

    monkeypatch.setattr(StageClient, "_connect", late)  # it is not told yet
    replicas = Replicas(stage(model=tmp_path / "none"), QUEUE, [Placement()])
    job = replicas.submit(ToyPlan())
    submitted.set()
    with pytest.raises(WorkerDied, match="none is missing"):
        job.result(HANG)
    assert "none is missing" in str(replicas.error)
    assert replicas.status().state == "failed"
    (member,) = cast("list[StageClient]", replicas.members)
    with pytest.raises(CheckpointError, match="none is missing"):
        member.wait_ready(HANG)
    with pytest.raises(CheckpointError):
        member.submit(ToyPlan())
    assert member.status().state == "failed"
    replicas.close()
    assert not member._folder.exists()
