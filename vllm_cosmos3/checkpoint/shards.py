"""Shards of a component: which file has which tensor, and whether their headers are as expected.

Everything that can be wrong with a folder is found before a value is read, and reported in one error.
Loads no torch.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

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


def identity_table(shapes: Shapes) -> dict[str, Target]:
    """For a module whose parameters are called as the tensors of its files."""
    return {name: Target(name) for name in shapes}


def check_weights(table: Table, folder: Path, shapes: Shapes, fp8: Collection[str] = ()) -> None:
    """Read the headers of the shards alone, and raise what `load_weights` would."""
    with ExitStack() as stack:
        shards = [stack.enter_context(open_shard(path)) for path in shard_files(folder)]
        check_headers(folder, shards, table, shapes, fp8)


def shard_files(folder: Path) -> list[Path]:
    """The files that the index names, or the only file of a small component."""
    index = folder / f"{STEM}.safetensors.index.json"
    if not index.exists():
        return [folder / f"{STEM}.safetensors"]
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{index} has no weight_map from tensors to files")
    return [folder / name for name in sorted(set(names.values()))]


def open_shard(path: Path, framework: str = "np") -> Any:
    """A shard as safetensors opens it, whose values are those of ``framework``: its headers need none."""
    try:
        return safe_open(path, framework=framework)
    except FileNotFoundError:
        raise CheckpointError(f"{path.name} is missing in {path.parent}") from None
    except (SafetensorError, OSError) as error:
        raise corrupt(path, error) from None


def corrupt(path: Path, error: Exception) -> CheckpointError:
    """What is said of a file that ends too early, or is something else."""
    return CheckpointError(f"{path} is truncated or corrupt: {error}")


def check_headers(
    folder: Path, shards: list[Any], table: Table, shapes: Shapes, fp8: Collection[str]
) -> None:
    """Compare the headers with what is expected; all that is wrong goes into one sentence."""
    headers = {
        tensor_name(stored): shard.get_slice(stored)
        for shard in shards
        for stored in shard.keys()  # noqa: SIM118
        if not is_ignored(stored)
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


def is_ignored(stored: str) -> bool:
    """Whether a tensor is none of the model's, though published exports carry it."""
    return _IGNORED.search(stored) is not None


def tensor_name(stored: str) -> str:
    """The name of the inventory for a stored name; two spellings are in circulation."""
    return _ALIASED.sub(r"\1", stored)
