"""Which part of a command this process does, where torchrun has started several of it.

Ranks make one mesh, or several meshes side by side that divide the records of batch files
(replicas). The presets of the Cosmos Framework choose between the two.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vllm_cosmos3.engine_options import EngineOptions
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.stage.launcher import executor_backend, launched

if TYPE_CHECKING:
    from vllm_cosmos3.batch.records import Record

PRESETS = ("latency", "throughput")
BRANCHES = 2  # of guidance


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One of several equal parts of the work, the first one of one unless it says otherwise."""

    index: int = 0
    count: int = 1

    def of(self, records: Iterable[Record]) -> set[str]:
        """The names of the records of this part; one that continues another stays with it."""
        places: dict[str, int] = {}
        begun = 0
        for record in records:
            if record.continue_from in places:
                places[record.name] = places[record.continue_from]
            else:
                places[record.name] = begun % self.count
                begun += 1
        return {name for name, place in places.items() if place == self.index}


def divided(
    engine: EngineOptions, preset: str | None, given: Collection[str]
) -> tuple[EngineOptions, Part | None]:
    """The mesh of this process and its part of the work; None where other ranks do it all.

    ``latency`` makes one mesh of all ranks: guidance on two of them, the sequence on the rest, but
    for the degrees that were ``given``. ``throughput`` makes as many replicas as there are meshes
    in the ranks. Without a preset the ranks are one mesh of the degrees as they are.

    Raises:
        InvalidRequest: the ranks do not make up such meshes.
    """
    if preset not in (None, *PRESETS):
        raise InvalidRequest("parallelism_preset", preset, f"one of {', '.join(PRESETS)}")
    place = launched()
    if place is None:
        return engine, Part()
    world = place.world_size
    if preset == "latency" and world > 1:
        tensor, branches = engine.tensor_parallel_size, engine.cfg_parallel_size
        if "cfg_parallel_size" not in given and world // tensor % BRANCHES == 0:
            branches = BRANCHES
        engine = replace(engine, cfg_parallel_size=branches)
        if "ulysses_degree" not in given:
            engine = replace(engine, ulysses_degree=max(1, world // (tensor * branches)))
    mesh = engine.parallel.world_size
    if preset != "throughput" or mesh == world:
        backend = executor_backend(engine.distributed_executor_backend, mesh)
        return replace(engine, distributed_executor_backend=backend), Part()
    if world % mesh:
        possible = f"a multiple of {mesh}, the ranks of a mesh, for the preset throughput"
        raise InvalidRequest("WORLD_SIZE", world, possible, "conflict")
    if not place.leads(mesh):
        return engine, None
    place.leave(mesh)
    return engine, Part(index=place.rank // mesh, count=world // mesh)
