"""Models and data of a training of the towers, put together before its first step."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn

from training.pools import Codec, Drawn, Pool, make_pool
from training.questions import QUESTIONS
from training.rendering import Packed
from training.scenes import Canvas
from training.transformer import Shape, Transformer, is_text
from training.vision import ChatFrame, Chats, VisionEncoder, VisionShape

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNTRAINED = {("actions", "policy"): "action_", ("sound",): "audio_"}  # rest unless a mode is taught


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """Everything that a run works with."""

    model: Transformer
    vision: VisionEncoder
    codec: Codec
    tokenizer: Tokenizer
    pool: Pool
    chats: Chats
    clips: Packed
    frame: ChatFrame


def assemble(a: argparse.Namespace, drawn: Drawn, canvas: Canvas) -> Parts:
    """Models, new or from weights, and the data that they learn from."""
    began = time.time()
    tokenizer = Tokenizer.from_file(a.tokenizer)
    codec = Codec(Path(a.vae), a.encoder, a.decoder, DEVICE)
    pool = make_pool(drawn, canvas, codec, tokenizer)
    frame = ChatFrame(tokenizer, canvas)
    rates = [rate for rate in drawn.rates for _ in range(QUESTIONS)]
    packed = frame.pack(drawn.asked, rates, seed=a.first)
    chats = Chats(*(getattr(packed, n).to(DEVICE) for n in Chats.__slots__))
    shape = Shape(layers=a.layers, intermediate=a.intermediate)
    model = Transformer(shape).to(DEVICE)
    model.ignore_channels(codec.used)
    vision = VisionEncoder(VisionShape(out=shape.hidden), canvas).to(DEVICE)
    started = {k: v.float() for file in a.init for k, v in load_file(file).items()}
    if started:
        model.load_state_dict({k: started[k] for k in model.state_dict()})
        vision.load_state_dict({k: started[k] for k in vision.state_dict()})
    keeps_text = a.changed or a.generation_only
    rest = tuple(prefix for modes, prefix in UNTRAINED.items() if not {*modes} & {*a.modes})
    for name, p in model.named_parameters():
        of_text = is_text(name) and not name.startswith(UNTRAINED["sound",])
        left = a.vision_only or name.startswith(rest) or (keeps_text and of_text)
        p.requires_grad_(not left)
    vision.requires_grad_(not keeps_text)
    print(
        f"{len(pool.latents)} clips encoded in {time.time() - began:.1f} s, latents "
        f"{tuple(pool.latents.shape)} std {pool.latents[:4096].float().std():.3f}, texts of "
        f"{pool.plain[0].shape[1]} and {pool.structured[0].shape[1]} tokens, chats of "
        f"{chats.ids.shape[1]}, {pool.things.float().mean():.3f} of the positions occupied, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters",
        flush=True,
    )
    return Parts(model, vision, codec, tokenizer, pool, chats, drawn.seen.to(DEVICE), frame)


def named(parts: Parts) -> list[tuple[str, nn.Parameter]]:
    """All parameters, the vision encoder's after a prefix."""
    vision = [(f"vision.{n}", p) for n, p in parts.vision.named_parameters()]
    return [*parts.model.named_parameters(), *vision]
