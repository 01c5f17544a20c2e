"""Whether work fits into so many bytes of a device, and what would make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from vllm_cosmos3.checkpoint.config import EngineConfig, ModelConfig
from vllm_cosmos3.errors import InvalidRequest, OutOfMemory
from vllm_cosmos3.generator.memory.estimate import Work, estimate
from vllm_cosmos3.parallel.mesh import check_degrees

GIB = 2**30
MOST_RANKS = 8  # that a suggestion asks for
MOST_SUGGESTIONS = 4


def resolve_residency(
    model: ModelConfig, engine: EngineConfig, work: Work, limit: int | None
) -> EngineConfig:
    """``engine`` with the residency "auto" settled: the host only if ``work`` would not fit otherwise.

    ``limit`` are the bytes of one device, or None where memory is no question.
    """
    if engine.und_residency != "auto":
        return engine
    on_device = replace(engine, und_residency="gpu")
    if limit is None or estimate(model, on_device, work).needed <= limit:
        return on_device
    return replace(engine, und_residency="host")


def check_weights(model: ModelConfig, engine: EngineConfig, work: Work, limit: int | None) -> None:
    """Refuse weights that do not fit into ``limit`` bytes of a device, before any is read.

    Raises:
        OutOfMemory: with the bytes needed and free, and flags with which ``work`` would fit.
    """
    memory = estimate(model, engine, work)
    needed = max(memory.loading, memory.resident) + memory.reserve
    if limit is None or needed <= limit:
        return
    found = suggestions(model, engine, work, limit)
    advice = f"; start with {found[0][0]}" if found else ""
    raise OutOfMemory(
        f"the weights need {needed:,} bytes ({needed / GIB:.3g} GiB) of each device, and {limit:,} "
        f"({limit / GIB:.3g} GiB) may be used{advice}"
    )


def suggestions(
    model: ModelConfig, engine: EngineConfig, work: Work, limit: int
) -> list[tuple[str, int]]:
    """Flags that would make ``work`` fit into ``limit`` bytes, and the bytes it then needs.

    Those that cost no other GPU and no quality come first.
    """
    found = []
    for flags, changed in _alternatives(engine):
        try:
            check_degrees(changed.parallel, model.transformer)
        except InvalidRequest:
            continue
        size = estimate(model, changed, work).needed
        if size <= limit:
            found.append((flags, size))
    return found[:MOST_SUGGESTIONS]


def _alternatives(engine: EngineConfig) -> Iterator[tuple[str, EngineConfig]]:
    host, stream = "--und-residency host", "--enable-layerwise-offload"
    tiled = replace(engine.parallel, vae_parallel="tile")
    moved = []
    if engine.und_residency != "host":
        moved.append((host, replace(engine, und_residency="host")))
    if not engine.layerwise_offload:
        moved.append((stream, replace(engine, layerwise_offload=True)))
    if len(moved) == 2:
        both = replace(engine, und_residency="host", layerwise_offload=True)
        moved.append((f"{host} {stream}", both))
    yield from moved
    tile = "--vae-parallel tile"
    if engine.parallel.vae_parallel != "tile":
        yield tile, replace(engine, parallel=tiled)
        for flags, changed in moved:
            yield f"{flags} {tile}", replace(changed, parallel=tiled)
    for field in ("tensor_parallel_size", "ulysses_degree"):
        degree = 2 * getattr(engine.parallel, field)
        while degree * engine.parallel.world_size // getattr(engine.parallel, field) <= MOST_RANKS:
            parallel = replace(engine.parallel, **{field: degree})
            yield f"--{field.replace('_', '-')} {degree}", replace(engine, parallel=parallel)
            degree *= 2
