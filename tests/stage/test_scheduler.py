"""The scheduler: order, bounds, fairness."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_cosmos3.errors import Busy, InvalidRequest
from vllm_cosmos3.request.plan import Batch
from vllm_cosmos3.stage.scheduler import QueueConfig, Scheduler

ALONE = Batch(key=None, size=1)
WORK = st.lists(st.sampled_from([1.0, 5.0, 19.0, 100.0, 900.0]), min_size=1, max_size=30)


def submitted(config: QueueConfig, work: list[float]) -> Scheduler:
    scheduler = Scheduler(config)
    for index, seconds in enumerate(work):
        scheduler.submit(str(index), seconds)
    return scheduler


def finish_all(scheduler: Scheduler) -> list[str]:
    """Admit all that fits, then end the request whose turn it is; the order of admission."""
    admitted = []
    while scheduler.waiting or scheduler.resident:
        while (name := scheduler.admit()) is not None:
            admitted.append(name)
        turn = scheduler.turn()
        assert turn is not None
        scheduler.charge(turn, 1.0)
        scheduler.remove(turn)
    return admitted


@given(WORK)
def test_fifo_keeps_the_order(work: list[float]) -> None:
    scheduler = submitted(QueueConfig(policy="fifo"), work)
    assert finish_all(scheduler) == [str(i) for i in range(len(work))]


@given(WORK, st.integers(1, 5), st.integers(0, 4))
def test_short_first_serves_all_and_passes_over_nobody_for_ever(
    work: list[float], residents: int, passed: int
) -> None:
    config = QueueConfig(max_resident=residents, max_passed=passed)
    scheduler = submitted(config, work)
    entries = list(scheduler.waiting)
    order = finish_all(scheduler)
    assert sorted(order) == sorted(str(i) for i in range(len(work)))
    # While a long request is resident others have to wait whatever they were promised.
    assert all(e.passed <= passed for e in entries if e.seconds <= config.short_seconds)
    long = [name for name in order if work[int(name)] > config.short_seconds]
    assert long == sorted(long, key=int)


@given(WORK, st.integers(2, 5))
def test_at_most_one_long_request_is_resident(work: list[float], residents: int) -> None:
    scheduler = submitted(QueueConfig(max_resident=residents), work)
    while scheduler.admit() is not None:
        long = [e for e in scheduler.resident if e.seconds > scheduler.config.short_seconds]
        assert len(long) <= 1
        assert len(scheduler.resident) <= residents


BATCHES = [None, Batch(key="a", size=3), Batch(key="b", size=2)]


@given(st.lists(st.tuples(st.sampled_from(BATCHES), st.booleans()), max_size=30), st.data())
def test_batches_are_full_at_most_and_closed_once_they_have_begun(
    requests: list[tuple[Batch | None, bool]], data: st.DataObject
) -> None:
    """Requests come, begin and end in any order; nobody waits for ever."""
    scheduler, batches = Scheduler(QueueConfig()), dict[str, frozenset[str]]()
    for index, (batch, ends) in enumerate(requests):
        scheduler.submit(str(index), 1.0, batch)
        while (name := scheduler.admit()) is not None:
            mates = scheduler.mates(name)
            assert not batches.keys() & set(mates)  # those that have begun
            assert len(mates) <= (scheduler._resident(name).batch or ALONE).size
        groups = {entry.batch or entry.name for entry in scheduler.resident}
        assert len(groups) <= scheduler.config.max_resident
        if (name := scheduler.turn()) is not None:
            scheduler.charge(name, 1.0)
            if name not in batches:
                scheduler.begin(name)
                batches |= dict.fromkeys(scheduler.mates(name), frozenset(scheduler.mates(name)))
            assert not scheduler.has_room(name)
            assert set(scheduler.mates(name)) <= batches[name]
            if ends:
                scheduler.remove(name)
                batches.pop(name)
    done = finish_all(scheduler)
    assert not scheduler.waiting
    assert len(done) <= len(requests)


def test_what_is_to_be_alone_is_not_batched() -> None:
    scheduler = Scheduler(QueueConfig())
    for name in "abc":
        scheduler.submit(name, 1.0, BATCHES[1])
    assert [scheduler.admit() for _ in range(4)] == ["a", "b", "c", None]
    scheduler.readmit("a", alone=True)
    scheduler.begin("b")
    assert scheduler.mates("b") == ["b", "c"]
    assert scheduler.admit() is None
    scheduler.remove("b")
    scheduler.remove("c")
    scheduler.submit("d", 1.0, BATCHES[1])
    assert [scheduler.admit(), scheduler.admit()] == ["a", "d"]
    assert [scheduler.mates("a"), scheduler.mates("d")] == [["a"], ["d"]]


def test_short_requests_come_first_the_shortest_before_the_others() -> None:
    scheduler = submitted(QueueConfig(), [500.0, 400.0, 9.0, 3.0, 6.0])
    assert finish_all(scheduler) == ["3", "4", "2", "0", "1"]


def test_turns_are_shared_by_time_not_by_number() -> None:
    scheduler = submitted(QueueConfig(), [900.0])
    assert scheduler.admit() == "0"
    scheduler.charge("0", 100.0)  # it has been served for long when the other comes
    scheduler.submit("image", 2.0)
    assert scheduler.admit() == "image"
    turns = []
    for _ in range(22):
        name = scheduler.turn()
        turns.append(name)
        scheduler.charge(name, 10.0 if name == "0" else 0.5)
    assert turns.count("0") == 2
    assert turns.count("image") == 20


def test_a_readmitted_request_is_the_first_again() -> None:
    scheduler = submitted(QueueConfig(policy="fifo"), [1.0, 1.0])
    assert scheduler.admit() == "0"
    scheduler.readmit("0")
    assert [entry.name for entry in scheduler.waiting] == ["0", "1"]
    assert scheduler.position("1") == 1
    assert scheduler.admit() == "0"


def test_the_queue_is_bounded_by_number_and_by_work() -> None:
    scheduler = submitted(QueueConfig(max_waiting=2), [1.0, 1.0])
    with pytest.raises(Busy, match="2 of 2 requests wait"):
        scheduler.submit("third", 1.0)
    scheduler = submitted(QueueConfig(max_waiting_seconds=100.0), [90.0])
    with pytest.raises(Busy, match="90 of 100 seconds"):
        scheduler.submit("second", 20.0)
    scheduler.submit("small", 10.0)
    alone = submitted(QueueConfig(max_waiting_seconds=100.0), [500.0])
    assert alone.admit() == "0"  # one that is larger than the bound is served when nobody waits


@pytest.mark.parametrize("wrong", [{"policy": "lifo"}, {"max_waiting": 0}, {"max_resident": 0}])
def test_wrong_settings(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        QueueConfig(**wrong)
    assert refusal.value.field in wrong


def test_a_request_that_needs_to_be_alone_waits_for_all_but_not_for_ever() -> None:
    scheduler = submitted(QueueConfig(max_passed=2), [900.0, 5.0])
    assert [scheduler.admit(), scheduler.admit(), scheduler.admit()] == ["1", "0", None]
    scheduler.readmit("1", alone=True)
    for name in ("a", "b", "c"):
        scheduler.submit(name, 1.0)
    assert [scheduler.admit(), scheduler.admit(), scheduler.admit()] == ["a", "b", None]
    for name in ("0", "a", "b"):
        scheduler.remove(name)
    assert scheduler.admit() == "1"
    assert scheduler.admit() == "c"
