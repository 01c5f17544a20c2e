"""What the generator needs of its devices, and what it leaves for a reasoner on the same ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from vllm_cosmos3.checkpoint.config import ModelConfig
from vllm_cosmos3.devices import devices
from vllm_cosmos3.engine_options import EngineConfig
from vllm_cosmos3.errors import InvalidRequest, OutOfMemory
from vllm_cosmos3.generator.memory import (
    MemoryEstimate,
    estimate,
    resolve_residency,
    suggestions,
    usual_work,
)
from vllm_cosmos3.generator.models.components import check_files
from vllm_cosmos3.parallel.checks import check_backend, check_degrees
from vllm_cosmos3.reasoner.required_tensors import expected_tensors
from vllm_cosmos3.server.options import Options
from vllm_cosmos3.stage.placement import (
    Placement,
    parse_devices,
    placements_of,
    visible_devices,
)

GIB = 2**30
MOST_MEMORY = 0.92  # of a device that both surfaces take together, as vLLM alone does
LEAST_CACHE = 4 * GIB  # of a reasoner beside its weights: keys and values, activations
BFLOAT16 = 2  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """A generator that was checked against its checkpoint and its devices.

    ``memory`` is that of the largest request of the defaults, ``device`` the bytes of a device and
    ``limit`` those that a rank may use of the one that most replicas have, None where nobody counts them.
    ``placements`` are those of the replicas, None on a CPU and with Ray, which chooses the devices itself.
    """

    model: ModelConfig
    engine: EngineConfig
    memory: MemoryEstimate
    device: int | None
    limit: int | None
    placements: tuple[Placement, ...] | None = None

    def __str__(self) -> str:
        """Of the memory, for the operator."""
        weights, request = self.memory.resident, self.memory.request
        where = "rank" if self.device is None else f"GPU of {_gib(self.device)}"
        text = f"{_gib(weights)} of weights and up to {_gib(request)} for a default request per {where}"
        if self.limit is None:
            return text
        if self.limit != self.device:
            text += f", of which it may use {_gib(self.limit)}"
        if self.memory.needed > self.limit:
            text += "; requests that do not fit are refused"
        return text


def sized(folder: Path, options: Options, device: str) -> Sizing:
    """Check all that can be checked of a generator before anything is started.

    Raises:
        CheckpointError, Unsupported: the checkpoint is incomplete or cannot be run.
        InvalidRequest: the options do not suit it or the machine.
        OutOfMemory: its weights do not fit into a device.
    """
    engine = engine_of(folder, options, device)
    model = engine.read_model()
    check_backend(engine.attention_backend)
    names, size = devices_for(options, device)
    count = None if names is None else len(names)
    check_degrees(engine.parallel, model.transformer, devices=count, guided=not model.distilled)
    chosen = options.generator_devices or engine.data_parallel_size > 1
    placements = None
    if names is not None and chosen:
        placements = placements_of(engine, names, size, field="generator_devices")
    engine = engine.limited(size)
    limits = [
        placement.engine_options(engine).memory_limit for placement in placements or (Placement(),)
    ]
    limit = min((round(limit * GIB) for limit in limits if limit is not None), default=size)
    if engine.load_format != "dummy":
        check_files(model)
    work = usual_work(model)
    engine = resolve_residency(model, engine, work, limit)
    memory = estimate(model, engine, work)
    needed = max(memory.loading, memory.resident) + memory.reserve
    if limit is not None and needed > limit:
        raise OutOfMemory(
            f"the generator needs {_gib(needed)} of each device for its weights alone, and may use "
            f"{_gib(limit)}{_advice(suggestions(model, engine, work, limit))}"
        )
    return Sizing(
        model=model, engine=engine, memory=memory, device=size, limit=limit, placements=placements
    )


def engine_of(folder: Path, options: Options, device: str) -> EngineConfig:
    """What each rank is told."""
    return EngineConfig(model=folder, device=device, **options.engine)


def devices_for(options: Options, device: str) -> tuple[list[str] | None, int | None]:
    """The names of the generator's devices, and the bytes of each.

    No names where nobody chooses, on a CPU and where Ray gives devices out; no bytes where nobody counts.
    """
    if device.split(":")[0] == "cpu":
        return None, None
    listed = options.generator_devices
    names = parse_devices(listed) if listed else []
    ray = options.engine.get("distributed_executor_backend") == "ray"
    if ray and len(set(names)) < len(names):
        raise InvalidRequest("generator_devices", listed, "different devices, such as 1,2,3")
    here = devices()
    assert here.count is not None
    return None if ray else names or visible_devices(here.count), here.memory


def share_of_reasoner(
    sizing: Sizing, root: Mapping[str, Any], ranks: int, replicas: int = 1
) -> float | None:
    """The part of the devices that the generator leaves, which is vLLM's gpu_memory_utilization.

    ``root`` is the root config.json, ``ranks`` how many share the reasoner's weights, and ``replicas`` how many
    of the generator are on a device of them. None where nobody counts memory.

    Raises:
        OutOfMemory: the reasoner does not fit beside the generator.
    """
    if sizing.device is None or sizing.limit is None:
        return None
    weights = sum(prod(tensor.shape) for tensor in expected_tensors(root).values()) * BFLOAT16
    least = weights // ranks + LEAST_CACHE
    taken = min(sizing.memory.needed, sizing.limit) * replicas
    left = round(MOST_MEMORY * sizing.device) - taken
    if left < least:
        raise OutOfMemory(
            f"the generator takes {_gib(taken)} of {_gib(sizing.device)} of each device and the reasoner {_gib(least)}; give the generator devices of its own "
            "(--generator-devices), start with --und-residency host or "
            "--enable-layerwise-offload, or serve one --surface"
        )
    return left / sizing.device


def _advice(found: list[tuple[str, int]]) -> str:
    if not found:
        return "; use more devices"
    return "; start with " + " or ".join(f"{flags} ({_gib(size)})" for flags, size in found[:2])


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB // 10 else f"{size / 2**20:.1f} MiB"
