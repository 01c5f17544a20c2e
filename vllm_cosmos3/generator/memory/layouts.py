"""Layouts of several GPUs: a mesh that makes one request soonest, replicas that make most of many.

A mesh shortens a request and loses a little of each GPU to communication; replicas lose nothing and
shorten nothing. In between is what the memory of one GPU asks for. Not every number of GPUs is that
of a mesh: some may be left over.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from vllm_cosmos3.checkpoint.config import ModelConfig
from vllm_cosmos3.engine_options import OPTIONS, EngineConfig
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.generator.memory.estimate import Work, estimate
from vllm_cosmos3.generator.memory.fit import resolve_residency
from vllm_cosmos3.parallel.checks import check_degrees

DEGREES = ("data_parallel_size", "cfg_parallel_size", "ulysses_degree", "tensor_parallel_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Replicas of one mesh; each GPU needs ``needed`` bytes."""

    engine: EngineConfig
    needed: int

    @property
    def gpus(self) -> int:
        """How many GPUs it uses."""
        return self.engine.data_parallel_size * self.engine.parallel.world_size

    @property
    def flags(self) -> str:
        """The layout on the command line."""
        names = [name for name in DEGREES if getattr(self.engine, name) > 1]
        words = [f"--{name.replace('_', '-')} {getattr(self.engine, name)}" for name in names]
        return " ".join(words) or "no flags"


def layouts(
    model: ModelConfig, engine: EngineConfig, work: Work, limit: int, gpus: int
) -> dict[str, Layout]:
    """The layouts of up to so many GPUs for latency and throughput; none where ``work`` fits in none.

    Those of latency are of the largest mesh, those of throughput of the smallest. ``limit`` are the
    bytes of one GPU. What the engine says of everything else is kept.
    """
    most = min(gpus, 2 * model.transformer.num_key_value_heads)  # see `check_degrees`
    sizes = range(1, most + 1)
    found = [made for ranks in sizes if (made := _fitting(model, engine, work, limit, gpus, ranks))]
    return {"latency": found[-1], "throughput": found[0]} if found else {}


def _fitting(
    model: ModelConfig, engine: EngineConfig, work: Work, limit: int, gpus: int, ranks: int
) -> Layout | None:
    """The best mesh of so many ranks in which the work fits, as often as the GPUs suffice for."""
    replicas = min(gpus // ranks, int(OPTIONS["data_parallel_size"].spec.high))
    for cfg, ulysses, tensor in _meshes(ranks):
        made = replace(
            engine,
            data_parallel_size=replicas,
            cfg_parallel_size=cfg,
            ulysses_degree=ulysses,
            tensor_parallel_size=tensor,
        )
        try:
            check_degrees(made.parallel, model.transformer, guided=not model.distilled)
        except InvalidRequest:
            continue
        made = resolve_residency(model, made, work, limit)
        needed = estimate(model, made, work).needed
        if needed <= limit:
            return Layout(engine=made, needed=needed)
    return None


def _meshes(ranks: int) -> Iterator[tuple[int, int, int]]:
    """Degrees whose product is the number of ranks: guidance first, tensor parallel last."""
    for cfg in (2, 1):
        for tensor in range(1, ranks + 1):
            if ranks % (cfg * tensor) == 0:
                yield cfg, ranks // (cfg * tensor), tensor
