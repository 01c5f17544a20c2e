"""A complete checkpoint folder, in the published layout, from trained parts.

``python -m training.export FOLDER [PARTS ...]``, or for a checkpoint of another kind
``python -m training.export FOLDER --kind distilled-i2v --base checkpoints/demo --changed FILE``

PARTS are checkpoints, or folders with any of ``transformer-*.safetensors``, ``vision-*.safetensors``,
``vae.safetensors`` with ``vae.json``, ``sound.safetensors``, ``tokenizer.json``; later ones win. What
is in none of them is drawn at random; adapters of sound and actions are zero, sound is silence. Runs where the package
is installed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from training.package import (
    DERIVED_KINDS,
    Tensors,
    drawn,
    expected,
    layout,
    write_derived,
    write_index,
    write_shards,
    write_tokenizers,
)
from training.tokenizer import ROWS, train_demo_tokenizer
from training.train_sound import SOUND_WIDTHS
from training.transformer import Shape
from training.vision import VisionShape

PREFIX = "diffusion_pytorch_model"
ADAPTERS = ("action_", "audio_")  # tensors of the transformer that not every kind has
_SHAPE, _VISION = Shape(), VisionShape()
# The reasoner must see a clip as large as it is: 17 frames of 320x192 and 49 of 256x256 fit.
SIZE: dict[str, Any] = {
    "hidden_size": _SHAPE.hidden,
    "layers": _SHAPE.layers,
    "heads": _SHAPE.heads,
    "kv_heads": _SHAPE.kv_heads,
    "head_dim": _SHAPE.head_dim,
    "rope_axes": _SHAPE.axes,
    "intermediate_size": _SHAPE.intermediate,
    "vocab_size": ROWS,
    "vision_depth": _VISION.depth,
    "vision_hidden": _VISION.width,
    "vision_heads": _VISION.heads,
    "vision_intermediate": _VISION.intermediate,
    "vision_positions": _VISION.side**2,
    "vision_deepstack": _VISION.deepstack,
    "image_pixels": (4096, 65536),
    "video_pixels": (4096, 262144),
    "vae_base": 8,
    "vae_decoder_base": 16,
    "sound_decoder_dim": SOUND_WIDTHS[0],
    "sound_encoder_dim": SOUND_WIDTHS[1],
}


# Component of a folder -> how the files of a part with its tensors begin.
PREFIXES = {
    "transformer": "transformer",
    "vision_encoder": "vision",
    "vae": "vae",
    "sound_tokenizer": "sound",
}


def export(folder: Path, parts: Sequence[Path] = ()) -> None:
    """Write a base checkpoint from parts."""
    write_checkpoint(folder, _tokenizer(parts), _facts(parts), _trained(parts))


def _trained(parts: Sequence[Path]) -> dict[str, Tensors]:
    """The tensors of each component, of parts and of whole checkpoints."""
    return {
        name: {
            key: value
            for part in parts
            for file in sorted(
                [*part.glob(f"{prefix}*.safetensors"), *part.glob(f"{name}/*.safetensors")]
            )
            for key, value in load_file(file).items()
        }
        for name, prefix in PREFIXES.items()
    }


def write_checkpoint(
    folder: Path, tokenizer: Tokenizer, facts: dict[str, Any], trained: dict[str, Tensors]
) -> None:
    """A folder with the tensors of each component as far as they are known."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizers(tokenizer, folder)
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    files = layout(SIZE, ROWS, tokenizer) | {"chat_template.json": {"chat_template": template}}
    for name, contents in _changed(files, facts).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
    shapes = expected(folder)
    tensors = {name: _tensors(name, shapes[name], trained[name]) for name in PREFIXES}
    towers, vision = tensors["transformer"], tensors["vision_encoder"]
    where = _root(write_shards(folder / "transformer", PREFIX, towers, 2), "transformer")
    where |= _root(write_shards(folder / "vision_encoder", "model", vision, 1), "vision_encoder")
    write_index(folder / "model.safetensors.index.json", where, {**towers, **vision})
    for name in ("vae", "sound_tokenizer"):
        if tensors[name]:
            write_shards(folder / name, PREFIX, tensors[name], 1)


def _root(shards: dict[str, str], name: str) -> dict[str, str]:
    return {tensor: f"{name}/{file}" for tensor, file in shards.items()}


def _tokenizer(parts: Sequence[Path]) -> Tokenizer:
    for part in reversed(parts):
        if (part / "tokenizer.json").exists():
            return Tokenizer.from_file(str(part / "tokenizer.json"))
    return train_demo_tokenizer()


def _facts(parts: Sequence[Path]) -> dict[str, Any]:
    """What is known of the autoencoder's latents."""
    for part in reversed(parts):
        if (part / "vae.json").exists():
            facts: dict[str, Any] = json.loads((part / "vae.json").read_text())
            return facts
        if (part / "vae" / "config.json").exists():
            config = json.loads((part / "vae" / "config.json").read_text())
            return {"mean": config["latents_mean"], "std": config["latents_std"]}
    return {}


def _changed(files: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """The published files with what differs here: a base of the angles, the latents' statistics."""
    transformer, root, vae = (
        files[name] for name in ("transformer/config.json", "config.json", "vae/config.json")
    )
    text = {**root["text_config"], "rope_theta": _SHAPE.theta}
    return files | {
        "transformer/config.json": {**transformer, "rope_theta": _SHAPE.theta},
        "config.json": {**root, "text_config": text},
        "vae/config.json": {
            **vae,
            "latents_mean": facts.get("mean", vae["latents_mean"]),
            "latents_std": facts.get("std", vae["latents_std"]),
        },
        # Of the package's own negative prompt, 1,856 tokens, nothing was ever trained.
        "assets/negative_prompt.json": {},
    }


def _tensors(name: str, shapes: dict[str, tuple[int, ...]], trained: Tensors) -> Tensors:
    if not shapes:
        return {}
    dtype = torch.float32 if name == "sound_tokenizer" else torch.bfloat16
    tensors = drawn(shapes, dtype)
    for key in tensors:
        if name == "transformer" and key.startswith(ADAPTERS):
            tensors[key] = torch.zeros_like(tensors[key])
    if name == "sound_tokenizer":  # silence, where sound was never trained
        tensors["decoder.conv2.weight_g"] = torch.zeros_like(tensors["decoder.conv2.weight_g"])
    known = {k: v for k, v in trained.items() if k in shapes or not k.startswith(ADAPTERS)}
    for key, value in known.items():
        if shapes.get(key) != tuple(value.shape):
            raise SystemExit(f"{name}: {key} {tuple(value.shape)}, must be {shapes.get(key)}")
    print(f"{name}: {len(known)} of {len(tensors)} tensors trained")
    return tensors | {key: value.to(dtype) for key, value in known.items()}


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("folder", type=Path)
    p.add_argument("parts", type=Path, nargs="*")
    p.add_argument("--kind", choices=DERIVED_KINDS)
    p.add_argument("--base", type=Path, help="folder of the base checkpoint")
    p.add_argument("--changed", type=Path, help="safetensors with the tensors that differ")
    a = p.parse_args(argv)
    if a.kind:
        write_derived(a.folder, a.base, a.changed, a.kind)
    else:
        export(a.folder, a.parts)
    for file in sorted(a.folder.rglob("*.safetensors")):
        print(f"{file.stat().st_size / 2**20:7.2f} MiB  {file.relative_to(a.folder)}")


if __name__ == "__main__":
    main()
