"""The mesh of ranks: rank = (cfg, ulysses, tp), tensor parallel fastest. The only process-group code.

Groups are made by vLLM's own functions, so that vLLM's parallel layers find the tensor-parallel
degree where they look for it. Every collective is the identity on an axis of size one.

Shape suffixes: S tokens of the whole sequence, s tokens of this rank, H heads of the whole axis,
h heads of this rank, D values of one token or head.
"""

from __future__ import annotations

import functools
import itertools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vllm_cosmos3 import compat
from vllm_cosmos3.engine_options import ParallelConfig
from vllm_cosmos3.parallel.axis import Axis

# vLLM is imported where it is called: reading a mesh or cutting a tensor needs torch only, and
# importing vLLM takes seconds.
if TYPE_CHECKING:
    from vllm.config import VllmConfig


Value = TypeVar("Value")
_launched = itertools.count()  # alike on all ranks, which make the same meshes


@dataclass(frozen=True, slots=True)
class Mesh:
    """Position of this process. ``world`` holds all ranks, the others one line each through it."""

    cfg: Axis
    ulysses: Axis
    tp: Axis
    world: Axis

    @property
    def axes(self) -> tuple[Axis, ...]:
        """All of them, the world too."""
        return tuple(getattr(self, item.name) for item in fields(self))


def init_mesh(
    parallel: ParallelConfig,
    *,
    rank: int = 0,
    local_rank: int = 0,
    init_method: str | None = None,
) -> Mesh:
    """Join the process groups of this mesh; every rank calls it once. ``close_mesh`` undoes it.

    ``init_method`` is a URL of torch.distributed where the ranks meet, preferably a fresh
    ``file://``. One rank alone needs none: it opens neither port nor file. Where torch.distributed
    is up already (torchrun), its world is taken as it is.
    """
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.platforms import current_platform

    backend = current_platform.dist_backend
    if not dist.is_initialized() and init_method is None:
        if parallel.world_size > 1:
            raise ValueError("several ranks need an init_method to meet at")
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if not dist.is_initialized() and init_method == "env://":
        _join_launched(backend)
    meeting = PurePath(init_method or f"pid{os.getpid()}").name
    if init_method == "env://":
        meeting = f"torchrun{os.environ['MASTER_PORT']}"
    if current_platform.is_cpu():
        # vLLM names the shared memory of a tensor-parallel group on the CPU after this.
        os.environ["VLLM_DIST_IDENT"] = meeting
    with set_current_vllm_config(_layer_config(parallel.tensor_parallel_size)):
        parallel_state.init_distributed_environment(
            parallel.world_size, rank, init_method or "env://", local_rank, backend
        )
        # vLLM lays ranks out as external data parallel x ... x tp: the factor of the world that it
        # is not told of becomes independent tensor-parallel groups.
        parallel_state.initialize_model_parallel(parallel.tensor_parallel_size)
    if not current_platform.is_cpu():
        compat.use_fused_norms(_layer_config(parallel.tensor_parallel_size))
    if current_platform.is_cpu() and parallel.tensor_parallel_size > 1:
        _unlink_shared_memory(meeting)
    world = parallel_state.get_world_group()
    tp = parallel_state.get_tp_group()
    # vLLM's queue for scheduler messages between tensor-parallel ranks: unused here, and its shared
    # memory would outlive a killed rank.
    tp.mq_broadcaster = None
    return Mesh(
        cfg=_join("cfg", parallel, local_rank, backend),
        ulysses=_join("ulysses", parallel, local_rank, backend),
        tp=_axis("tp", tp.world_size, tp.rank_in_group, tp.device_group),
        world=_axis("world", world.world_size, world.rank_in_group, world.device_group),
    )


def _join_launched(backend: str) -> None:
    """Meet the other ranks in the launcher's store, under a name that no earlier mesh has used.

    The addresses of a world stay in that store, and torch.distributed would look for those of the
    next one in the same place.
    """
    store, rank, size = next(dist.rendezvous("env://"))
    own = dist.PrefixStore(f"cosmos3/mesh/{next(_launched)}", store)
    dist.init_process_group(backend, store=own, rank=rank, world_size=size)


def close_mesh(mesh: Mesh) -> None:
    """Leave all groups of ``mesh``, its world included. A new mesh can be made afterwards."""
    from vllm.distributed import parallel_state

    for axis in mesh.axes:
        if axis.group is not None and axis not in (mesh.tp, mesh.world):  # which are vLLM's own
            dist.destroy_process_group(axis.group)
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


@contextmanager
def building_layers(mesh: Mesh) -> Iterator[None]:
    """The context in which vLLM's layers are constructed; calling them later does not need it."""
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(_layer_config(mesh.tp.size)):
        yield


def shard_sequence(x_SD: Tensor, axis: Axis) -> Tensor:
    """This rank's tokens of a replicated [S, ...]: ceil(S / n) of them, the last ones zero."""
    if axis.size == 1:
        return x_SD
    own = -(-x_SD.shape[0] // axis.size)
    x_sD = x_SD[axis.rank * own : (axis.rank + 1) * own]
    if x_sD.shape[0] == own:
        return x_sD.contiguous()
    pad = x_SD.new_zeros(own - x_sD.shape[0], *x_SD.shape[1:])
    return torch.cat([x_sD, pad])


def gather_sequence(x_sD: Tensor, axis: Axis, length: int) -> Tensor:
    """Inverse of ``shard_sequence`` for a sequence of ``length`` tokens: the same on every rank."""
    return x_sD if axis.size == 1 else torch.cat(all_gather(x_sD, axis))[:length]


def scatter_heads(x_sHD: Tensor, axis: Axis) -> Tensor:
    """Trade heads for tokens: [S/n, ..., H, D] -> [S, ..., H/n, D], S padded as by `shard_sequence`."""
    if axis.size == 1:
        return x_sHD
    x_nshD = x_sHD.unflatten(-2, (axis.size, -1)).movedim(-3, 0)
    return _all_to_all(x_nshD, axis).flatten(0, 1)


def gather_heads(x_ShD: Tensor, axis: Axis) -> Tensor:
    """Inverse of ``scatter_heads``: [S, H/n, D] -> [S/n, H, D]."""
    if axis.size == 1:
        return x_ShD
    x_nshD = x_ShD.unflatten(0, (axis.size, -1))
    return _all_to_all(x_nshD, axis).movedim(0, 1).flatten(1, 2)


def own_heads(x_SHD: Tensor, axis: Axis) -> Tensor:
    """The heads that ``scatter_heads`` leaves here, of a replicated [S, ..., H, D]. No collective."""
    return x_SHD if axis.size == 1 else x_SHD.chunk(axis.size, dim=-2)[axis.rank].contiguous()


def all_gather(x: Tensor, axis: Axis) -> list[Tensor]:
    """``x`` of every rank of the axis, in rank order; all have the same shape."""
    if axis.size == 1:
        return [x]
    parts = list(x.new_empty(axis.size, *x.shape).unbind(0))
    dist.all_gather(parts, x.contiguous(), group=axis.group)
    return parts


def barrier(number: int, axis: Axis, device: torch.device, seconds: float) -> bool:
    """A barrier with a time limit: whether all ranks of the axis come here within ``seconds``, with the same number.

    If not, a collective is left behind that may never end.
    """
    if axis.size == 1:
        return True
    own = torch.tensor([number], device=device)
    parts = list(own.new_empty(axis.size, 1).unbind(0))
    work = dist.all_gather(parts, own, group=axis.group, async_op=True)
    deadline = time.monotonic() + seconds
    while not work.is_completed():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    work.wait()
    return all(int(part) == number for part in parts)


def from_first(value: Value) -> Value:
    """The value of rank 0 of the world, on every rank."""
    box = [value]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def _all_to_all(x_n: Tensor, axis: Axis) -> Tensor:
    """Row i goes to rank i; row j of the result came from rank j."""
    x_n = x_n.contiguous()
    out_n = torch.empty_like(x_n)
    dist.all_to_all_single(out_n, x_n, group=axis.group)
    return out_n


def _join(name: str, parallel: ParallelConfig, local_rank: int, backend: str) -> Axis:
    """Make the groups along one axis of the mesh and return this rank's."""
    from vllm.distributed.parallel_state import init_model_parallel_group

    shape, dim = tuple(parallel.degrees.values()), list(parallel.degrees).index(name)
    if shape[dim] == 1:
        return _axis(name, 1, 0, None)
    ranks = torch.arange(parallel.world_size).view(shape).movedim(dim, -1)
    lines = ranks.reshape(-1, shape[dim]).tolist()
    # Only torch.distributed is used on these groups: a device communicator would be memory in vain.
    group = init_model_parallel_group(
        lines, local_rank, backend, group_name=name, use_device_communicator=False
    )
    return _axis(name, group.world_size, group.rank_in_group, group.device_group)


def _axis(name: str, size: int, rank: int, group: dist.ProcessGroup | None) -> Axis:
    return Axis(name, size, rank, group if size > 1 else None)


def _unlink_shared_memory(prefix: str) -> None:
    """Take the names off the segments that all ranks hold open, so that no death leaves them."""
    dist.barrier()
    for segment in Path("/dev/shm").glob(f"{prefix}-tp:*-cpushm_*"):
        segment.unlink(missing_ok=True)


@functools.cache
def _layer_config(tensor_parallel_size: int) -> VllmConfig:
    """Configuration that vLLM's layers read when they are constructed: eager, with vLLM's own kernels."""
    from vllm.config import (
        CompilationConfig,
        CompilationMode,
        DeviceConfig,
        ParallelConfig,
        VllmConfig,
    )
    from vllm.platforms import current_platform

    return VllmConfig(
        # "mp" is not started here; naming a backend keeps vLLM from counting devices to choose one.
        parallel_config=ParallelConfig(
            tensor_parallel_size=tensor_parallel_size, distributed_executor_backend="mp"
        ),
        device_config=DeviceConfig(device=current_platform.device_type),
        compilation_config=CompilationConfig(mode=CompilationMode.NONE, custom_ops=["all"]),
    )
