"""Requests on a fleet: a simulation of 1, 8 and 64 GPUs with measured costs, and 1 and 2 replicas for real.

    python benchmarks/fleet.py                          # the simulation
    python benchmarks/fleet.py --checkpoint CHECKPOINT  # and a list of videos on replicas of this machine

The simulation is the scheduler of the server, `vllm_cosmos3.stage.scheduler`, with a clock of its own: a
replica makes one call after the other, steps cannot be interrupted, and costs are estimated as the
server learns them. "Round robin" gives each arrival to the next replica, each with a queue and a
scheduler of its own, as a proxy does in front of as many servers.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from machine import heading, provenance
from vllm_cosmos3.server.jobs.estimates import ThroughputEstimate
from vllm_cosmos3.stage.scheduler import QueueConfig, Scheduler

STEPS, BRANCHES = 35, 2
PROJECTED = "~"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Seconds of a request on one replica: those of a step, and of all else."""

    step: float
    rest: float
    measured: bool = True

    @property
    def seconds(self) -> float:
        return STEPS * self.step + self.rest

    def calls(self) -> list[float]:
        """The calls that a request takes, one turn each."""
        return [self.step] * STEPS + [self.rest]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What is asked for: its share of the requests, and its costs by the GPUs of a replica."""

    name: str
    tokens: int
    share: float
    costs: dict[int, Cost]

    @property
    def work(self) -> float:
        """As the server counts it."""
        return float(self.tokens * STEPS * BRANCHES)


def _shared(step: float, rest: float, *gains: tuple[int, float, float, bool]) -> dict[int, Cost]:
    """Costs on one GPU, and on more by what they gain in a step and in the rest."""
    more = {
        gpus: Cost(step=step / faster, rest=rest / rest_faster, measured=measured)
        for gpus, faster, rest_faster, measured in gains
    }
    return {1: Cost(step=step, rest=rest)} | more


# docs/numbers.md, Nano: seconds on one H100, gains of 2x2x1 on four H200. Eight GPUs, and images on
# several, are projected: small requests gain no more than from the two branches of guidance, or nothing.
KINDS = (
    Kind(name="image 320x192", tokens=60, share=0.4, costs=_shared(0.0077, 0.06, (4, 1, 1, False), (8, 1, 1, False))),
    Kind(name="image 1280x720", tokens=920, share=0.2, costs=_shared(0.0456, 0.11, (4, 2, 1, False), (8, 2, 1, False))),
    Kind(name="video 320x192", tokens=2_880, share=0.3, costs=_shared(0.154, 0.46, (4, 2.89, 1, True), (8, 2.89, 1, False))),
    Kind(name="video 1280x720", tokens=44_160, share=0.1, costs=_shared(5.306, 6.3, (4, 3.76, 3.5, True), (8, 7.2, 4.8, False))),
)  # fmt: skip
Layout = tuple[int, ...]  # the GPUs of each replica
FLEETS: dict[int, dict[str, Layout]] = {
    1: {"1 x 1": (1,)},
    8: {
        "meshes: 1 x 8": (8,),
        "meshes: 2 x 4": (4, 4),
        "replicas: 8 x 1": (1,) * 8,
        "mixed: 1 x 4, 4 x 1": (4, 1, 1, 1, 1),
    },
    64: {
        "meshes: 8 x 8": (8,) * 8,
        "meshes: 16 x 4": (4,) * 16,
        "replicas: 64 x 1": (1,) * 64,
        "mixed: 8 x 4, 32 x 1": (4,) * 8 + (1,) * 32,
    },
}


@dataclass(slots=True, eq=False)
class Arrival:
    """A request: when it comes, and what became of it."""

    name: str
    kind: Kind
    at: float
    started: float | None = None
    ended: float | None = None
    replica: int | None = None
    calls: list[float] = field(default_factory=list)  # still to be made


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """How a load went. Seconds; waits are from the arrival to the first call."""

    gpus: int
    layout: str
    routing: str
    makespan: float
    wait_p50: float
    wait_p99: float
    latency_p50: float
    latency_p99: float
    gpu_seconds: float  # a request
    measured: bool


def arrivals(count: int, rate: float, seed: int, kinds: Sequence[Kind] = KINDS) -> list[Arrival]:
    """Poisson arrivals of so many requests a second."""
    chance, now, made = random.Random(seed), 0.0, []
    shares = [kind.share for kind in kinds]
    for index in range(count):
        now += chance.expovariate(rate)
        made.append(Arrival(str(index), chance.choices(kinds, shares)[0], now))
    return made


class Fleet:
    """Replicas of a layout in a time of their own. ``queues`` serve ``[first, last)`` of them each."""

    def __init__(
        self, layout: Layout, config: QueueConfig, *, routing: str = "ours", exact: bool = False
    ) -> None:
        together = routing == "ours"
        sizes = [layout] if together else [(gpus,) for gpus in layout]
        self.queues = [Scheduler(config, len(some)) for some in sizes]
        self._layout, self._exact = layout, exact
        self._next = itertools.cycle(range(len(self.queues)))
        self._places = [(0, at) if together else (at, 0) for at in range(len(layout))]
        self._rates = {gpus: ThroughputEstimate() for gpus in layout}
        self._requests: dict[str, Arrival] = {}
        self._working: dict[int, tuple[Arrival, float]] = {}  # replica -> its call, and its seconds
        self.busy_gpu_seconds = 0.0

    def run(self, requests: Sequence[Arrival]) -> float:
        """Serve all. When the last one has ended; each is told what became of it."""
        for _ in self.events(requests):
            pass
        return max((one.ended or 0.0 for one in requests), default=0.0)

    def events(self, requests: Sequence[Arrival]) -> Iterator[float]:
        """The same, one event after the other: an arrival, or the end of a call."""
        order = itertools.count()
        pending = [(one.at, next(order), one, None) for one in requests]
        heap: list[tuple[float, int, Arrival | None, int | None]] = list(pending)
        heapq.heapify(heap)
        while heap:
            now, _, arrived, replica = heapq.heappop(heap)
            if arrived is not None:
                self._submit(arrived)
            if replica is not None:
                self._end_call(replica, now)
            for at, seconds in self._start_calls(now):
                heapq.heappush(heap, (now + seconds, next(order), None, at))
            yield now

    @property
    def idle(self) -> set[int]:
        """The replicas that make no call."""
        return set(range(len(self._layout))) - self._working.keys()

    def _submit(self, request: Arrival) -> None:
        place = next(self._next)
        served = [at for at, (queue, _) in enumerate(self._places) if queue == place]
        self._requests[request.name] = request
        self.queues[place].submit(request.name, [self._estimate(request, at) for at in served])

    def _estimate(self, request: Arrival, replica: int) -> float:
        gpus = self._layout[replica]
        if self._exact:
            return request.kind.costs[gpus].seconds
        return self._rates[gpus].seconds(request.kind.work)

    def _start_calls(self, now: float) -> list[tuple[int, float]]:
        started = []
        for index, queue in enumerate(self.queues):
            while (name := queue.admit()) is not None:
                at = self._places.index((index, queue.replica_of(name) or 0))
                request = self._requests[name]
                request.replica = at
                request.calls = request.kind.costs[self._layout[at]].calls()
        for at in sorted(self.idle):
            queue, place = self._places[at]
            turn = self.queues[queue].turn(place)
            if turn is None:
                continue
            request = self._requests[turn]
            if request.started is None:
                request.started = now
            seconds = request.calls.pop(0)
            self._working[at] = (request, seconds)
            self.busy_gpu_seconds += seconds * self._layout[at]
            started.append((at, seconds))
        return started

    def _end_call(self, replica: int, now: float) -> None:
        request, seconds = self._working.pop(replica)
        queue = self.queues[self._places[replica][0]]
        queue.charge(request.name, seconds)
        gpus = self._layout[replica]
        cost = request.kind.costs[gpus]
        done = 1 - sum(request.calls) / cost.seconds
        queue.progress(request.name, done)
        assert request.started is not None
        if request.calls:
            self._rates[gpus].observe_partial(request.kind.work, done, now - request.started)
            return
        request.ended = now
        self._rates[gpus].observe(request.kind.work, now - request.started)
        queue.remove(request.name)


def measure(gpus: int, name: str, routing: str, count: int, load: float, seed: int) -> Row:
    """One layout under a load, which is relative to what one-GPU replicas can do."""
    layout = FLEETS[gpus][name]
    mean = sum(kind.share * kind.costs[1].seconds for kind in KINDS)
    requests = arrivals(count, load * gpus / mean, seed)
    fleet = Fleet(layout, QueueConfig(max_waiting=count, max_waiting_seconds=1e12), routing=routing)
    makespan = fleet.run(requests)
    waits = [one.started - one.at for one in requests if one.started is not None]
    latencies = [one.ended - one.at for one in requests if one.ended is not None]
    assert len(latencies) == count
    return Row(
        gpus=gpus,
        layout=name,
        routing=routing,
        makespan=makespan,
        wait_p50=statistics.median(waits),
        wait_p99=_percentile(waits, 99),
        latency_p50=statistics.median(latencies),
        latency_p99=_percentile(latencies, 99),
        gpu_seconds=fleet.busy_gpu_seconds / count,
        measured=all(kind.costs[size].measured for kind in KINDS for size in layout),
    )


def simulate(gpus: Sequence[int], requests: int, load: float, seed: int) -> list[Row]:
    """All layouts of so many GPUs, ours and round robin; ``requests`` for each GPU."""
    return [
        measure(number, name, routing, requests * number, load, seed)
        for number in gpus
        for name, layout in FLEETS[number].items()
        for routing in (("ours", "round robin") if len(layout) > 1 else ("ours",))
    ]


def table(rows: Sequence[Row]) -> str:
    """Markdown; ~ marks rows with a projected cost."""
    lines = [
        "| GPUs | layout | routing | makespan s | wait p50 / p99 s | latency p50 / p99 s | GPU-seconds a request |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        mark = "" if row.measured else PROJECTED
        cells = [
            str(row.gpus),
            row.layout,
            row.routing,
            f"{mark}{row.makespan:,.0f}",
            f"{mark}{row.wait_p50:.1f} / {row.wait_p99:,.0f}",
            f"{mark}{row.latency_p50:.1f} / {row.latency_p99:,.0f}",
            f"{mark}{row.gpu_seconds:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def on_this_machine(checkpoint: Path, device: str, counts: Sequence[int], repeat: int) -> str:
    """Seconds of a list of videos on so many replicas, the second list of each."""
    from vllm_cosmos3 import Cosmos3

    fields = {"size": "320x192", "num_frames": 25, "num_inference_steps": 8}
    lines = ["| replicas | videos | seconds | videos a minute |", "|---|---|---|---|"]
    for count in counts:
        with Cosmos3(checkpoint, device=device, data_parallel_size=count, progress=False) as model:
            requests = [{"prompt": "a boat", "seed": seed, **fields} for seed in range(repeat)]
            model.generate(requests[:count])
            start = time.perf_counter()
            model.generate(requests)
            seconds = time.perf_counter() - start
        lines.append(f"| {count} | {repeat} | {seconds:.1f} | {60 * repeat / seconds:.1f} |")
    return "\n".join(lines)


def _percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, nargs="+", default=list(FLEETS), choices=FLEETS)
    parser.add_argument("--requests", type=int, default=40, help="for each GPU")
    parser.add_argument("--load", type=float, default=0.9, help="of what one-GPU replicas can do")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--checkpoint", type=Path, help="also make videos on replicas of this machine"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeat", type=int, default=12, help="videos of the list")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    facts = provenance(torch.device(args.device))
    rows = simulate(args.gpus, args.requests, args.load, args.seed)
    print(heading(facts), table(rows), sep="\n\n")
    if args.checkpoint is not None:
        print(
            "", on_this_machine(args.checkpoint, args.device, args.replicas, args.repeat), sep="\n"
        )
    if args.json is not None:
        args.json.write_text(
            json.dumps({"facts": facts, "rows": [asdict(r) for r in rows]}, indent=2)
        )


if __name__ == "__main__":
    main()
