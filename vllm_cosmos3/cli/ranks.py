"""Which part of a command this process does, where torchrun has started several of it.

Ranks make one mesh, or several meshes side by side that divide the records of batch files
(replicas). The presets of the Cosmos Framework choose between the two.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from vllm_cosmos3.engine_options import EngineOptions
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.stage.launcher import executor_backend, launched

PRESETS = ("latency", "throughput")
BRANCHES = 2  # of guidance


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One of several equal parts of the work, the first one of one unless it says otherwise.

    Of the units of a batch it has every ``count``-th, from ``index`` on.
    """

    index: int = 0
    count: int = 1

    @property
    def place(self) -> tuple[int, int]:
        """Its index, and of how many."""
        return self.index, self.count

    @property
    def index_file(self) -> str:
        """The name of the index of what this part has made."""
        if self.count == 1:
            return "index.jsonl"
        return f"index-{self.index + 1:05d}-of-{self.count:05d}.jsonl"

    def within(self, shard: Part) -> Part:
        """This part of a part."""
        return Part(index=shard.index * self.count + self.index, count=shard.count * self.count)


def shard(text: str) -> Part:
    """The part that ``--shard I/N`` names, counted from 1.

    Raises:
        ValueError: it names none.
    """
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise ValueError(text)
    return Part(index=int(index) - 1, count=int(count))


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
