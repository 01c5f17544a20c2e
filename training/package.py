"""All that training takes from the package's inside: the layout, and the markup of its tokenizer."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from vllm_cosmos3.checkpoint import synthetic as writer
from vllm_cosmos3.checkpoint.config import read_config, read_vision_config
from vllm_cosmos3.checkpoint.derived import DERIVED_KINDS, write_derived
from vllm_cosmos3.checkpoint.layout.files import published_files
from vllm_cosmos3.checkpoint.layout.sizes import SIZES, Size
from vllm_cosmos3.checkpoint.synthetic.random_weights import draw
from vllm_cosmos3.checkpoint.synthetic.tokenizer import (
    PLAIN,
    SPECIAL,
    token_ids,
    train_tokenizer,
    write_tokenizer,
)
from vllm_cosmos3.checkpoint.tensors import (
    sound_tensors,
    transformer_tensors,
    vae_tensors,
    vision_tensors,
)

SPECIAL_MARKUP, MARKUP = SPECIAL, (*SPECIAL, *PLAIN)
plain_tokenizer = train_tokenizer
Tensors = dict[str, torch.Tensor]


def layout(size: dict[str, Any], rows: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """The JSON files of a base checkpoint of this size, by path."""
    return published_files(Size(**size), "base", rows, token_ids(tokenizer), "bfloat16")


def sound_autoencoder(decoder: int, encoder: int) -> torch.nn.Module:
    """The package's sound autoencoder with these widths; its tensors have the published names."""
    from vllm_cosmos3.generator.models.sound import SoundVAE

    size = replace(SIZES["tiny"], sound_decoder_dim=decoder, sound_encoder_dim=encoder)
    with tempfile.TemporaryDirectory() as folder:
        for name, contents in published_files(
            size, "base", 1024, defaultdict(int), "bfloat16"
        ).items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(contents))
        config = read_config(Path(folder)).sound
    assert config is not None
    return SoundVAE(config, encoder=True)


def write_tokenizers(tokenizer: Tokenizer, folder: Path) -> None:
    """The tokenizer's files at both places where readers look for them."""
    for place in (folder, folder / "text_tokenizer"):
        write_tokenizer(tokenizer, place)


def expected(folder: Path) -> dict[str, dict[str, tuple[int, ...]]]:
    """Part -> tensors that a folder's configuration asks for."""
    config = read_config(folder)
    return {
        "transformer": transformer_tensors(config.transformer),
        "vision_encoder": vision_tensors(read_vision_config(folder)),
        "vae": vae_tensors(config.vae),
        "sound_tokenizer": sound_tensors(config.sound) if config.sound else {},
    }


def drawn(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> Tensors:
    """Random tensors, as of a checkpoint that was never trained."""
    return draw(shapes, 0, dtype)


def write_shards(folder: Path, prefix: str, tensors: Tensors, count: int) -> dict[str, str]:
    """``count`` files of about equal length, and an index where there are several."""
    return writer._write_shards(folder, prefix, tensors, count)


def write_index(file: Path, where: dict[str, str], tensors: Tensors) -> None:
    """An index: which file holds what."""
    writer._write_index(file, where, tensors)


__all__ = [
    "DERIVED_KINDS", "MARKUP", "SPECIAL_MARKUP", "drawn", "expected", "layout", "plain_tokenizer", "save_file",
    "sound_autoencoder", "write_derived", "write_index", "write_shards", "write_tokenizers",
]  # fmt: skip
