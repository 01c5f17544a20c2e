"""Companies of requests in one process: who shares steps, and what becomes of each."""

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
from vllm_cosmos3.stage.call_sequence import CallSequence
from vllm_cosmos3.stage.company import Apart, Companies, Guest

BATCH = Batch(key="toy", size=4)
FINE = ToyPlan()


@pytest.fixture(scope="module")
def toy() -> Iterator[Toy]:
    mesh = init_mesh(stage().engine.parallel)
    yield Toy(mesh, torch.device("cpu"))
    close_mesh(mesh)


def guest(plan: ToyPlan = FINE, report: Report = lambda _: None) -> Guest:
    return Guest(CallSequence(plan), report, Event())


def made(toy: Toy, *guests: Guest) -> list[Any]:
    """What each of a company got: how many made each step, or the error."""
    companies = Companies()
    company = companies.join(BATCH, guests[0])
    assert company is not None
    assert [companies.join(BATCH, one) for one in guests[1:]] == [None] * (len(guests) - 1)
    companies.make(BATCH, company, toy)
    assert all(one.state is None for one in guests)
    return [one.future.exception() or one.future.result().company for one in guests]


def test_requests_that_are_there_share_their_steps(toy: Toy) -> None:
    assert made(toy, *(guest() for _ in range(3))) == [(3, 3, 3)] * 3


def test_a_full_company_takes_nobody(toy: Toy) -> None:
    companies, guests = Companies(), [guest() for _ in range(5)]
    first = companies.join(BATCH, guests[0])
    assert [companies.join(BATCH, one) for one in guests[1:4]] == [None] * 3
    second = companies.join(BATCH, guests[4])
    assert (first, second) == (guests[:4], guests[4:])
    other = companies.join(Batch(key="other", size=4), guest())
    assert other is not None
    for company in (first, second):
        companies.make(BATCH, company, toy)
    assert [one.future.result().company[0] for one in guests] == [4, 4, 4, 4, 1]


def test_who_fails_by_itself_spoils_nothing(toy: Toy) -> None:
    def stop(progress: Progress) -> None:
        if progress.step == 1:
            raise ZeroDivisionError

    gone = guest()
    gone.cancelled.set()
    invalid = guest(ToyPlan(faults={"encode": "invalid"}))
    results = made(toy, invalid, guest(report=stop), gone, guest())
    assert list(map(type, results)) == [InvalidRequest, ZeroDivisionError, Cancelled, tuple]
    assert results[3] == (2, 1, 1)
    late = guest(ToyPlan(faults={"decode": "all"}))
    failed, fine = made(toy, late, guest())
    assert "all ranks fail" in str(failed)
    assert fine == (2, 2, 2)


def test_a_step_that_fails_is_made_again_apart(toy: Toy) -> None:
    broken = guest(ToyPlan(faults={"step 1": "all"}))
    assert list(map(type, made(toy, guest(), broken, guest()))) == [Apart] * 3


@pytest.mark.parametrize("moment", ["encode", "decode"])
def test_without_the_memory_for_all_one_is_made_apart(toy: Toy, moment: str) -> None:
    large = guest(ToyPlan(faults={moment: "memory"}))
    left, fine = made(toy, large, guest())
    assert isinstance(left, Apart)
    assert fine == ((1, 1, 1) if moment == "encode" else (2, 2, 2))
