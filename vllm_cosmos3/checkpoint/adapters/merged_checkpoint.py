"""A checkpoint with adapters merged into it: other files are linked, or copied to another disk."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vllm_cosmos3.checkpoint.adapters.adapter import Adapter
from vllm_cosmos3.checkpoint.adapters.merging import Merging
from vllm_cosmos3.errors import CheckpointError

CHANGED = "transformer"  # the folder whose shards are written anew, under their names
WRITTEN = "cosmos3_adapters"  # in the metadata of those: what was merged


def write_merged(folder: Path, adapters: Sequence[Adapter], out: Path) -> None:
    """Write the checkpoint in ``folder`` with these ``adapters`` to ``out``, whole or not at all.

    Shards keep their names, tensors and types, so every index stays right. Shards without a changed
    matrix, and all other files, are hard links to those of ``folder`` where the file system allows.

    Raises:
        CheckpointError: ``out`` exists, or a shard cannot be read.
        OSError: it cannot be written.
    """
    if out.exists():
        raise CheckpointError(f"{out} exists; name a folder that does not")
    part = out.with_name(f".{out.name}.{uuid.uuid4().hex}.part")
    changed = {name for adapter in adapters for name in adapter.pairs}
    merge = Merging(adapters, torch.device("cpu"))
    try:
        for source in sorted(path for path in folder.rglob("*") if path.is_file()):
            target = part / source.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            of_transformer = target.parent == part / CHANGED and source.suffix == ".safetensors"
            if not (of_transformer and _write_shard(source, target, changed, merge)):
                _link(source, target)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write_shard(source: Path, target: Path, changed: set[str], merge: Merging) -> bool:
    """Write the shard with its matrices merged; False where it has none of those ``changed``."""
    try:
        with safe_open(source, framework="pt") as shard:
            names = list(shard.keys())
            if not changed.intersection(names):
                return False
            tensors = {name: merge(name, shard.get_tensor(name)) for name in names}
            metadata = dict(shard.metadata() or {"format": "pt"})
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{source} is truncated or corrupt: {error}") from None
    merged = [f"{a.name}:{a.scale:g} {a.digest}" for a in merge.adapters]
    save_file(tensors, target, {**metadata, WRITTEN: "; ".join(merged)})
    return True


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
