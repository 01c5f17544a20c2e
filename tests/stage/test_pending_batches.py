"""Batching of concurrent requests in one process: which share steps, and the result of each."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Event
from typing import Any

import pytest
import torch
from toy_plan import ToyPlan, stage
from toy_stage import Toy

from vllm_cosmos3.errors import Cancelled, InvalidRequest
from vllm_cosmos3.parallel.mesh import close_mesh, init_mesh
from vllm_cosmos3.progress import Progress, Report
from vllm_cosmos3.request.plan import Batch
from vllm_cosmos3.stage.batching import BatchedRequest, PendingBatches, RunAlone
from vllm_cosmos3.stage.call_sequence import CallSequence

BATCH = Batch(key="toy", size=4)
FINE = ToyPlan()


@pytest.fixture(scope="module")
def toy() -> Iterator[Toy]:
    mesh = init_mesh(stage().engine.parallel)
    yield Toy(mesh, torch.device("cpu"))
    close_mesh(mesh)


def request(plan: ToyPlan = FINE, report: Report = lambda _: None) -> BatchedRequest:
    return BatchedRequest(CallSequence(plan), report, Event())


def made(toy: Toy, *requests: BatchedRequest) -> list[Any]:
    """The result of each request of a batch: the batch size of each step, or the error."""
    pending = PendingBatches()
    opened = pending.add(BATCH, requests[0])
    assert opened is not None
    assert [pending.add(BATCH, one) for one in requests[1:]] == [None] * (len(requests) - 1)
    pending.run(BATCH, opened, toy)
    assert all(one.state is None for one in requests)
    return [one.future.exception() or one.future.result().batch_sizes for one in requests]


def test_requests_that_are_there_share_their_steps(toy: Toy) -> None:
    assert made(toy, *(request() for _ in range(3))) == [(3, 3, 3)] * 3


def test_a_full_batch_takes_no_more(toy: Toy) -> None:
    pending, requests = PendingBatches(), [request() for _ in range(5)]
    first = pending.add(BATCH, requests[0])
    assert [pending.add(BATCH, one) for one in requests[1:4]] == [None] * 3
    second = pending.add(BATCH, requests[4])
    assert (first, second) == (requests[:4], requests[4:])
    other = pending.add(Batch(key="other", size=4), request())
    assert other is not None
    for opened in (first, second):
        pending.run(BATCH, opened, toy)
    assert [one.future.result().batch_sizes[0] for one in requests] == [4, 4, 4, 4, 1]


def test_one_that_fails_by_itself_leaves_the_others_alone(toy: Toy) -> None:
    def stop(progress: Progress) -> None:
        if progress.step == 1:
            raise ZeroDivisionError

    gone = request()
    gone.cancelled.set()
    invalid = request(ToyPlan(faults={"encode": "invalid"}))
    results = made(toy, invalid, request(report=stop), gone, request())
    assert list(map(type, results)) == [InvalidRequest, ZeroDivisionError, Cancelled, tuple]
    assert results[3] == (2, 1, 1)
    late = request(ToyPlan(faults={"decode": "all"}))
    failed, fine = made(toy, late, request())
    assert "all ranks fail" in str(failed)
    assert fine == (2, 2, 2)


def test_requests_of_a_step_that_fails_are_to_run_alone(toy: Toy) -> None:
    broken = request(ToyPlan(faults={"step 1": "all"}))
    assert list(map(type, made(toy, request(), broken, request()))) == [RunAlone] * 3


@pytest.mark.parametrize("moment", ["encode", "decode"])
def test_without_the_memory_for_all_one_is_to_run_alone(toy: Toy, moment: str) -> None:
    large = request(ToyPlan(faults={moment: "memory"}))
    left, fine = made(toy, large, request())
    assert isinstance(left, RunAlone)
    assert fine == ((1, 1, 1) if moment == "encode" else (2, 2, 2))
