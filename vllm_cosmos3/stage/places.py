"""Places of replicas: the devices of each, and how much memory it may use where others have them too.

Devices are named as in CUDA_VISIBLE_DEVICES. One name may be given to several replicas, which CUDA itself
does not know, so each stage is told its own.
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
class Place:
    """Devices of a replica, in the words of CUDA_VISIBLE_DEVICES; None where nobody chooses.

    ``memory_limit`` are GiB of each that it may use, None where that is for the engine options to say.
    """

    devices: str | None = None
    memory_limit: float | None = None

    def names(self) -> list[str]:
        """Its devices, one by one."""
        return self.devices.split(",") if self.devices else []

    def told(self, engine: EngineConfig) -> EngineConfig:
        """The engine options of the replica."""
        if self.memory_limit is None:
            return engine
        return replace(engine, memory_limit=self.memory_limit)


def names_in(listed: str) -> list[str]:
    """The names of a list with commas."""
    return [name.strip() for name in listed.split(",")]


def visible(count: int, environment: Mapping[str, str] = os.environ) -> list[str]:
    """The names of the devices that this process sees, of which there are so many."""
    named = [name for name in names_in(environment.get(DEVICES, "")) if name]
    return named or [str(index) for index in range(count)]


def places_of(
    engine: EngineConfig, names: Sequence[str], memory: int | None = None, *, field: str
) -> tuple[Place, ...]:
    """The place of each replica: its ranks take the ``names`` in their order.

    A device of ``memory`` bytes that several replicas have is divided among them, unless the options
    limit their memory. ``field`` is what the user has given the names in.

    Raises:
        InvalidRequest: there are too few devices, two ranks of a replica would have the same one, or
            the limits of those that share one are more than it has.
    """
    replicas, ranks = engine.data_parallel_size, engine.parallel.world_size
    check_replicas(replicas, ranks, len(names))
    taken = [list(names[at * ranks : (at + 1) * ranks]) for at in range(replicas)]
    replicas_on = Counter(name for place in taken for name in place)
    if any(len(set(place)) < len(place) for place in taken):
        possible = f"different devices for the {ranks} ranks of each replica"
        raise InvalidRequest(field, ",".join(names), possible)
    if len(set(names)) < len(names) and len(names) > replicas * ranks:
        possible = f"different devices, or {replicas * ranks}, one for each rank of each replica"
        raise InvalidRequest(field, ",".join(names), possible)
    _check_memory(engine, max(replicas_on.values()), memory)
    limited = engine.memory_limit is not None or engine.gpu_memory_utilization is not None
    places = []
    for place in taken:
        sharing = max(replicas_on[name] for name in place)
        alone = sharing == 1 or memory is None or limited
        part = None if alone or memory is None else memory / GIB / sharing
        places.append(Place(devices=",".join(place), memory_limit=part))
    return tuple(places)


def check_replicas(replicas: int, ranks: int, devices: int) -> None:
    """Raise InvalidRequest unless so many replicas of so many ranks have a device for each rank."""
    if replicas > 1 and replicas * ranks > devices:
        possible = f"at most {devices // ranks}: {devices} devices, {ranks} for each replica"
        raise InvalidRequest("data_parallel_size", replicas, possible)


def replicas_beside(places: Sequence[Place], names: Sequence[str]) -> int:
    """How many replicas there are on that of these devices which has most of them."""
    counted = Counter(name for place in places for name in place.names())
    return max((counted[name] for name in names), default=0)


def _check_memory(engine: EngineConfig, sharing: int, memory: int | None) -> None:
    """Refuse limits of memory that the replicas on a device cannot have at the same time."""
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
