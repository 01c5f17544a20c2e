"""Reading of LoRA adapters: what a file of one holds, checked against the tensors of a checkpoint."""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from vllm_cosmos3.checkpoint.adapters.adapter import Adapter, Pair
from vllm_cosmos3.checkpoint.adapters.names import LoraName, parsed
from vllm_cosmos3.checkpoint.adapters.settings import LoraSettings, read_settings
from vllm_cosmos3.errors import CheckpointError, InvalidRequest

logger = logging.getLogger(__name__)

FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")  # of peft, of diffusers
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
MOST = 4  # names that a sentence lists
NO_MATRICES = ("embed_tokens.", "action_proj_in.", "action_proj_out.", "action_modality_embed")

Choice = tuple[str, float]  # a path and a scale
Shapes = Mapping[str, tuple[int, ...]]


def read_adapters(
    choices: Iterable[Choice], alpha: float | None, shapes: Shapes
) -> tuple[Adapter, ...]:
    """The adapters at these paths, for a transformer with tensors of these ``shapes``.

    ``alpha`` is that of adapters that do not say theirs. Headers alone decide what is right.

    Raises:
        InvalidRequest: there is no such file, or an alpha is missing or not wanted.
        CheckpointError: a tensor is unknown, misshapen or without its other half.
        Unsupported: it is another method than LoRA, rsLoRA or DoRA.
    """
    adapters, silent = [], False
    for path, scale in choices:
        files = _files(Path(path))
        tensors, metadata = _headers(files)
        settings = read_settings(files[0], metadata)
        silent |= settings.alpha is None
        if settings.alpha is None and alpha is not None:
            settings = replace(settings, alpha=alpha)
        adapters.append(_adapter(Path(path), scale, tensors, settings, shapes))
    if alpha is not None and not silent:
        possible = "left out: every adapter says its own" if adapters else "given with lora"
        raise InvalidRequest("lora_alpha", alpha, possible, "conflict")
    return tuple(adapters)


def _files(path: Path) -> list[Path]:
    """Its files of tensors: one, or the shards of an export of the framework."""
    if path.is_file():
        found = [path]
    elif path.is_dir():
        named = [path / name for name in FILES if (path / name).is_file()]
        found = named[:1] or sorted(path.glob("*.safetensors"))
    else:
        raise InvalidRequest(
            "lora", str(path), "PATH or PATH:SCALE, where PATH is a file or folder"
        )
    if not found or found[0].suffix in PICKLES:
        possible = "a safetensors file, or a folder with one; pickles are not read"
        raise InvalidRequest("lora", str(path), possible)
    return found


@dataclass(frozen=True, slots=True)
class _Header:
    file: Path
    shape: tuple[int, ...]


def _headers(files: Sequence[Path]) -> tuple[dict[str, _Header], dict[str, str]]:
    """Tensors by name, and the metadata of the files."""
    tensors: dict[str, _Header] = {}
    metadata: dict[str, str] = {}
    for file in files:
        try:
            with safe_open(file, framework="numpy") as opened:
                metadata |= opened.metadata() or {}
                for name in opened.keys():  # noqa: SIM118 a safetensors file is not iterable
                    tensors[name] = _Header(file, tuple(opened.get_slice(name).get_shape()))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is truncated or corrupt: {error}") from None
    return tensors, metadata


def _adapter(
    path: Path,
    scale: float,
    tensors: Mapping[str, _Header],
    settings: LoraSettings,
    shapes: Shapes,
) -> Adapter:
    names = {name: found for name in tensors if (found := parsed(name)) is not None}
    if not names:
        raise CheckpointError(f"{path} holds no LoRA tensors: none ends in lora_A.weight")
    dialects = {name.dialect for name in names.values()}
    dialect = next(d for d in ("peft", "framework", "diffusers") if d in dialects)
    _check_others(path, dialect, [name for name in tensors if name not in names])
    matrices = {n for n, s in shapes.items() if len(s) == 2 and not n.startswith(NO_MATRICES)}
    matrices = {name for name in matrices if name.endswith(".weight")}
    unknown = sorted(name for name, found in names.items() if found.tensor not in matrices)
    if unknown:
        raise CheckpointError(f"{path} changes what this checkpoint has not: {_listed(unknown)}")
    parts: dict[str, dict[str, str]] = defaultdict(dict)
    for name, found in names.items():
        if found.part in parts[found.tensor]:
            both = _listed(sorted((parts[found.tensor][found.part], name)))
            raise CheckpointError(f"{path} holds several adapters for a matrix: {both}")
        parts[found.tensor][found.part] = name
    pairs = {
        tensor: _pair(path, scale, shapes[tensor], parts[tensor], names, tensors, settings)
        for tensor in sorted(parts)
    }
    name = path.stem if path.is_file() else path.name
    return Adapter(name=name, scale=scale, dialect=dialect, digest=_digest(pairs), pairs=pairs)


def _check_others(path: Path, dialect: str, others: Sequence[str]) -> None:
    """Tensors that are no LoRA: the base weights in an export of the framework, else nothing we know."""
    if not others:
        return
    if dialect != "framework" or any("lora_" in name for name in others):
        strange = [name for name in others if "lora_" in name] or others
        raise CheckpointError(f"{path} has tensors that LoRA has not: {_listed(sorted(strange))}")
    logger.warning("%s: tensors beside the adapter are not read: %s", path, _listed(sorted(others)))


def _pair(
    path: Path,
    scale: float,
    shape: tuple[int, ...],
    parts: Mapping[str, str],
    names: Mapping[str, LoraName],
    tensors: Mapping[str, _Header],
    settings: LoraSettings,
) -> Pair:
    """One change, whose halves have to fit to each other and to the matrix."""
    for part, other in (("A", "B"), ("B", "A")):
        if part not in parts:
            have = parts.get(other) or parts["magnitude"]
            raise CheckpointError(f"{path} lacks lora_{part} beside {have}")
    a, b, magnitude = parts["A"], parts["B"], parts.get("magnitude")
    rank = tensors[a].shape[0] if tensors[a].shape else 0
    expected: dict[str, tuple[int, ...]] = {
        a: (max(rank, 1), shape[1]),
        b: (shape[0], max(rank, 1)),
    }
    if magnitude is not None:
        expected[magnitude] = (shape[0],)
    for name, wanted in expected.items():
        found = tensors[name].shape
        if found != wanted:
            raise CheckpointError(f"{path}: {name} is {list(found)}, must be {list(wanted)}")
    alpha = settings.alpha_of(names[a].module)
    if alpha is None:
        possible = f"given: {path} does not say its alpha, and its rank is {rank}"
        raise InvalidRequest("lora_alpha", None, possible, "missing_required")
    return Pair(
        a=a,
        b=b,
        magnitude=magnitude,
        file={name: tensors[name].file for name in expected},
        rank=rank,
        factor=scale * settings.divided(alpha, rank),
    )


def _digest(pairs: Mapping[str, Pair]) -> str:
    """SHA-256 of all that changes a matrix: names, factors, values."""
    import torch

    digest = hashlib.sha256()
    for tensor, pair in pairs.items():
        digest.update(f"{tensor} {pair.factor!r} ".encode())
        for name, file in pair.file.items():
            value = load_tensor(file, name)
            digest.update(f"{value.dtype} {list(value.shape)} ".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_tensor(file: Path, name: str) -> Any:
    """One tensor of a file.

    Raises:
        CheckpointError: the file has changed, or cannot be read.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(name)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{file} is truncated or corrupt: {error}") from None


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return f"{', '.join(names[:MOST])}{more}"
