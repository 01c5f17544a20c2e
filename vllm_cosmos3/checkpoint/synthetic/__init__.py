"""Writes a random checkpoint in the published layout, for demonstrations, tests and sizing.

The tensors are those of the inventory of the JSON files that were just written: what this module
writes and what the loaders expect cannot drift apart.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from vllm_cosmos3.checkpoint.backbone import NEMOTRON
from vllm_cosmos3.checkpoint.config import (
    ModelConfig,
    read_config,
    read_json,
    read_vision_config,
    siglip_config,
)
from vllm_cosmos3.checkpoint.kinds import KINDS
from vllm_cosmos3.checkpoint.layout.files import published_files, with_fp8
from vllm_cosmos3.checkpoint.layout.sizes import SIZES
from vllm_cosmos3.checkpoint.synthetic.random_weights import draw, in_fp8
from vllm_cosmos3.checkpoint.synthetic.tokenizer import (
    MARKUP,
    spoken_ids,
    token_ids,
    train_tokenizer,
    write_tokenizer,
)
from vllm_cosmos3.checkpoint.tensors import (
    GENERATION,
    Tensors,
    siglip_tensors,
    sound_tensors,
    transformer_tensors,
    vae_tensors,
    vision_tensors,
)
from vllm_cosmos3.errors import CheckpointError, InvalidRequest

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
VOCABULARY_MULTIPLE = 64  # the embedding has a multiple of this many rows
TRANSFORMER_SHARDS = 2


def write_checkpoint(
    folder: Path,
    *,
    size: str = "tiny",
    kind: str = "base",
    seed: int = 0,
    dtype: str = "bfloat16",
    quantization: str = "none",
    weights: bool = True,
    force: bool = False,
) -> None:
    """Write a checkpoint of ``size`` into ``folder``; the same arguments give the same bytes.

    ``size`` is one of SIZES and ``kind`` one of `kinds.KINDS`; tiny alone can have weights. The
    size edge is that of the kinds with Nemotron's layers, nano and super are those of the others.
    ``dtype`` is that of the transformers and the video autoencoder. The sound autoencoder is always
    float32, as published. With the ``quantization`` fp8 the matrices of the layers are FP8, as in the
    published revisions of that name. Without ``weights`` only the configuration and the tokenizer are written.
    A folder that holds something other than a checkpoint is replaced only with ``force``.
    """
    if weights and size != "tiny":
        raise InvalidRequest("--size", size, "tiny, or given together with --no-weights")
    edge = KINDS[kind].backbone is NEMOTRON
    if size not in (("tiny", "edge") if edge else ("tiny", "nano", "super")):
        alike = [name for name in KINDS if KINDS[name].backbone is not KINDS[kind].backbone]
        raise InvalidRequest("--kind", kind, f"one of {', '.join(alike)} for the size {size}")
    _clear(folder, force=force)
    chosen = SIZES[size]
    markup = MARKUP[KINDS[kind].backbone.name]
    tokenizer = train_tokenizer(markup)
    for place in (folder, folder / "text_tokenizer"):
        write_tokenizer(tokenizer, place, markup)
    if not edge:
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        _write_json(folder / "chat_template.json", {"chat_template": template})

    tokens = tokenizer.get_vocab_size(with_added_tokens=True)
    vocab_size = chosen.vocab_size or -(-tokens // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    files = published_files(chosen, kind, vocab_size, token_ids(tokenizer, markup), dtype)
    if quantization == "fp8":
        files = with_fp8(files, kind)
    for name, contents in files.items():
        _write_json(folder / name, contents)
    if weights:
        _write_weights(folder, seed, DTYPES[dtype], spoken_ids(tokenizer))


def _clear(folder: Path, *, force: bool) -> None:
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file, must be a folder")
    if folder.exists() and any(folder.iterdir()):
        if not (force or (folder / "model_index.json").exists()):
            raise CheckpointError(
                f"{folder} holds files but no checkpoint; name another folder or pass --force"
            )
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be made: {error.strerror}") from None


def _write_weights(folder: Path, seed: int, dtype: torch.dtype, spoken: list[int]) -> None:
    config = read_config(folder)
    prefix = "diffusion_pytorch_model"
    transformer = draw(transformer_tensors(config.transformer), seed, dtype)
    transformer["lm_head.weight"] *= _rows(spoken, config.transformer.vocab_size, others=0.25)
    if config.quantization is not None:
        transformer = in_fp8(transformer)
    shards = _write_shards(folder / "transformer", prefix, transformer, TRANSFORMER_SHARDS)
    vision = draw(_vision_tensors(config), seed, dtype)
    encoder = _write_shards(folder / "vision_encoder", "model", vision, 1)

    # The root index is the reasoner's: it names both folders, and the generator's tensors too.
    root = {name: f"transformer/{file}" for name, file in _root_names(config, shards).items()}
    root |= {name: f"vision_encoder/{file}" for name, file in encoder.items()}
    _write_index(folder / "model.safetensors.index.json", root, {**transformer, **vision})

    vae = draw(vae_tensors(config.vae), seed, dtype)
    _write_shards(folder / "vae", prefix, vae, 1)
    if config.sound is not None:
        sound = draw(sound_tensors(config.sound), seed, torch.float32)
        _write_shards(folder / "sound_tokenizer", prefix, sound, 1)


def _vision_tensors(config: ModelConfig) -> Tensors:
    if config.transformer.backbone is NEMOTRON:
        return siglip_tensors(siglip_config(read_json(config.path / "config.json")))
    return vision_tensors(read_vision_config(config.path))


def _root_names(config: ModelConfig, shards: dict[str, str]) -> dict[str, str]:
    """What the root index says of the transformer's files.

    Edge's leaves the generator's tensors out. Its policy's misspells the norms that are both towers'.
    """
    if config.transformer.backbone is not NEMOTRON:
        return shards
    shared = {name: file for name, file in shards.items() if not GENERATION.search(name)}
    if config.kind == "edge":
        return shared
    twice = {name: f"layers.{name}" for name in shared if "k_norm_und_for_gen" in name}
    return {twice.get(name, name): file for name, file in shared.items()}


def _rows(chosen: list[int], count: int, *, others: float) -> torch.Tensor:
    """One factor per row: 1 for the ``chosen``, ``others`` for the rest."""
    factors = torch.full((count, 1), others)
    factors[chosen] = 1.0
    return factors


def _write_shards(
    folder: Path, prefix: str, tensors: dict[str, torch.Tensor], count: int
) -> dict[str, str]:
    """Write ``tensors`` as ``count`` files of about equal length and return name -> file."""
    folder.mkdir(exist_ok=True)
    names = list(tensors)
    length = -(-len(names) // count)
    where: dict[str, str] = {}
    for index in range(count):
        number = f"-{index + 1:05d}-of-{count:05d}" if count > 1 else ""
        file = f"{prefix}{number}.safetensors"
        part = names[index * length : (index + 1) * length]
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    if count > 1:
        _write_index(folder / f"{prefix}.safetensors.index.json", where, tensors)
    return where


def _write_index(file: Path, where: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
    total = sum(tensor.nbytes for name, tensor in tensors.items() if name in where)
    _write_json(
        file, {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    )


def _write_json(file: Path, contents: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
