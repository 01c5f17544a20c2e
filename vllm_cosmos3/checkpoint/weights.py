"""Weights: from safetensors shards straight into parameters, one tensor at a time.

What goes where is a table: checkpoint name -> parameter and part of it. The headers of the shards are
checked before a value is read. Dummy weights take the same way, so that they do not depend on how a model
is sharded.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from vllm_cosmos3.checkpoint import load_progress
from vllm_cosmos3.checkpoint.shards import (
    Shapes,
    Table,
    Target,
    check_headers,
    corrupt,
    open_shard,
    shard_files,
    tensor_name,
)

Prepare = Callable[[str, Target, Tensor], Iterable[tuple[Target, Tensor]]]


def as_it_is(_: str, target: Target, tensor: Tensor) -> Iterable[tuple[Target, Tensor]]:
    """The preparation of tensors that need none."""
    return [(target, tensor)]


def load_weights(
    module: nn.Module,
    table: Table,
    folder: Path,
    shapes: Shapes,
    fp8: Collection[str] = (),
    prepare: Prepare = as_it_is,
    *,
    keep: bool = False,
) -> None:
    """Fill ``module`` from the shards in ``folder``.

    ``shapes`` lists every tensor that the folder may hold, ``table`` those of them that are
    needed, ``fp8`` those that are F8_E4M3. ``prepare`` makes of a tensor and its target what is
    loaded. With ``keep`` weights can be loaded again. Raises one CheckpointError that names what is
    missing, unexpected, of another shape or type.
    """
    fill(module, table, _read(folder, table, shapes, fp8), prepare)
    choose_kernels(module, keep=keep)


def load_dummy_weights(
    module: nn.Module,
    table: Table,
    shapes: Shapes,
    *,
    device: torch.device,
    seed: int = 0,
    prepare: Prepare = as_it_is,
    keep: bool = False,
) -> None:
    """Fill ``module`` with reproducible noise that keeps activations near one.

    Norms are one, biases zero, matrices uniform with variance 1 / inputs. Each tensor has its own
    generator on ``device``, so every rank of a mesh gets its part of the same weights.
    """
    drawn = ((name, _dummy(name, shapes[name], device, seed)) for name in table)
    fill(module, table, drawn, prepare)
    choose_kernels(module, keep=keep)


def fill(
    module: nn.Module, table: Table, tensors: Iterable[tuple[str, Tensor]], prepare: Prepare
) -> None:
    """Hand each tensor to its parameter's own loader, which knows how the parameter is sharded."""
    parameters = dict(module.named_parameters())
    for name, tensor in tensors:
        for target, value in prepare(name, table[name], tensor):
            parameter = parameters[target.parameter]
            load: Any = getattr(parameter, "weight_loader", _copy)  # set by vLLM's layers
            load(parameter, value, *(() if target.part is None else (target.part,)))
        load_progress.count(tensor.numel())


def choose_kernels(module: nn.Module, *, keep: bool = False) -> None:
    """vLLM's linear layers choose their kernel after loading; the CPU ones cannot run before.

    Those give up the weights that they have packed, unless ``keep``.
    """
    from vllm.model_executor.layers.linear import LinearBase

    for layer in module.modules():
        if isinstance(layer, LinearBase):
            weight = layer.weight
            layer.quant_method.process_weights_after_loading(layer)
            if keep:
                layer.weight = weight


def _copy(parameter: Tensor, tensor: Tensor) -> None:
    parameter.data.copy_(tensor)


def _read(
    folder: Path, table: Table, shapes: Shapes, fp8: Collection[str]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of ``table``, shard by shard, each mapped from its file while it is used."""
    with ExitStack() as stack:
        shards = [
            (path, stack.enter_context(open_shard(path, "pt"))) for path in shard_files(folder)
        ]
        check_headers(folder, [shard for _, shard in shards], table, shapes, fp8)
        for path, shard in shards:
            for stored in shard.keys():  # noqa: SIM118 a safetensors file is not iterable
                if (name := tensor_name(stored)) in table:
                    yield name, _tensor(path, shard, stored)


def _tensor(path: Path, shard: Any, name: str) -> Tensor:
    try:
        return shard.get_tensor(name)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise corrupt(path, error) from None


def _dummy(name: str, shape: tuple[int, ...], device: torch.device, seed: int) -> Tensor:
    if name.endswith((".gamma", ".weight_g")) or re.search(r"norm[^.]*\.weight$", name):
        return torch.ones(shape, device=device)
    if name.endswith((".bias", ".alpha", ".beta")):
        return torch.zeros(shape, device=device)
    generator = torch.Generator(device).manual_seed(seed + zlib.crc32(name.encode()))
    bound = math.sqrt(3 / max(1, math.prod(shape[1:])))
    return torch.empty(shape, device=device).uniform_(-bound, bound, generator=generator)
