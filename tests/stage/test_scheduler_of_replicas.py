"""The scheduler of several replicas, on the clock of the simulation: nothing lost, nobody starved."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fleet import KINDS, STEPS, Arrival, Cost, Fleet, Kind, simulate, table
from vllm_cosmos3.stage.scheduler import QueueConfig, Scheduler

LAYOUTS = st.sampled_from([(1,), (1, 1), (1, 1, 1), (4, 1, 1)])
SECONDS = st.sampled_from([0.5, 3.0, 19.0, 100.0, 900.0])
LOADS = st.lists(st.tuples(SECONDS, st.floats(0, 60)), min_size=1, max_size=25)


def requests(load: list[tuple[float, float]]) -> list[Arrival]:
    """Requests of so many seconds on one GPU, each so long after the one before it."""
    now, made = 0.0, []
    for index, (seconds, after) in enumerate(load):
        now += after
        costs = {gpus: Cost(step=seconds / STEPS / gpus, rest=0.0) for gpus in (1, 4)}
        made.append(Arrival(str(index), Kind(name="any", tokens=1, share=1, costs=costs), now))
    return made


@given(LOADS, LAYOUTS, st.integers(1, 4), st.sampled_from(["fifo", "short-first"]))
def test_nothing_is_lost_and_no_replica_idles_while_something_waits(
    load: list[tuple[float, float]], layout: tuple[int, ...], residents: int, policy: str
) -> None:
    config = QueueConfig(max_resident=residents, policy=policy)
    fleet, asked = Fleet(layout, config, exact=True), requests(load)
    for _ in fleet.events(asked):
        (queue,) = fleet.queues
        assert not (queue.waiting and fleet.idle)
        for at in range(len(layout)):
            assert len(queue.residents(at)) <= (1 if policy == "fifo" else residents)
    assert all(one.ended is not None and not one.calls for one in asked)
    work = sum(one.kind.costs[layout[one.replica or 0]].seconds * layout[one.replica or 0] for one in asked)  # fmt: skip
    assert abs(fleet.busy_gpu_seconds - work) < 1e-6 * (1 + work)


@given(LOADS, LAYOUTS)
def test_robots_are_served_in_the_order_of_arrival(
    load: list[tuple[float, float]], layout: tuple[int, ...]
) -> None:
    asked = requests(load)
    Fleet(layout, QueueConfig(policy="fifo"), exact=True).run(asked)
    started = [one.started or 0.0 for one in asked]
    assert started == sorted(started)


@given(LOADS, LAYOUTS, st.integers(1, 4), st.integers(0, 4))
def test_nobody_is_passed_over_for_ever(
    load: list[tuple[float, float]], layout: tuple[int, ...], residents: int, passed: int
) -> None:
    fleet = Fleet(layout, QueueConfig(max_resident=residents, max_passed=passed), exact=True)
    asked = requests(load)
    for _ in fleet.events(asked):
        entries = [*fleet.queues[0].waiting, *fleet.queues[0].resident]
        assert all(entry.passed <= passed for entry in entries)
        for at in range(len(layout)):
            long = [e for e in fleet.queues[0].residents(at) if e.seconds > 20.0]
            assert len(long) <= 1
    long = [one.started or 0.0 for one in asked if min(c.seconds for c in one.kind.costs.values()) > 20]  # fmt: skip
    if len(set(layout)) == 1:
        assert long == sorted(long)


def admitted(scheduler: Scheduler) -> list[int | None]:
    """Admit all that fits; where each went."""
    places = []
    while (name := scheduler.admit()) is not None:
        places.append(scheduler.replica_of(name))
    return places


def test_a_request_goes_where_it_is_done_first() -> None:
    scheduler = Scheduler(QueueConfig(), 3)
    for name, seconds in (("a", 900.0), ("b", 900.0), ("c", 900.0)):
        scheduler.submit(name, seconds)
    assert admitted(scheduler) == [0, 1, 2]
    scheduler.progress("b", 0.999)
    scheduler.submit("image", 5.0)
    assert admitted(scheduler) == [1]  # whose long one is nearly done
    scheduler.remove("c")
    scheduler.submit("another", 5.0)
    assert admitted(scheduler) == [2]
    fast_and_slow = Scheduler(QueueConfig(), 2)
    fast_and_slow.submit("video", [190.0, 50.0])
    assert admitted(fast_and_slow) == [1]


def test_a_closed_replica_gets_nothing() -> None:
    scheduler = Scheduler(QueueConfig(policy="fifo"), 2)
    scheduler.closed = {0}
    for name in "abc":
        scheduler.submit(name, 1.0)
    assert admitted(scheduler) == [1]
    scheduler.readmit("a")  # it was lost with its replica
    scheduler.closed = {1}
    assert admitted(scheduler) == [0]
    assert scheduler.replica_of("a") == 0


def test_ours_is_ahead_of_round_robin_on_a_mixed_load() -> None:
    rows = {(row.layout, row.routing): row for row in simulate([8], 10, 0.9, seed=0)}
    for layout in ("replicas: 8 x 1", "mixed: 1 x 4, 4 x 1"):
        ours, blind = rows[layout, "ours"], rows[layout, "round robin"]
        assert ours.makespan <= 0.85 * blind.makespan
    shown = table(list(rows.values())).splitlines()
    assert len(shown) == 2 + 7
    assert "| ours | ~" in shown[2]  # eight GPUs were never measured
    assert all(kind.costs[1].measured for kind in KINDS)
