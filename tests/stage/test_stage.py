"""The stage process as its client sees it: order, progress, cancelling, faults, life and death."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from generators import eventually
from limits import HANG
from ranks import processes_below, remaining, segments_of
from toy_plan import Gate, ToyPlan, stage

from vllm_cosmos3.errors import (
    Busy,
    Cancelled,
    CheckpointError,
    Cosmos3Error,
    DeadlineExceeded,
    InvalidRequest,
    OutOfMemory,
    WorkerDied,
)
from vllm_cosmos3.progress import Preview, Progress
from vllm_cosmos3.request.plan import Batch
from vllm_cosmos3.stage import client as client_module
from vllm_cosmos3.stage.client import StageClient, StageJob
from vllm_cosmos3.stage.scheduler import QueueConfig

LONG = 1000.0  # seconds of work in the scheduler's eyes


@pytest.fixture(scope="module")
def client() -> Iterator[StageClient]:
    """Two ranks, which the tests leave able to serve."""
    client = StageClient(stage(1, 2, 1), QueueConfig(max_waiting=6))
    client.wait_ready(HANG)
    yield client
    client.close()


@pytest.fixture(scope="module")
def impatient() -> Iterator[StageClient]:
    """The same, where a rank that fails is not left long in a collective by the other."""
    client = StageClient(stage(1, 2, 1, grace=0.5))
    client.wait_ready(HANG)
    yield client
    client.close()


def test_a_result_comes_back_with_progress(client: StageClient) -> None:
    heard: list[Progress] = []
    job = client.submit(ToyPlan(steps=3), report=heard.append)
    assert not job.future.cancel()  # whoever waits may not end it
    assert job.result(HANG).total == 6
    assert [(p.phase, p.step, p.steps) for p in heard] == [
        ("encode", 0, 3),
        *(("denoise", step, 3) for step in range(4)),
        ("decode", 3, 3),
    ]
    times = [p.elapsed for p in heard]
    assert times == sorted(times)
    assert [p.eta is None for p in heard] == [True, True, False, False, False, True]


def test_previews_are_made_between_steps_on_all_ranks(client: StageClient) -> None:
    shown: list[Preview] = []
    job = client.submit(ToyPlan(steps=24), show=shown.append)
    assert job.result(HANG).total == 2 * 24  # as without
    steps = [preview.step for preview in shown]
    assert steps == [2 * place for place in range(1, 12)]
    assert [preview.jpeg for preview in shown] == [bytes([step]) for step in steps]


def test_a_result_can_be_saved_by_the_worker(client: StageClient, tmp_path: Path) -> None:
    job = client.submit(ToyPlan(steps=1), save=tmp_path / "total")
    assert job.result(HANG) == [tmp_path / "total"]
    assert (tmp_path / "total").read_text() == "2"


def test_what_cannot_be_saved_fails_alone(client: StageClient, tmp_path: Path) -> None:
    restarts = client.status().restarts
    before = client.submit(ToyPlan(steps=1)).result(HANG)
    other = client.submit(ToyPlan(steps=100, seconds=0.01), seconds=1.0)
    for _ in range(2):
        with pytest.raises(Cosmos3Error, match="No such file"):
            client.submit(ToyPlan(steps=1), save=tmp_path / "none" / "total").result(HANG)
    assert other.result(HANG).pids == before.pids
    assert client.status().restarts == restarts


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("broken", r"^a file could not be read or written \(Input/output error\)$"),
        ("deadly", "a worker process ended in finish"),
        ("unreadable", "the result cannot be read: these are no frames"),
    ],
)
def test_a_result_that_is_lost_on_its_way_leaves_nothing(
    client: StageClient, fault: str, words: str
) -> None:
    job = client.submit(ToyPlan(steps=1, result=fault))
    with pytest.raises(Cosmos3Error, match=words):
        job.result(HANG)
    assert not (client._folder / job.name).exists()
    assert client.submit(ToyPlan(steps=1)).result(HANG).total == 2


def test_asleep_requests_wait_until_it_is_woken(client: StageClient) -> None:
    begun = threading.Event()
    running = client.submit(ToyPlan(steps=20, seconds=0.01), report=lambda _: begun.set())
    assert begun.wait(HANG)  # until then it would wait as well
    client.maintain("sleep")
    assert running.future.done()
    assert running.result(HANG).total == 2 * 20
    waiting = client.submit(ToyPlan(steps=1))
    client.maintain("sleep")  # which it does
    status = client.status()
    assert (status.state, status.waiting, status.running) == ("sleeping", 1, 0)
    client.maintain("wake_up")
    assert waiting.result(HANG).total == 2
    client.maintain("wake_up")  # which it is
    assert client.status().state == "ready"


TOGETHER = Batch(key="alike", size=3)


@contextmanager
def all_at_once(client: StageClient) -> Iterator[None]:
    """What is submitted in the block is admitted at its end."""
    client.maintain("sleep")
    yield
    client.maintain("wake_up")


def test_requests_of_one_batch_step_together_until_one_is_cancelled(
    client: StageClient, tmp_path: Path
) -> None:
    heard: list[Progress] = []
    gate = Gate(tmp_path)
    plan = ToyPlan(steps=20, gates={"step 3": gate})
    with all_at_once(client):
        alike = [client.submit(plan, batch=TOGETHER, report=heard.append)]
        cancelled = client.submit(plan, batch=TOGETHER)
        alike.append(client.submit(plan, batch=TOGETHER))
        late = client.submit(ToyPlan(steps=2), batch=TOGETHER)  # the batch is full
        other = client.submit(ToyPlan(steps=6), batch=Batch(key="another", size=4))
        shown = client.submit(ToyPlan(steps=2), batch=TOGETHER, show=lambda _: None)
    eventually(lambda: gate.reached)
    cancelled.cancel()
    client.status()  # by then it knows
    gate.open()
    results = [job.result(HANG) for job in alike]
    with pytest.raises(Cancelled):
        cancelled.result(HANG)
    assert {result.total for result in results} == {40}
    (sizes,) = {result.batch_sizes for result in results}
    assert sizes == (3,) * 4 + (2,) * 16
    assert [progress.step for progress in heard if progress.phase == "denoise"] == [*range(21)]
    assert late.result(HANG).batch_sizes == (1, 1)
    assert other.result(HANG).batch_sizes == (1,) * 6
    assert shown.result(HANG).batch_sizes == (1, 1)


def test_in_a_batch_each_fails_by_itself(client: StageClient) -> None:
    """In its decoding, and in a step that it shared, after which the others are made alone."""
    with all_at_once(client):
        good, bad = (
            client.submit(ToyPlan(faults=faults), batch=TOGETHER)
            for faults in ({}, {"decode": "invalid"})
        )
    with pytest.raises(InvalidRequest):
        bad.result(HANG)
    assert good.result(HANG).batch_sizes == (2, 2, 2)
    restarts = client.status().restarts
    with all_at_once(client):
        jobs = [
            client.submit(ToyPlan(faults=faults), batch=TOGETHER)
            for faults in ({}, {"step 1": "invalid"}, {})
        ]
    with pytest.raises(InvalidRequest):
        jobs.pop(1).result(HANG)
    assert [job.result(HANG).batch_sizes for job in jobs] == [(1, 1, 1)] * 2
    assert client.status().restarts == restarts


def test_a_batch_whose_ranks_die_is_made_one_by_one(client: StageClient) -> None:
    with all_at_once(client):
        jobs = [
            client.submit(ToyPlan(faults=faults), batch=TOGETHER)
            for faults in ({}, {"step 1": "kill"}, {})
        ]
    with pytest.raises(WorkerDied):
        jobs.pop(1).result(HANG)
    assert [job.result(HANG).batch_sizes for job in jobs] == [(1, 1, 1)] * 2


def test_it_stays_awake_if_requests_do_not_end(client: StageClient) -> None:
    job = client.submit(ToyPlan(steps=10_000, seconds=0.02), seconds=LONG)
    eventually(lambda: client.status().running == 1)
    with pytest.raises(Busy, match=r"1 request is still running after 0\.1 s"):
        client.maintain("sleep", patience=0.1)
    assert client.status().state == "ready"
    job.cancel()
    with pytest.raises(Cancelled):
        job.result(HANG)
    assert client.submit(ToyPlan(steps=1)).result(HANG).total == 2


def test_it_sleeps_once_requests_have_ended_however_late(
    client: StageClient, tmp_path: Path
) -> None:
    gate = Gate(tmp_path)
    job = client.submit(ToyPlan(gates={"decode": gate}))
    eventually(lambda: gate.reached)
    with ThreadPoolExecutor(1) as pool:
        sleeping = pool.submit(client.maintain, "sleep", patience=0.0)
        eventually(lambda: len(client._jobs) == 2)
        client.status()  # by then it knows
        gate.open()
        assert job.result(HANG).total == 6
        sleeping.result(HANG)
    assert client.status().state == "sleeping"
    client.maintain("wake_up")


def test_requests_wait_for_the_end_of_a_weight_update(client: StageClient) -> None:
    client.maintain("start_weight_update")
    waiting = client.submit(ToyPlan(steps=1))
    client.maintain("update_weights", {})
    status = client.status()
    assert (status.state, status.waiting, status.weights) == ("updating", 1, None)
    client.maintain("finish_weight_update", "second")
    assert waiting.result(HANG).total == 2
    status = client.status()
    assert (status.state, status.weights) == ("ready", "second")


def test_a_rank_that_fails_in_an_update_ends_it_on_all(client: StageClient) -> None:
    client.maintain("start_weight_update")
    waiting = client.submit(ToyPlan(steps=1))
    with pytest.raises(Cosmos3Error, match="only the last rank fails"):
        client.maintain("update_weights", {"fault": "one"})
    assert waiting.result(HANG).total == 2
    assert client.status().state == "ready"


def test_ranks_that_are_lost_asleep_are_replaced_awake(client: StageClient) -> None:
    pids = client.submit(ToyPlan(steps=1)).result(HANG).pids
    client.maintain("sleep")
    waiting = client.submit(ToyPlan(steps=1))
    os.kill(pids[-1], signal.SIGKILL)
    with pytest.raises(WorkerDied, match="a worker process ended in wake_up"):
        client.maintain("wake_up")
    assert waiting.result(HANG).total == 2
    assert client.status().state == "ready"


def test_ranks_that_are_lost_while_there_is_nothing_to_do_are_replaced(client: StageClient) -> None:
    pids = client.submit(ToyPlan(steps=1)).result(HANG).pids
    restarts, processes = client.status().restarts, client.process_restarts
    os.kill(pids[-1], signal.SIGKILL)
    eventually(lambda: client.status().restarts > restarts)
    assert client.submit(ToyPlan(steps=1)).result(HANG).total == 2
    assert client.process_restarts == processes


def test_a_short_request_overtakes_a_long_one(client: StageClient) -> None:
    long = client.submit(ToyPlan(steps=10_000, seconds=0.02), seconds=LONG)
    assert client.submit(ToyPlan(steps=5), seconds=1.0).result(HANG).total == 10
    assert not long.future.done()
    long.cancel()
    with pytest.raises(Cancelled):
        long.result(HANG)


def test_cancel_frees_the_stage_within_one_step(client: StageClient, tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    plan = ToyPlan(steps=10_000, gates={"step 2": gate})
    job = client.submit(plan, seconds=LONG)
    waiting = client.submit(ToyPlan(), seconds=LONG)
    eventually(lambda: gate.reached)
    waiting.cancel()
    with pytest.raises(Cancelled):
        waiting.result(HANG)
    job.cancel()
    client.status()  # by then it knows
    gate.open()
    with pytest.raises(Cancelled):
        job.result(HANG)
    assert job.progress is not None
    assert job.progress.step == 3  # with the one under way
    assert client.submit(ToyPlan(steps=1)).result(HANG).total == 2


def test_what_a_report_raises_ends_the_request(client: StageClient) -> None:
    def report(progress: Progress) -> None:
        raise KeyError(progress.phase)

    with pytest.raises(KeyError, match="encode"):
        client.submit(ToyPlan(steps=10_000, seconds=0.01), report=report).result(HANG)


@pytest.mark.parametrize(
    "kind", [KeyError, asyncio.CancelledError, SystemExit, KeyboardInterrupt, GeneratorExit]
)
@pytest.mark.parametrize("phase", ["encode", "denoise", "decode"])
def test_a_report_may_raise_anything(
    kind: type[BaseException], phase: str, client: StageClient
) -> None:
    """It reaches the owner, and the next request is served as if nothing had been."""

    def report(progress: Progress) -> None:
        if progress.phase == phase:
            raise kind

    with pytest.raises(kind):
        client.submit(ToyPlan(steps=2), report=report).result(HANG)
    assert client.submit(ToyPlan(steps=1)).result(HANG).total == 2


def test_what_the_last_report_raises_is_not_lost(client: StageClient) -> None:
    def report(progress: Progress) -> None:
        if progress.phase == "decode":
            raise KeyError(progress.phase)

    job = client.submit(ToyPlan(steps=1), report=report)
    with pytest.raises(KeyError, match="decode"):
        job.result(HANG)
    assert not (client._folder / job.name).exists()


def test_a_stage_that_is_killed_while_it_starts_can_be_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(  # for ever, however late it is killed
        client_module, "start_interpreter", lambda *_: subprocess.Popen(["sleep", "infinity"])
    )
    client = StageClient(stage(1, 1, 1))
    client._process.kill()
    with pytest.raises(WorkerDied):
        client.wait_ready(HANG)
    closing = threading.Thread(target=client.close, daemon=True)
    closing.start()
    closing.join(HANG)
    assert not closing.is_alive()


def test_a_stage_that_cannot_be_started_again_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the memory that it has ended for lack of is not there for a new process either."""
    client = StageClient(stage(1, 1, 1))
    client.wait_ready(HANG)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(client_module, "start_interpreter", refuse)
    os.kill(client._process.pid, signal.SIGKILL)
    eventually(lambda: client.error is not None)
    with pytest.raises(WorkerDied, match=r"cannot be started again .*Cannot allocate memory"):
        client.submit(ToyPlan())
    assert client.status().state == "failed"
    client.close()


def test_who_hears_of_the_end_of_a_closed_stage_may_cancel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage itself does not tell: it is stopped, and killed at once."""
    monkeypatch.setattr("vllm_cosmos3.stage.client.STOP_SECONDS", 0.0)
    client = StageClient(stage(1, 1, 1))
    raised: list[BaseException] = []

    def cancel(job: StageJob) -> None:
        try:
            job.cancel()
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            raised.append(error)

    job = client.submit(ToyPlan(gates={"encode": Gate(tmp_path)}))  # which nobody opens
    job.future.add_done_callback(lambda _: cancel(job))
    os.kill(client._process.pid, signal.SIGSTOP)
    client.close()
    with pytest.raises(WorkerDied, match="the stage was closed"):
        job.result(HANG)
    assert not raised


def test_why_it_cannot_start_reaches_a_client_that_is_late_to_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = client_module.start_interpreter

    def late(environment: Mapping[str, str], told: bytes) -> Any:
        process = start(environment, told)
        poll = process.poll

        def looked_at_last() -> int | None:
            eventually(lambda: poll() is not None)
            return poll()

        monkeypatch.setattr(process, "poll", looked_at_last)
        return process

    monkeypatch.setattr(client_module, "start_interpreter", late)
    client = StageClient(stage(model=tmp_path / "none"))
    with pytest.raises(CheckpointError, match="none is missing"):
        client.wait_ready(HANG)
    client.close()


def test_why_it_cannot_start_reaches_a_client_that_is_late_to_connect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = StageClient._connect

    def late(client: StageClient) -> Any:
        end = time.monotonic() + 2  # longer than a forked stage takes to fail
        while client._process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        return connect(client)

    monkeypatch.setattr(StageClient, "_connect", late)
    client = StageClient(stage(model=tmp_path / "none"))
    with pytest.raises(CheckpointError, match="none is missing"):
        client.wait_ready(HANG)
    client.close()


def test_why_it_cannot_start_reaches_a_client_that_is_late_to_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where ZeroMQ's own thread had no processor until the stage had ended."""
    connect = StageClient._connect

    def late(client: StageClient) -> Any:
        stage, until = connect(client), float("inf")
        poll = stage.poll

        def delivered_later(milliseconds: int) -> int:
            nonlocal until
            until = min(until, time.monotonic() + 0.5)
            time.sleep(min(milliseconds / 1000, max(0.0, until - time.monotonic())))
            return poll(milliseconds) if time.monotonic() >= until else 0

        monkeypatch.setattr(stage, "poll", delivered_later)
        return stage

    def nothing_yet(*_: object) -> set[object]:
        time.sleep(0.05)
        return set()

    monkeypatch.setattr(StageClient, "_connect", late)
    monkeypatch.setattr(StageClient, "_poll", nothing_yet)
    client = StageClient(stage(model=tmp_path / "none"))
    with pytest.raises(CheckpointError, match="none is missing"):
        client.wait_ready(HANG)
    client.close()


def test_a_full_queue_is_busy(client: StageClient) -> None:
    slow = ToyPlan(steps=10_000, seconds=0.01)
    jobs: list[StageJob] = [client.submit(slow, seconds=LONG)]
    eventually(lambda: client.status().running == 1)
    jobs += [client.submit(slow, seconds=LONG) for _ in range(6)]
    with pytest.raises(Busy, match="6 of 6"):
        client.submit(slow, seconds=LONG)
    status = client.status()
    assert (status.state, status.running, status.waiting) == ("ready", 1, 6)
    assert [job.position for job in jobs[1:]] == [0, 1, 2, 3, 4, 5]
    for job in jobs:
        job.cancel()
    for job in jobs:
        with pytest.raises(Cancelled):
            job.result(HANG)


def test_a_deadline_ends_waiting_and_running_requests(client: StageClient) -> None:
    slow = ToyPlan(steps=10_000, seconds=0.01)
    running = client.submit(slow, seconds=LONG, deadline=2.0)
    waiting = client.submit(slow, seconds=LONG, deadline=1.0)
    for job in (waiting, running):
        with pytest.raises(DeadlineExceeded):
            job.result(HANG)


@contextmanager
def hanging_call(client: StageClient, deadline: float | None = None) -> Iterator[StageJob]:
    """A request whose first call does not end within the block, as a rank is stopped."""
    rank = client.submit(ToyPlan(steps=1)).result(HANG).pids[-1]
    os.kill(rank, signal.SIGSTOP)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("vllm_cosmos3.stage.client.SILENT_SECONDS", HANG)
            yield client.submit(
                ToyPlan(steps=10_000, seconds=0.01), seconds=LONG, deadline=deadline
            )
    finally:
        os.kill(rank, signal.SIGCONT)
    eventually(lambda: not client.silent)


@pytest.mark.parametrize("how", ["cancelled", "out of time"])
def test_what_waits_leaves_the_queue_while_a_call_runs(how: str, client: StageClient) -> None:
    deadline = 1.0 if how == "out of time" else None
    with hanging_call(client) as running:
        eventually(lambda: client.status().call == "encode")
        waiting = [client.submit(ToyPlan(), seconds=LONG, deadline=deadline) for _ in range(6)]
        if how == "cancelled":
            with pytest.raises(Busy):
                client.submit(ToyPlan(), seconds=LONG)
            for job in waiting:
                job.cancel()
        for job in waiting:
            with pytest.raises(Cancelled if how == "cancelled" else DeadlineExceeded):
                job.result(HANG)
        accepted = client.submit(ToyPlan(), seconds=LONG)
        assert accepted.position == 0
        assert not running.future.done()
        running.cancel()
    assert accepted.result(HANG).total == 6


def test_deadlines_are_kept_while_a_rank_hangs(client: StageClient) -> None:
    """Of the request whose call hangs and of those that wait; afterwards nothing of them is left."""
    restarts = client.status().restarts
    with hanging_call(client, deadline=1.0) as running:
        waiting = client.submit(ToyPlan(steps=1), seconds=LONG, deadline=2.0)
        for job in (running, waiting):
            with pytest.raises(DeadlineExceeded):
                job.result(HANG)
        status = client.status()
        assert (status.call, status.waiting) == ("encode", 0)
        assert status.call_seconds > 1
        assert client.last_sign_of_life() > 1
    assert client.submit(ToyPlan(steps=1)).result(HANG).total == 2
    assert client.status().restarts == restarts


@pytest.mark.parametrize("who", ["stage", "rank"])
def test_a_silent_stage_is_noticed_and_refuses(
    who: str, client: StageClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = client.submit(ToyPlan(steps=1)).result(HANG).pids[-1]
    stopped = client._process.pid if who == "stage" else rank
    os.kill(stopped, signal.SIGSTOP)
    monkeypatch.setattr("vllm_cosmos3.stage.client.SILENT_SECONDS", 6.0)
    try:
        eventually(lambda: client.silent)
        with pytest.raises(WorkerDied, match="no sign of life"):
            client.submit(ToyPlan())
        assert client.status(HANG).state == "ready"  # as it was last heard, at once
    finally:
        monkeypatch.undo()
        os.kill(stopped, signal.SIGCONT)
    eventually(lambda: not client.silent)
    assert client.submit(ToyPlan(steps=1)).result(HANG).total == 2


def test_a_stage_that_does_not_accept_is_not_waited_for(
    client: StageClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_cosmos3.stage.client.ACCEPT_SECONDS", 0.5)
    os.kill(client._process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(WorkerDied, match="did not answer"):
            client.submit(ToyPlan(steps=10_000, seconds=0.01), seconds=LONG)
    finally:
        os.kill(client._process.pid, signal.SIGCONT)
    monkeypatch.undo()
    assert client.submit(ToyPlan(steps=1)).result(HANG).total == 2
    eventually(lambda: client.status().running == 0)  # it was never made


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("all", Cosmos3Error),
        ("invalid", InvalidRequest),
        ("memory", OutOfMemory),
        ("memory one", OutOfMemory),
        ("one", Cosmos3Error),
        ("kill", WorkerDied),
    ],
)
@pytest.mark.parametrize("moment", ["encode", "step 1", "decode", "finish"])
def test_a_fault_fails_its_request_only(
    fault: str, kind: type[Cosmos3Error], moment: str, impatient: StageClient
) -> None:
    beside = impatient.submit(ToyPlan(steps=20, seconds=0.005), seconds=LONG)
    bad = impatient.submit(ToyPlan(faults={moment: fault}))
    with pytest.raises(Cosmos3Error) as failure:
        bad.result(HANG)
    assert type(failure.value) is kind
    assert beside.result(HANG).total == 40
    assert impatient.submit(ToyPlan(steps=1)).result(HANG).total == 2


def test_a_request_without_room_beside_others_waits_for_them(
    client: StageClient, tmp_path: Path
) -> None:
    gate = Gate(tmp_path)
    plan = ToyPlan(steps=40, gates={"encode": gate})
    beside = client.submit(plan, seconds=LONG)
    order: list[str] = []
    beside.future.add_done_callback(lambda _: order.append("beside"))
    crowded = client.submit(ToyPlan(steps=1, faults={"encode": "crowded"}), seconds=1.0)
    crowded.future.add_done_callback(lambda _: order.append("crowded"))
    gate.open()
    assert crowded.result(HANG).total == 2
    assert beside.result(HANG).total == 80
    eventually(lambda: len(order) == 2)
    assert order == ["beside", "crowded"]


def test_a_killed_stage_process_is_replaced_and_its_workers_end(client: StageClient) -> None:
    hanging = client.submit(ToyPlan(faults={"step 1": "hang"}))
    eventually(lambda: hanging.progress is not None and hanging.progress.step == 1)
    killed = client._process.pid
    pids = processes_below(killed)
    segments = segments_of(pids)
    os.kill(killed, signal.SIGKILL)
    with pytest.raises(WorkerDied, match="status -9"):
        hanging.result(HANG)
    assert len(pids) >= 3
    assert len(segments) >= 3  # the ring of calls and two of answers
    assert not remaining(pids, segments)
    client.wait_ready(HANG)
    assert client.submit(ToyPlan(steps=1)).result(HANG).total == 2


SCRIPT = """
import sys, time
sys.path[:0] = {paths!r}
from vllm_cosmos3.imports import end_at_once
end_at_once()
from toy_plan import Gate, ToyPlan, stage
from vllm_cosmos3.stage.client import StageClient
client = StageClient(stage(1, 2, 1))
client.wait_ready(600)
print(client._folder, client._process.pid, flush=True)
process, gate = client._process, Gate(client._folder)
plan = ToyPlan(gates={{"step 1": gate}})
jobs = [client.submit(plan, seconds=1000.0) for _ in range(2)]
while client.status().running == 0:
    time.sleep(0.01)
print("running", flush=True)
{ending}
"""


def script(ending: str) -> tuple[subprocess.Popen[str], Path, int]:
    """A program without a main guard that serves two requests; its folder and stage process."""
    here = Path(__file__).parent
    text = SCRIPT.format(paths=[str(here), str(here.parent)], ending=ending)
    program = subprocess.Popen(
        [sys.executable, "-c", text], stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert program.stdout is not None
    line = program.stdout.readline()
    if program.stdout.readline() != "running\n":
        program.kill()
        program.communicate()
        raise AssertionError(line)
    folder, pid = line.split()
    return program, Path(folder), int(pid)


def test_a_program_killed_takes_its_stage_with_it() -> None:
    program, folder, pid = script("time.sleep(600)")
    pids = {pid} | processes_below(pid)
    segments = segments_of(pids)
    program.kill()
    program.communicate()
    assert len(pids) >= 3
    assert len(segments) >= 3
    assert not remaining(pids, {folder, *segments})


def test_sigterm_drains() -> None:
    program, folder, _ = script(
        "import os, signal\n"
        "os.kill(process.pid, signal.SIGTERM)\n"
        "while client.status().state != 'draining':\n"
        "    time.sleep(0.01)\n"
        "try:\n"
        "    client.submit(ToyPlan())\n"
        "except Exception as error:\n"
        "    print(type(error).__name__)\n"
        "gate.open()\n"
        "print([job.result().total for job in jobs])\n"
        "print(process.wait())\n"
    )
    output, _ = program.communicate(timeout=HANG)
    assert output.splitlines() == ["Busy", "[6, 6]", "0"]
    assert not folder.exists()
