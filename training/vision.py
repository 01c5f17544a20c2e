"""The reasoner's side of training: Qwen3-VL's vision encoder, and chats with a video in them.

The language model is the understanding tower of `transformer.Transformer`. Every clip is seen as the
product sees a short one: four frames, evenly spaced, two at a time, each pair after its timestamp.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from training.questions import Asked
from training.rendering import Packed, pack
from training.scenes import Canvas, Scene
from training.transformer import Transformer, rotary

PATCH, MERGE, PAIR = 16, 2, 2


def seen_frames(frames: int) -> tuple[int, ...]:
    """Indices of the four frames that are looked at."""
    return tuple(int(i) for i in np.linspace(0, frames - 1, 4).round())


def looked_at(scenes: Sequence[Scene], asked: Sequence[Asked]) -> Packed:
    """Numbers of the frames that each question lets see, with the jump that it puts in."""
    frames = [seen_frames(a.frames or s.canvas.frames) for s, a in zip(scenes, asked, strict=True)]
    packed = pack(scenes).at(torch.tensor(frames))
    for row, (one, chosen) in enumerate(zip(asked, frames, strict=True)):
        if one.jump is not None:
            later = torch.tensor(chosen) >= one.jump.frame
            packed.things[row, one.jump.thing, :, 1] += one.jump.down * later
    return packed


@dataclass(frozen=True, slots=True)
class VisionShape:
    """What `vision_encoder/config.json` says."""

    out: int = 256
    width: int = 64
    depth: int = 4
    heads: int = 4
    intermediate: int = 128
    side: int = 8
    deepstack: tuple[int, ...] = (1, 2, 3)


class VisionBlock(nn.Module):
    def __init__(self, s: VisionShape) -> None:
        super().__init__()
        self.heads = s.heads
        self.norm1, self.norm2 = nn.LayerNorm(s.width, 1e-6), nn.LayerNorm(s.width, 1e-6)
        self.attn = nn.ModuleDict(
            {"qkv": nn.Linear(s.width, 3 * s.width), "proj": nn.Linear(s.width, s.width)}
        )
        self.mlp = nn.ModuleDict(
            {
                "linear_fc1": nn.Linear(s.width, s.intermediate),
                "linear_fc2": nn.Linear(s.intermediate, s.width),
            }
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = (y * cos.to(y.dtype) + _half_turned(y) * sin.to(y.dtype) for y in (q, k))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.attn["proj"](out)
        hidden = F.gelu(self.mlp["linear_fc1"](self.norm2(x)), approximate="tanh")
        return x + self.mlp["linear_fc2"](hidden)


def _half_turned(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


class Merger(nn.Module):
    """Four neighbouring patches to one token; ``after``: the norm comes after the merging."""

    def __init__(self, s: VisionShape, *, after: bool) -> None:
        super().__init__()
        merged = s.width * MERGE**2
        self.norm = nn.LayerNorm(merged if after else s.width, 1e-6)
        self.linear_fc1, self.linear_fc2 = nn.Linear(merged, merged), nn.Linear(merged, s.out)
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        joined = (x.shape[0], x.shape[1] // MERGE**2, -1)
        x = self.norm(x.reshape(joined)) if self.after else self.norm(x).reshape(joined)
        return self.linear_fc2(F.gelu(self.linear_fc1(x)))


class VisionEncoder(nn.Module):
    """Pixels [B, 4, H, W, 3] in [-1, 1] to what the language model takes: tokens and deepstack."""

    def __init__(self, s: VisionShape, canvas: Canvas) -> None:
        super().__init__()
        self.rows, self.columns = canvas.height // PATCH, canvas.width // PATCH
        self.deepstack = s.deepstack
        kernel = (PAIR, PATCH, PATCH)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(3, s.width, kernel, kernel)})
        self.pos_embed = nn.Embedding(s.side**2, s.width)
        nn.init.normal_(self.pos_embed.weight, std=0.1)
        self.blocks = nn.ModuleList(VisionBlock(s) for _ in range(s.depth))
        self.merger = Merger(s, after=False)
        self.deepstack_merger_list = nn.ModuleList(Merger(s, after=True) for _ in s.deepstack)
        r, c = self._places()
        cos, sin = _angles(r, c, s.width // s.heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        weights = _bilinear(r, c, self.rows, self.columns, s.side)
        self.register_buffer("places", weights, persistent=False)

    def _places(self) -> tuple[Tensor, Tensor]:
        """Row and column of each patch, the four of a token together."""
        grid = torch.meshgrid(torch.arange(self.rows), torch.arange(self.columns), indexing="ij")
        blocks = (g.unflatten(1, (-1, MERGE)).unflatten(0, (-1, MERGE)) for g in grid)
        r, c = (b.permute(0, 2, 1, 3).flatten() for b in blocks)
        return r, c

    def forward(self, pixels: Tensor) -> list[Tensor]:
        b = pixels.shape[0]
        x = pixels.unflatten(3, (self.columns // MERGE, MERGE, PATCH))
        x = x.unflatten(2, (self.rows // MERGE, MERGE, PATCH)).unflatten(1, (-1, PAIR))
        x = x.permute(0, 1, 3, 6, 4, 7, 9, 2, 5, 8).flatten(6).flatten(2, 5).flatten(0, 1)
        proj = self.patch_embed["proj"]
        x = F.linear(x, proj.weight.flatten(1), proj.bias)
        x = x + (self.places @ self.pos_embed.weight).to(x.dtype)
        kept = []
        for i, block in enumerate(self.blocks):
            x = block(x, self.cos, self.sin)
            if i in self.deepstack:
                kept.append(self.deepstack_merger_list[self.deepstack.index(i)](x))
        return [y.unflatten(0, (b, -1)).flatten(1, 2) for y in (self.merger(x), *kept)]


def _angles(r: Tensor, c: Tensor, head: int) -> tuple[Tensor, Tensor]:
    inverse = 1.0 / 10000 ** (torch.arange(0, head // 2, 2).float() / (head // 2))
    angle = torch.cat([r[:, None] * inverse, c[:, None] * inverse] * 2, 1)
    return angle.cos(), angle.sin()


def _bilinear(r: Tensor, c: Tensor, rows: int, columns: int, side: int) -> Tensor:
    """Weights [S, side * side] of the learned positions for each patch, corners aligned."""
    y, x = r * (side - 1) / (rows - 1), c * (side - 1) / (columns - 1)
    weight = torch.zeros(len(r), side * side)
    for dy in (0, 1):
        for dx in (0, 1):
            yy, xx = (y.floor() + dy).clamp(max=side - 1), (x.floor() + dx).clamp(max=side - 1)
            share = (1 - (y - y.floor() - dy).abs()) * (1 - (x - x.floor() - dx).abs())
            weight.scatter_add_(1, (yy * side + xx).long()[:, None], share[:, None])
    return weight


def hidden_states(
    model: Transformer,
    vision: VisionEncoder,
    pixels: Tensor,
    ids: Tensor,
    slot: Tensor,
    places: Tensor,
) -> Tensor:
    """[B, L, hidden] before the head; ``slot`` [B, L] is 0 for text, else a token of the video."""
    seen = [torch.cat([torch.zeros_like(y[:, :1]), y], 1) for y in vision(pixels)]
    index = slot.unsqueeze(-1).expand(-1, -1, seen[0].shape[-1])
    seen = [y.gather(1, index) for y in seen]
    x = torch.where(slot.unsqueeze(-1) > 0, seen[0], model.embed_tokens(ids).to(seen[0].dtype))
    table = rotary(places, model.shape)
    for i, layer in enumerate(model.layers):
        x, _, _ = layer.understand(x, table)
        if i + 1 < len(seen):
            x = x + seen[i + 1]
    return model.norm(x)


@dataclass(frozen=True, slots=True, eq=False)
class Chats:
    """Questions with their answers, as tensors [N, L]; ``places`` [3, N, L].

    ``target`` is True where the next token belongs to the answer; ``starts`` is the length of each
    question.
    """

    ids: Tensor
    slot: Tensor
    places: Tensor
    target: Tensor
    starts: Tensor


class ChatFrame:
    """Texts of chats about clips of one canvas size."""

    def __init__(self, tokenizer: Tokenizer, canvas: Canvas) -> None:
        self.tokenizer, self.length = tokenizer, canvas.frames
        self.rows, self.columns = canvas.height // PATCH // MERGE, canvas.width // PATCH // MERGE
        self._made: dict[object, tuple[list[int], list[int], np.ndarray]] = {}

    def pack(self, asked: Sequence[Asked], rates: Sequence[int], seed: int | None = None) -> Chats:
        """Chats about clips of these frame rates; with a seed, in all the ways that they are framed.

        The clip stands before or after the question. transformers 5.10 and later write a marker
        before and after all of it, besides those of each pair of frames.
        """
        rng = random.Random(seed)
        vary = seed is not None
        texts = [f"{one.answer}<|im_end|>\n" for one in asked]
        said = [e.ids for e in self.tokenizer.encode_batch(texts)]
        prompts = [
            self._prompt(
                fps,
                seen_frames(one.frames or self.length),
                one.question,
                not vary or rng.random() < 0.7,
                not vary or rng.random() < 0.6,
            )
            for one, fps in zip(asked, rates, strict=True)
        ]
        longest = max(len(p[0]) + len(a) for p, a in zip(prompts, said, strict=True))
        count, length = len(asked), -(-longest // 8) * 8
        ids, slot = np.zeros((count, length), np.int64), np.zeros((count, length), np.int64)
        places = np.zeros((3, count, length), np.float32)
        target = np.zeros((count, length), bool)
        for i, ((head, slots, where), answer) in enumerate(zip(prompts, said, strict=True)):
            start, end = len(head), len(head) + len(answer)
            ids[i, :end], slot[i, :start] = head + answer, slots
            places[:, i, :start] = where
            places[:, i, start:] = where.max() + 1 + np.arange(length - start)
            target[i, start - 1 : end - 2] = True  # not the line end after the closing token
        starts = np.array([len(p[0]) for p in prompts])
        return Chats(*map(torch.from_numpy, (ids, slot, places, target, starts)))

    def _prompt(
        self,
        fps: int,
        frames: tuple[int, ...],
        question: str,
        video_first: bool,  # noqa: FBT001
        wrapped: bool,  # noqa: FBT001
    ) -> tuple[list[int], list[int], np.ndarray]:
        key = (fps, frames, question, video_first, wrapped)
        if key not in self._made:
            self._made[key] = self._placed(self._text(*key))
        return self._made[key]

    def _text(
        self,
        fps: int,
        frames: tuple[int, ...],
        question: str,
        video_first: bool,  # noqa: FBT001
        wrapped: bool,  # noqa: FBT001
    ) -> str:
        a, b, c, d = frames
        pads = "<|video_pad|>" * (self.rows * self.columns)
        video = "".join(
            f"<{t:.1f} seconds><|vision_start|>{pads}<|vision_end|>"
            for t in ((a + b) / 2 / fps, (c + d) / 2 / fps)
        )
        if wrapped:
            video = f"<|vision_start|>{video}<|vision_end|>"
        text = video + question if video_first else question + video
        return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"

    def _placed(self, text: str) -> tuple[list[int], list[int], np.ndarray]:
        """Token ids, video slots and places of a prompt."""
        ids = self.tokenizer.encode(text).ids
        pad = self.tokenizer.token_to_id("<|video_pad|>")
        slot: list[int] = []
        places: list[tuple[int, int, int]] = []
        now = taken = 0
        while len(slot) < len(ids):
            if ids[len(slot)] != pad:
                slot.append(0)
                places.append((now, now, now))
                now += 1
                continue
            for y in range(self.rows):
                for x in range(self.columns):
                    taken += 1
                    slot.append(taken)
                    places.append((now, now + y, now + x))
            now += max(self.rows, self.columns)
        return ids, slot, np.array(places, np.float32).T


@torch.no_grad()
def answers(
    model: Transformer,
    vision: VisionEncoder,
    frame: ChatFrame,
    pixels: Tensor,
    asked: Sequence[Asked],
    rates: Sequence[int],
    most: int = 56,
) -> list[str]:
    """Greedy answers about clips ``pixels`` [B, 4, H, W, 3], without a cache."""
    device = pixels.device
    chats = frame.pack(asked, rates)
    extra = torch.zeros(len(asked), most, dtype=torch.long)
    ids = torch.cat([chats.ids, extra], 1).to(device)
    slot = torch.cat([chats.slot, extra], 1).to(device)
    tail = chats.places[:, :, -1:] + torch.arange(1, most + 1)
    places = torch.cat([chats.places, tail], 2).to(device)
    place, rows = chats.starts.to(device), torch.arange(len(asked), device=device)
    said = torch.zeros(len(asked), most, dtype=torch.long, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        for j in range(most):
            hidden = hidden_states(model, vision, pixels, ids, slot, places)
            token = model.lm_head(hidden[rows, place - 1]).argmax(-1)
            said[:, j] = ids[rows, place] = token
            place = place + 1
    end = frame.tokenizer.token_to_id("<|im_end|>")
    lists = [row[: row.index(end)] if end in row else row for row in said.tolist()]
    return [frame.tokenizer.decode(row) for row in lists]
