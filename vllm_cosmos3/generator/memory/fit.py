"""Fit of work into the memory of a device, and the options that would make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from vllm_cosmos3.checkpoint.config import ModelConfig
from vllm_cosmos3.engine_options import EngineConfig
from vllm_cosmos3.errors import InvalidRequest, OutOfMemory
from vllm_cosmos3.generator.memory.estimate import Work, estimate
from vllm_cosmos3.parallel.checks import check_degrees

GIB = 2**30
MOST_RANKS = 8  # that a suggestion asks for
MOST_SUGGESTIONS = 4


def resolve_residency(
    model: ModelConfig, engine: EngineConfig, work: Work, limit: int | None
) -> EngineConfig:
    """``engine`` with the residency "auto" resolved: the host only if ``work`` would not fit otherwise.

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
    for options in _alternatives(engine):
        changed = replace(engine, **options)
        try:
            check_degrees(changed.parallel, model.transformer)
        except InvalidRequest:
            continue
        size = estimate(model, changed, work).needed
        if size <= limit:
            found.append((_flags(options), size))
    return found[:MOST_SUGGESTIONS]


def _alternatives(engine: EngineConfig) -> Iterator[dict[str, Any]]:
    """Options to change, one or several at a time."""
    host, stream = {"und_residency": "host"}, {"enable_layerwise_offload": True}
    moved: list[dict[str, Any]] = []
    if engine.und_residency != "host":
        moved.append(host)
    if not engine.enable_layerwise_offload:
        moved.append(stream)
    if len(moved) == 2:
        moved.append(host | stream)
    yield from moved
    tile = {"vae_parallel": "tile"}
    if engine.vae_parallel != "tile":
        yield tile
        for options in moved:
            yield options | tile
    ranks = engine.parallel.world_size
    for name in ("tensor_parallel_size", "ulysses_degree"):
        degree = getattr(engine, name)
        factor = 2
        while factor * ranks <= MOST_RANKS:
            yield {name: factor * degree}
            factor *= 2


def _flags(options: dict[str, Any]) -> str:
    """The options as on the command line."""
    words = []
    for name, value in options.items():
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words.append(str(value))
    return " ".join(words)
