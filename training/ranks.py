"""Ranks of a run that torchrun starts: each learns from clips of its own, and every few steps their weights are averaged.

``torchrun --nproc-per-node 3 -m training.train_towers ...``; a run without torchrun is one rank.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

SEEDS = 1_000_000  # between the first scenes of neighbouring ranks


def rank() -> int:
    """This process's rank, from 0."""
    return int(os.environ.get("RANK", "0"))


def join() -> None:
    """Meet the other ranks, each on a GPU of its own. After the data are drawn: CUDA starts here."""
    if "WORLD_SIZE" not in os.environ:
        return
    # Imported later, as by the first step of an optimizer, its defaults would be this group and keep it alive.
    importlib.import_module("torch.distributed.nn.functional")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def leave() -> None:
    """Part from the other ranks. Gloo's threads end here: one that still let go of a tensor when Python
    ends would abort the process."""
    if dist.is_initialized():
        dist.destroy_process_group()


@torch.no_grad()
def begin_equal(tensors: Sequence[Tensor]) -> None:
    """Give every rank the first one's values."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, 0)


@torch.no_grad()
def average(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over all ranks."""
    if not dist.is_initialized():
        return
    joined = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(joined)
    joined /= dist.get_world_size()
    parts = joined.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))
