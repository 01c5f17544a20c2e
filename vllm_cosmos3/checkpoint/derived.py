"""Derived checkpoints: a base one and the tensors of its transformer that differ, as a complete folder.

In a repository such a checkpoint is a folder with ``changed.safetensors`` and ``derived.json``, which is
``{"base": "../demo", "kind": "distilled-i2v"}``: where the base lies, seen from that folder, and the kind.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from vllm_cosmos3.checkpoint.config import read_config, read_json
from vllm_cosmos3.checkpoint.tensors import transformer_tensors
from vllm_cosmos3.errors import CheckpointError

if TYPE_CHECKING:  # torch takes seconds, and a checkpoint is put together once
    import torch

    Tensors = dict[str, torch.Tensor]

DESCRIPTION, CHANGED = "derived.json", "changed.safetensors"
DERIVED_KINDS = ("distilled-i2v", "distilled-t2i", "policy-droid")
_FORMAT = b"1"  # another one when other folders are written from the same files
_SUFFIXES = (".json", ".jinja", ".txt", ".safetensors")  # of files that belong to a checkpoint
_SETTINGS = ("config.json", "model_index.json")  # how the files end that may depend on the kind


def is_derived(folder: Path) -> bool:
    """Whether a folder says what differs from a base, and is no checkpoint by itself."""
    return (folder / DESCRIPTION).is_file()


def completed(folder: Path) -> Path:
    """The complete folder of a derived checkpoint, in the cache of this user, written if it is not there.

    Its name is told by the contents of all files that it is made of, so that it is never out of date.

    Raises:
        CheckpointError: a file is missing or does not fit the base, or the cache cannot be written.
    """
    description = read_json(folder / DESCRIPTION)
    named, kind = (str(description.get(key, "")) for key in ("base", "kind"))
    base, changed = (folder / named).resolve(), folder / CHANGED
    if not named or not (base / "transformer").is_dir():
        raise CheckpointError(
            f"{folder / DESCRIPTION}: base is {named!r}, must be the folder of a checkpoint, seen from there"
        )
    if not changed.is_file():
        raise CheckpointError(
            f"{CHANGED} is missing in {folder}: the weights that differ from {base}"
        )
    digest = _digest([folder / DESCRIPTION, changed, *_files(base).values()])
    target = cache_folder() / "derived" / digest / folder.resolve().name
    part = target.with_name(f".{uuid.uuid4().hex}.part")
    try:
        if not target.is_dir():
            write_derived(part, base, changed, kind)
            _rename(part, target)
    except OSError as error:
        raise CheckpointError(
            f"{folder.name} cannot be put together in {cache_folder()}: {error.strerror}; "
            "XDG_CACHE_HOME names another place"
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def cache_folder() -> Path:
    """Where this user's programs keep what they can make again: $XDG_CACHE_HOME/vllm-cosmos3."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(cache) if os.path.isabs(cache) else Path("~/.cache").expanduser()
    return base / "vllm-cosmos3"


def write_derived(folder: Path, base: Path, changed: Path, kind: str) -> None:
    """Write a checkpoint of another ``kind`` into ``folder``, in the published layout.

    Its transformer is that of the folder ``base``, with the tensors of the file ``changed`` in the places
    of those of the same names, and without the adapters that the kind lacks. All else is copied.

    Raises:
        CheckpointError: ``base`` is not of the kind base, ``kind`` is none of DERIVED_KINDS, a file
            cannot be read, or ``changed`` holds what the base has not, or in another shape or dtype.
        OSError: it cannot be written.
    """
    from safetensors.torch import save_file

    if kind not in DERIVED_KINDS:
        raise CheckpointError(f"kind is {kind!r}, must be one of {', '.join(DERIVED_KINDS)}")
    found = read_config(base).kind
    if found != "base":
        raise CheckpointError(f"{base} is of the kind {found}, must be of the kind base")
    shards = {path: _load(path) for path in sorted((base / "transformer").glob("*.safetensors"))}
    old = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
    new = _load(changed)
    _check(new, changed, old, base)
    _copy(base, folder, kind)
    kept = transformer_tensors(read_config(folder).transformer)
    for path, shard in shards.items():
        part = {name: new.get(name, tensor) for name, tensor in shard.items() if name in kept}
        save_file(part, folder / "transformer" / path.name, {"format": "pt"})
    for index in folder.rglob("*.safetensors.index.json"):
        _leave_out({name: old[name] for name in old.keys() - kept.keys()}, index)


def _files(folder: Path) -> dict[str, Path]:
    """Name in the folder -> path of each file of a checkpoint, in order. Cards and pictures are none."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix in _SUFFIXES)
    return {path.relative_to(folder).as_posix(): path for path in paths}


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256(_FORMAT)
    for path in files:
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _rename(part: Path, target: Path) -> None:
    """Give a folder its name, unless another process was faster."""
    try:
        part.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def _check(new: Tensors, file: Path, old: Tensors, base: Path) -> None:
    for name, tensor in new.items():
        if name not in old:
            raise CheckpointError(f"{file}: {name} is no tensor of the transformer of {base}")
        if _form(tensor) != _form(old[name]):
            raise CheckpointError(
                f"{file}: {name} is {_form(tensor)}, must be {_form(old[name])} as in {base}"
            )


def _form(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _copy(base: Path, folder: Path, kind: str) -> None:
    """All but the transformer's tensors, with the settings of the kind.

    No links: what is later changed in place would change here as well.
    """
    from vllm_cosmos3.checkpoint.layout.files import of_kind

    sources = _files(base)
    before = {name: read_json(path) for name, path in sources.items() if name.endswith(_SETTINGS)}
    settings = of_kind(before, kind)
    gone = {PurePosixPath(name).parent for name in before.keys() - settings.keys()}
    for name, path in sources.items():
        parent = PurePosixPath(name).parent
        if parent not in gone and not (parent.name == "transformer" and path.suffix == ".safetensors"):  # fmt: skip
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
    for name, values in settings.items():
        if values != before.get(name):
            _write_json(folder / name, values)


def _leave_out(gone: Tensors, index: Path) -> None:
    """Take tensors out of an index."""
    values = read_json(index)
    names = gone.keys() & values["weight_map"].keys()
    for name in names:
        del values["weight_map"][name]
        values["metadata"]["total_size"] -= gone[name].nbytes
    if names:
        _write_json(index, values)


def _load(file: Path) -> Tensors:
    from safetensors.torch import load_file

    try:
        tensors: Tensors = load_file(file)
    except FileNotFoundError:
        raise CheckpointError(f"{file.name} is missing in {file.parent}") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is truncated or corrupt: {error}") from None
    return tensors


def _write_json(file: Path, contents: dict[str, Any]) -> None:
    file.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
