"""Device placement of replicas: the devices of each, and its memory limit on devices that several share.

Devices are named as in CUDA_VISIBLE_DEVICES. A device may be assigned to several replicas, which CUDA does
not accept in one list, so each stage process gets a CUDA_VISIBLE_DEVICES of its own.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from vllm_cosmos3.engine_options import EngineConfig
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.stage.launcher import DEVICES

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Devices of a replica, as in CUDA_VISIBLE_DEVICES; None if they are not chosen here.

    ``memory_limit`` is in GiB for each device, None for that of the engine options.
    """

    devices: str | None = None
    memory_limit: float | None = None

    def device_names(self) -> list[str]:
        """The devices as a list, empty if they are not chosen here."""
        return self.devices.split(",") if self.devices else []

    def engine_options(self, engine: EngineConfig) -> EngineConfig:
        """The engine options with the memory limit of this replica."""
        if self.memory_limit is None:
            return engine
        return replace(engine, memory_limit=self.memory_limit)


def parse_devices(listed: str) -> list[str]:
    """The names in a comma-separated list."""
    return [name.strip() for name in listed.split(",")]


def visible_devices(count: int, environment: Mapping[str, str] = os.environ) -> list[str]:
    """The names of the ``count`` devices that are visible to this process."""
    named = [name for name in parse_devices(environment.get(DEVICES, "")) if name]
    return named or [str(index) for index in range(count)]


def placements_of(
    engine: EngineConfig, names: Sequence[str], memory: int | None = None, *, field: str
) -> tuple[Placement, ...]:
    """The placement of each replica: its ranks take the ``names`` in order.

    A device of ``memory`` bytes that several replicas share is divided evenly among them, unless the options
    limit their memory. ``field`` is the option with the names, for errors.

    Raises:
        InvalidRequest: there are too few devices, two ranks of a replica would share one, or the
            memory limits of the replicas on a device exceed its memory.
    """
    replicas, ranks = engine.data_parallel_size, engine.parallel.world_size
    check_replicas(replicas, ranks, len(names))
    assigned = [list(names[at * ranks : (at + 1) * ranks]) for at in range(replicas)]
    replicas_on = Counter(name for devices in assigned for name in devices)
    if any(len(set(devices)) < len(devices) for devices in assigned):
        possible = f"different devices for the {ranks} ranks of each replica"
        raise InvalidRequest(field, ",".join(names), possible)
    if len(set(names)) < len(names) and len(names) > replicas * ranks:
        possible = f"different devices, or {replicas * ranks}, one for each rank of each replica"
        raise InvalidRequest(field, ",".join(names), possible)
    _check_memory(engine, max(replicas_on.values()), memory)
    limited = engine.memory_limit is not None or engine.gpu_memory_utilization is not None
    placements = []
    for devices in assigned:
        sharing = max(replicas_on[name] for name in devices)
        undivided = sharing == 1 or memory is None or limited
        part = None if undivided or memory is None else memory / GIB / sharing
        placements.append(Placement(devices=",".join(devices), memory_limit=part))
    return tuple(placements)


def check_replicas(replicas: int, ranks: int, devices: int) -> None:
    """Raise InvalidRequest if there are fewer ``devices`` than the ``ranks`` of all replicas."""
    if replicas > 1 and replicas * ranks > devices:
        possible = f"at most {devices // ranks}: {devices} devices, {ranks} for each replica"
        raise InvalidRequest("data_parallel_size", replicas, possible)


def max_replicas_per_device(placements: Sequence[Placement], names: Sequence[str]) -> int:
    """The largest number of replicas on one of the devices ``names``."""
    counted = Counter(name for placement in placements for name in placement.device_names())
    return max((counted[name] for name in names), default=0)


def _check_memory(engine: EngineConfig, sharing: int, memory: int | None) -> None:
    """Refuse memory limits whose sum over the replicas on a device exceeds its memory."""
    if sharing == 1 or memory is None:
        return
    for field, most, unit in (
        ("memory_limit", memory / GIB, " GiB"),
        ("gpu_memory_utilization", 1.0, ""),
    ):
        value = getattr(engine, field)
        if value is not None and value * sharing > most:
            part = math.floor(most / sharing * 100) / 100
            possible = f"at most {part:g}{unit}, as {sharing} replicas share a device"
            raise InvalidRequest(field, value, possible, "conflict")
