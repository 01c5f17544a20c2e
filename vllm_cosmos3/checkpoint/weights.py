"""Weights: from safetensors shards straight into parameters, one tensor at a time.

What goes where is a table: checkpoint name -> parameter and part of it. Everything that can be
wrong with a folder is found in the headers of its shards, before a value is read, and reported in
one error. Dummy weights take the same way, so that they do not depend on how a model is sharded.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vllm_cosmos3.checkpoint import load_progress
from vllm_cosmos3.checkpoint.config import read_json
from vllm_cosmos3.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]

STEM = "diffusion_pytorch_model"  # of the weight files of every component
# What published exports carry beside their own tensors: position embeddings of an abandoned design,
# and the state of quantizers that were never applied.
_IGNORED = re.compile(r"^action_pos_embed\.|\.(input|weight|output)_quantizer\.")
SCALES = (".weight_scale", ".input_scale")  # of FP8 matrices: scalars
_ALIASED = re.compile(r"^((?:action|audio)_modality_embed)\.weight$")


@dataclass(frozen=True, slots=True)
class Target:
    """A parameter, and which part of it where one parameter joins several tensors."""

    parameter: str
    part: str | int | None = None


Table = Mapping[str, Target]
Prepare = Callable[[str, Target, Tensor], Iterable[tuple[Target, Tensor]]]


def as_it_is(_: str, target: Target, tensor: Tensor) -> Iterable[tuple[Target, Tensor]]:
    """The preparation of tensors that need none."""
    return [(target, tensor)]


def identity_table(shapes: Shapes) -> dict[str, Target]:
    """For a module whose parameters are called as the tensors of its files."""
    return {name: Target(name) for name in shapes}


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


def check_weights(table: Table, folder: Path, shapes: Shapes, fp8: Collection[str] = ()) -> None:
    """Read the headers of the shards alone, and raise what `load_weights` would."""
    with ExitStack() as stack:
        shards = [stack.enter_context(_open(path)) for path in _shard_files(folder)]
        _check(folder, shards, table, shapes, fp8)


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
        shards = [(path, stack.enter_context(_open(path))) for path in _shard_files(folder)]
        _check(folder, [shard for _, shard in shards], table, shapes, fp8)
        for path, shard in shards:
            for stored in shard.keys():  # noqa: SIM118 a safetensors file is not iterable
                if (name := _name(stored)) in table:
                    yield name, _tensor(path, shard, stored)


def _shard_files(folder: Path) -> list[Path]:
    """The files that the index names, or the only file of a small component."""
    index = folder / f"{STEM}.safetensors.index.json"
    if not index.exists():
        return [folder / f"{STEM}.safetensors"]
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict):
        raise CheckpointError(f"{index} has no weight_map")
    return [folder / name for name in sorted(set(names.values()))]


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise CheckpointError(f"{path.name} is missing in {path.parent}") from None
    except (SafetensorError, OSError) as error:
        raise _corrupt(path, error) from None


def _tensor(path: Path, shard: Any, name: str) -> Tensor:
    try:
        return shard.get_tensor(name)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise _corrupt(path, error) from None


def _corrupt(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} is truncated or corrupt: {error}")


def _check(
    folder: Path, shards: list[Any], table: Table, shapes: Shapes, fp8: Collection[str]
) -> None:
    """Compare the headers with what is expected; all that is wrong goes into one sentence."""
    headers = {
        _name(stored): shard.get_slice(stored)
        for shard in shards
        for stored in shard.keys()  # noqa: SIM118
        if not _IGNORED.search(stored)
    }
    found = {name: tuple(header.get_shape()) for name, header in headers.items()}
    # The scale of a matrix is written with one dimension or with none.
    found |= {name: () for name, shape in found.items() if name.endswith(SCALES) and shape == (1,)}
    types = {name: headers[name].get_dtype() for name in shapes.keys() & found.keys()}
    shared = shapes.keys() & found.keys()
    problems = [
        _listed("missing", sorted(table.keys() - found.keys())),
        _listed("unexpected", sorted(found.keys() - shapes.keys())),
        _listed(
            "of another shape",
            [
                f"{name} {list(found[name])} instead of {list(shapes[name])}"
                for name in sorted(shared)
                if found[name] != tuple(shapes[name])
            ],
        ),
        _listed(
            "of another type",
            [
                f"{name} {types[name]} instead of {_expected_type(name, fp8)}"
                for name in sorted(shared)
                if not re.fullmatch(_expected_type(name, fp8).replace(", ", "|"), types[name])
            ],
        ),
    ]
    if any(problems):
        raise CheckpointError(f"tensors in {folder} are {'; '.join(filter(None, problems))}")


def _expected_type(name: str, fp8: Collection[str]) -> str:
    if name in fp8:
        return "F8_E4M3"
    return "F32" if name.endswith(SCALES) else "BF16, F16, F32"


def _listed(what: str, items: list[str], most: int = 8) -> str:
    if not items:
        return ""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return f"{what}: {', '.join(items[:most])}{more}"


def _name(stored: str) -> str:
    """The name of the inventory for a stored name; two spellings are in circulation."""
    return _ALIASED.sub(r"\1", stored)


def _dummy(name: str, shape: tuple[int, ...], device: torch.device, seed: int) -> Tensor:
    if name.endswith((".gamma", ".weight_g")) or re.search(r"norm[^.]*\.weight$", name):
        return torch.ones(shape, device=device)
    if name.endswith((".bias", ".alpha", ".beta")):
        return torch.zeros(shape, device=device)
    generator = torch.Generator(device).manual_seed(seed + zlib.crc32(name.encode()))
    bound = math.sqrt(3 / max(1, math.prod(shape[1:])))
    return torch.empty(shape, device=device).uniform_(-bound, bound, generator=generator)
