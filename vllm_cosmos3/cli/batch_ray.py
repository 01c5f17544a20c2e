"""Batch files on Ray Data: the same records, made by a pool of actors that each hold a generator.

Ray Data hands out the numbers of units; an actor reads the records themselves, makes them and writes
their results, with the same claims as everywhere, so that what passes through the driver is a line of
the index for each. It restarts actors that die and hands their units to others, which find what was
finished. Results are packed by tasks of their own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vllm_cosmos3.batch.claims import Claims
from vllm_cosmos3.batch.files import Source, Unit, input_files
from vllm_cosmos3.batch.packs import Packs
from vllm_cosmos3.batch.records import REASONER
from vllm_cosmos3.batch.store import store_at
from vllm_cosmos3.cli.batch_making import Making, Opened, Outcome
from vllm_cosmos3.cli.batch_results import Results
from vllm_cosmos3.cli.batch_samples import Checker
from vllm_cosmos3.cli.run_options import RunOptions, open_generator, planner
from vllm_cosmos3.errors import Unsupported

AT_ONCE = 4  # units that an actor is given: their outcomes come back together

Rows = Mapping[str, Any]  # a batch of Ray Data: arrays or lists by column


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What an actor has to know of a run."""

    options: RunOptions
    overrides: Mapping[str, Any]
    said: Mapping[str, Any]
    chains: Mapping[str, str]
    run: str


class Maker:
    """An actor of the pool: makes the units whose numbers it is given."""

    def __init__(self, work: Work) -> None:
        engine = replace(work.options.engine, data_parallel_size=1)  # the pool has the replicas
        options = replace(work.options, engine=engine)
        self._work = work
        self._cache = TemporaryDirectory(prefix="cosmos3-batch-")
        files = input_files(options.inputs, Path(self._cache.name))
        self._source = Source(files, work.overrides, work.said)
        self._units: Iterator[tuple[int, Unit]] = iter(())
        self._next = 0
        self._checker = Checker(planner(options.engine), options)
        store = store_at(options.location)
        claims = Claims(store, work.run)
        packs = Packs(store, claims) if options.shard_size else None
        self._making = Making(options, Results(store, options, work.run), claims, packs)
        if options.reasoner_url is not None:
            from vllm_cosmos3.reasoner.server import ReasonerServer

            self._making.reasoner = ReasonerServer(options.reasoner_url)
        self._model = Opened(lambda: open_generator(options.engine))

    def __call__(self, rows: Rows) -> dict[str, list[str]]:
        outcomes: list[Outcome] = []
        for number in rows["id"]:
            checked = self._checker.check(self._unit(int(number)))
            if checked.unit[0].kind == REASONER:
                outcomes += self._making.answered(checked)
            else:
                outcomes += self._making.generated(checked, self._model)
        return {"outcome": [json.dumps(asdict(outcome)) for outcome in outcomes]}

    def _unit(self, number: int) -> Unit:
        """The unit of a number; they come in rising order, but for those of actors that died."""
        if number < self._next:
            self._next, self._units = 0, iter(())
        if self._next == 0:
            part = self._work.options.part
            units = self._source.units(self._work.chains)
            self._units = enumerate(islice(units, part.index, None, part.count))
        for found, unit in self._units:
            self._next = found + 1
            if found == number:
                return unit
        raise AssertionError(f"the batch files have changed: there is no unit {number}")


class Packer:
    """A task that packs the results it is given into a shard."""

    def __init__(self, work: Work) -> None:
        store = store_at(work.options.location)
        self._packs = Packs(store, Claims(store, work.run))

    def __call__(self, rows: Rows) -> dict[str, list[str]]:
        outcomes = [json.loads(text) for text in rows["outcome"]]
        ready = {
            x["name"]: x
            for x in outcomes
            if x["line"] and x["line"]["status"] == "success" and x["line"]["shard"] is None
        }
        for line in self._packs.pack(list(ready)) if ready else ():
            ready[line["name"]]["line"] = line
        return {"outcome": [json.dumps(outcome) for outcome in outcomes]}


@contextmanager
def on_cluster(address: str) -> Iterator[None]:
    """Join the cluster at an address, or that of ``RAY_ADDRESS``; without one start a cluster of
    this machine, which ends with this process.

    Raises:
        Unsupported: Ray is not installed, or does not answer.
    """
    try:
        import ray
        import ray.data
    except ImportError:
        raise Unsupported("Ray is not installed: pip install 'vllm-cosmos3[ray]'") from None
    try:
        ray.init(
            address=address or None,
            log_to_driver=False,
            logging_level="error",
            include_dashboard=None if address else False,
            ignore_reinit_error=True,
        )
    except (ConnectionError, ValueError) as error:
        raise Unsupported(f"there is no Ray cluster ({' '.join(str(error).split())})") from None
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    try:
        yield
    finally:
        ray.shutdown()


def outcomes(work: Work, numbers: Sequence[int] | None, total: int) -> Iterator[Outcome]:
    """What becomes of units on the cluster: of those with some ``numbers``, or of all ``total``."""
    import ray

    if numbers is None:
        rows = ray.data.range(total, override_num_blocks=math.ceil(total / AT_ONCE))
    else:
        rows = ray.data.from_items([{"id": number} for number in numbers])
    engine = work.options.engine
    ranks = engine.parallel.world_size
    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), int(resources["CPU"])
    # One processor is for the tasks that hand out numbers.
    room = max(1, gpus // ranks if gpus else cpus - 1)
    actors = min(engine.data_parallel_size if engine.data_parallel_size > 1 else room, total)
    made = rows.map_batches(
        Maker,
        fn_constructor_args=(work,),
        batch_size=AT_ONCE,
        concurrency=(1, actors),
        num_gpus=ranks if gpus else None,
        num_cpus=None if gpus else 1,
    )
    if work.options.shard_size:
        made = made.map_batches(
            Packer,
            fn_constructor_args=(work,),
            batch_size=work.options.shard_size,
            concurrency=1,
            num_cpus=0,  # it copies files
        )
    for batch in made.iter_batches(batch_size=None, prefetch_batches=0):
        for text in batch["outcome"]:
            yield Outcome(**json.loads(str(text)))
