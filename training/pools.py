"""Pools of training data on the device: latents of many clips, their texts, chats about them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from training.autoencoder import Autoencoder
from training.captions import Caption, draw_caption
from training.prompts import NEGATIVES, encoded, framed
from training.questions import QUESTIONS, Asked, draw_questions
from training.rendering import Packed, occupied, pack, render, to_bytes
from training.scenes import BASIC, GROWN, RATES, Canvas, Scene, draw_scene
from training.vision import looked_at

_CHUNK = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """N scenes with their words, without the scenes themselves.

    ``asked`` are QUESTIONS about each, one scene after the other, and ``seen`` the frames that they are about.
    """

    packed: Packed
    seen: Packed
    plain: list[str]
    structured: list[str]
    asked: list[Asked]
    rates: list[int]


def draw(first: int, count: int, canvas: Canvas, *, grown: bool, workers: int) -> Drawn:
    """Scenes ``first`` to ``first + count``. Processes are forked: before CUDA starts."""
    starts = range(first, first + count, _CHUNK)
    jobs = [(start, min(_CHUNK, first + count - start), canvas, grown) for start in starts]
    if workers == 1:
        parts = [_draw_chunk(*job) for job in jobs]
    else:
        with drawing(workers) as pool:
            parts = list(pool.map(_draw_chunk, *zip(*jobs, strict=True)))
    packed = (
        Packed(*(torch.cat([torch.from_numpy(p[which][i]) for p in parts]) for i in range(3)))
        for which in (0, 1)
    )
    lists = ([x for p in parts for x in p[i]] for i in range(2, 6))
    return Drawn(*packed, *lists)


def drawing(workers: int) -> ProcessPoolExecutor:
    """Processes that draw scenes, of one thread each. They are forked: before CUDA starts."""
    return ProcessPoolExecutor(
        workers, get_context("fork"), initializer=torch.set_num_threads, initargs=(1,)
    )


def _draw_chunk(first: int, count: int, canvas: Canvas, grown: bool) -> tuple[Any, ...]:  # noqa: FBT001 - map gives it by place
    scenes = scenes_at(range(first, first + count), canvas, grown=grown)
    plain = [framed(draw_caption(s).text, s.canvas) for s in scenes]
    structured = [framed(draw_caption(s, 1.0).text, s.canvas) for s in scenes]
    shown = [s for s in scenes for _ in range(QUESTIONS)]
    asked = [one for s in scenes for one in draw_questions(s, random.Random(s.seed ^ 0xA5C))]
    arrays = (
        [p.things.numpy(), p.gripper.numpy(), p.tone.numpy()]
        for p in (pack(scenes), looked_at(shown, asked))
    )
    return *arrays, plain, structured, asked, [s.canvas.fps for s in scenes]


def scenes_at(
    seeds: Sequence[int],
    canvas: Canvas,
    *,
    grown: bool,
    materials: tuple[str, ...] = ("rubber",),
) -> list[Scene]:
    """Scenes on a canvas of this size and length, at rates that their seeds choose."""
    kinds = GROWN if grown else BASIC
    rates = [random.Random(seed).choice(RATES) for seed in seeds]
    sized = (Canvas(canvas.width, canvas.height, canvas.frames, fps) for fps in rates)
    return [draw_scene(s, c, kinds, materials) for s, c in zip(seeds, sized, strict=True)]


def _vae_of(folder: Path) -> tuple[dict[str, Tensor], list[float], list[float], int]:
    """Tensors, mean and deviation of the latents, and channels used: of a part, or of a checkpoint."""
    if (folder / "vae.json").exists():
        facts = json.loads((folder / "vae.json").read_text())
        return load_file(folder / "vae.safetensors"), facts["mean"], facts["std"], facts["used"]
    config = json.loads((folder / "vae" / "config.json").read_text())
    weights = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    used = int(weights["post_quant_conv.weight"].flatten(2).abs().sum((0, 2)).count_nonzero())
    return weights, config["latents_mean"], config["latents_std"], used


class Codec:
    """The trained autoencoder, of a part or a checkpoint, with normalised latents of its used channels."""

    def __init__(self, folder: Path, encoder: int, decoder: int, device: str) -> None:
        weights, mean, std, self.used = _vae_of(folder)
        self.device = device
        self.vae = (
            Autoencoder(encoder, decoder, self.used).to(device).requires_grad_(requires_grad=False)
        )
        self.vae.load_state_dict({k: v.float() for k, v in weights.items()})
        self.mean, self.std = (torch.tensor(x, device=device)[: self.used] for x in (mean, std))

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16):
            mean, _ = self.vae.moments(pixels)
        return (mean[..., : self.used] - self.mean) / self.std

    @torch.no_grad()
    def decode(self, latents: Tensor, batch: int = 16) -> Tensor:
        """uint8 [B, T, H, W, 3]."""
        clips = []
        for part in latents.split(batch):
            raw = F.pad(part * self.std + self.mean, (0, 48 - self.used))
            with torch.autocast(self.device, torch.bfloat16):
                clips.append(to_bytes(self.vae.pixels(raw)))
        return torch.cat(clips)


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """Clips of one canvas size. Texts are plain or structured; ``none`` are dropped prompts.

    ``things`` [N, T, h, w] marks latent positions at which something is.
    """

    canvas: Canvas
    latents: Tensor
    things: Tensor
    plain: tuple[Tensor, Tensor]
    structured: tuple[Tensor, Tensor]
    none: tuple[Tensor, Tensor]
    none_structured: tuple[Tensor, Tensor]
    which: Tensor
    fps: Tensor


def make_pool(
    drawn: Drawn, canvas: Canvas, codec: Codec, tokenizer: Tokenizer, batch: int = 32
) -> Pool:
    """Encode clips and texts."""
    device = codec.device
    latents, things = [], []
    for i in range(0, len(drawn.rates), batch):
        part = drawn.packed.take(slice(i, i + batch)).to(device)
        pixels = render(part, canvas.height, canvas.width)
        latents.append(codec.encode(pixels).bfloat16())
        things.append(cells(occupied(pixels)))
    bare = [Canvas(canvas.width, canvas.height, canvas.frames, fps) for fps in RATES]
    none = [framed(text, c, negative=True) for c in bare for text in NEGATIVES]

    def texts(positive: list[str]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        ids, lengths = encoded(tokenizer, positive)
        empty = encoded(tokenizer, none, ids.shape[1])
        return (ids.to(device), lengths.to(device)), tuple(x.to(device) for x in empty)

    plain, none_plain = texts(drawn.plain)
    structured, none_structured = texts(drawn.structured)
    rates = torch.tensor(drawn.rates, device=device)
    which = (rates[:, None] == torch.tensor(RATES, device=device)).float().argmax(1)
    return Pool(
        canvas, torch.cat(latents), torch.cat(things), plain, structured,
        none_plain, none_structured, which, rates.float(),
    )  # fmt: skip


def cells(there: Tensor) -> Tensor:
    """Pixels [B, 4k + 1, H, W] marked, as latent positions [B, k + 1, h, w] marked."""
    marked = F.max_pool2d(there.float().flatten(0, 1).unsqueeze(1), 16).squeeze(1)
    marked = marked.unflatten(0, there.shape[:2])
    if there.shape[1] == 1:
        return marked > 0
    later = marked[:, 1:].unflatten(1, (-1, 4)).amax(2)
    return torch.cat([marked[:, :1], later], 1) > 0


def held_out(
    first: int, count: int, canvas: Canvas, *, grown: bool = False
) -> tuple[list[Scene], list[Caption]]:
    """Scenes that are not trained on, with their prompts."""
    scenes = scenes_at(range(first, first + count), canvas, grown=grown)
    return scenes, [draw_caption(scene) for scene in scenes]
