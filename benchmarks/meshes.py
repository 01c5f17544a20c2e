"""Meshes of this machine, written cfg x ulysses x tp: a process for each rank, for one mesh after the other."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vllm_cosmos3.engine_options import EngineConfig
from vllm_cosmos3.generator.pipeline import Pipeline
from vllm_cosmos3.parallel.mesh import Mesh, close_mesh, init_mesh

AXES = ("cfg_parallel_size", "ulysses_degree", "tensor_parallel_size")
HANG = timedelta(hours=1)  # until processes that do not come are given up


def degrees(mesh: str) -> dict[str, Any]:
    """The options of the engine that make this mesh."""
    return dict(zip(AXES, map(int, mesh.split("x")), strict=True))


def ranks(mesh: str) -> int:
    return math.prod(degrees(mesh).values())


def device_of(kind: str, rank: int) -> torch.device:
    """The device of a rank, which is made the current one."""
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def on_mesh(
    mesh: str,
    rank: int,
    device: torch.device,
    meeting: Path,
    work: Callable[[Pipeline], None],
    **options: Any,
) -> None:
    """Load a checkpoint as one rank, do the work, and leave nothing on the device.

    ``meeting`` is a file that is not there yet, the same for all ranks; ``options`` are of the engine.
    """
    config = EngineConfig(device=str(device), **degrees(mesh), **options)
    joined = init_mesh(
        config.parallel,
        rank=rank,
        local_rank=device.index or 0,
        init_method=f"file://{meeting}" if ranks(mesh) > 1 else None,
    )
    work(Pipeline.load(config, joined, device))
    leave(joined, device)


def leave(mesh: Mesh, device: torch.device) -> None:
    """Leave nothing on the device."""
    gc.collect()  # layers that point at each other would stay beside the next mesh's
    close_mesh(mesh)
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Meeting:
    """A barrier of the processes of this machine, whether a process group joins them or not."""

    def __init__(self, file: Path, count: int) -> None:
        self._store, self._count, self._number = dist.FileStore(str(file), count), count, 0
        self._store.set_timeout(HANG)

    def wait(self) -> None:
        """Return when all have come here as often."""
        self._number += 1
        if self._store.add(f"came/{self._number}", 1) == self._count:
            self._store.set(f"all/{self._number}", "here")
        self._store.wait([f"all/{self._number}"])
