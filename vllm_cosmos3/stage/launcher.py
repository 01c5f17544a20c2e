"""Launcher: the ranks that torchrun has started, and who starts those of a mesh.

A launcher starts the same command once for each rank. Taken for as many independent commands they
would do everything several times, on the same devices and into the same files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from importlib.util import find_spec

from vllm_cosmos3.devices import devices
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.stage.config import StageConfig

EXTERNAL = "external_launcher"  # vLLM's word for ranks that are there already
TORCHRUN = "TORCHELASTIC_RUN_ID"
# What torch.distributed and vLLM would read of a launcher.
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")  # fmt: skip
DEVICES = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    """This process as one of the ranks of a launcher; ``local`` are those of this machine."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    def leads(self, ranks: int) -> bool:
        """Whether this is the first one of its group, where each has so many ranks."""
        return self.rank % ranks == 0

    def leave(self, ranks: int, environment: MutableMapping[str, str] = os.environ) -> None:
        """Make this an ordinary process, with the devices of the group of ranks that it leads.

        To be called before a device is used. The other ranks of the group have nothing to do.

        Raises:
            InvalidRequest: the group spreads over several machines.
        """
        if self.local_rank + ranks > self.local_world_size:
            possible = f"a multiple of {ranks}, the ranks of a replica, which share a machine"
            raise InvalidRequest("LOCAL_WORLD_SIZE", self.local_world_size, possible)
        for name in list(environment):
            if name in VARIABLES or name.startswith("TORCHELASTIC_"):
                del environment[name]
        named = [name for name in environment.get(DEVICES, "").split(",") if name]
        visible = named or [str(index) for index in range(self.local_world_size)]
        environment[DEVICES] = ",".join(visible[self.local_rank : self.local_rank + ranks])


def launched(environment: Mapping[str, str] = os.environ) -> Launched | None:
    """The place of this process among the ranks of a launcher, None if it was started alone.

    A process that is told of a world of its own, as clusters do, was started alone as well.
    """
    try:
        rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local_rank = int(environment.get("LOCAL_RANK", rank))
        local_size = int(environment.get("LOCAL_WORLD_SIZE", size))
    except (KeyError, ValueError):
        return None
    if size == 1 and TORCHRUN not in environment:
        return None
    return Launched(rank=rank, world_size=size, local_rank=local_rank, local_world_size=local_size)


def executor_backend(
    wanted: str | None, world_size: int, environment: Mapping[str, str] = os.environ
) -> str:
    """Who starts the ranks of a mesh of this size, in vLLM's words: "uni", "mp", "ray" or `EXTERNAL`.

    ``wanted`` is the user's choice. Under a launcher the ranks are its own. "uni" keeps each of them
    to itself, a mesh of one.

    Raises:
        InvalidRequest: the launcher has started another number of ranks, or somebody else should
            start them a second time.
    """
    place = launched(environment)
    if place is None or (wanted == "uni" and world_size == 1):
        return wanted or ("uni" if world_size == 1 else "mp")
    ranks = place.world_size
    if wanted not in (None, EXTERNAL):
        possible = f"left out, or {EXTERNAL}: torchrun has started {ranks} ranks already"
        raise InvalidRequest("distributed_executor_backend", wanted, possible)
    if ranks != world_size:
        mesh = "--tensor-parallel-size, --cfg-parallel-size and --ulysses-degree"
        possible = (
            f"{world_size}, the product of {mesh}: start torchrun --nproc_per_node {world_size}, or "
            f"ask for {ranks} ranks, such as --tensor-parallel-size {ranks}"
        )
        raise InvalidRequest("WORLD_SIZE", ranks, possible, "conflict")
    return wanted or ("uni" if ranks == 1 else EXTERNAL)


def check_backend(config: StageConfig) -> None:
    """Refuse an executor that cannot run here, before anything starts."""
    world = config.engine.parallel.world_size
    if config.backend == "ray":
        _check_ray()
    if config.backend == "uni" and world > 1:
        raise InvalidRequest("distributed_executor_backend", "uni", f"mp or ray for {world} ranks")
    if config.backend == "external_launcher" and os.environ.get("WORLD_SIZE") != str(world):
        raise InvalidRequest(
            "distributed_executor_backend",
            "external_launcher",
            f"used under torchrun --nproc_per_node {world}, the product of the degrees",
        )


def _check_ray() -> None:
    here = devices()
    if not here.ray_key:
        possible = f"mp on the {here.name.upper()}: vLLM's Ray executor needs GPUs"
    elif find_spec("ray") is None:
        possible = "mp, or ray once it is installed: pip install 'vllm-cosmos3[ray]'"
    else:
        return
    raise InvalidRequest("distributed_executor_backend", "ray", possible)
