"""Streams of latents in the generation tower's sequence, in batches: videos, sounds, actions.

Each says how its latents become tokens, which of these are told the timestep, where they lie and how a
velocity is read off them. Streams of one sequence start at the same time and see each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from training.transformer import Shape, Transformer


@dataclass(frozen=True, slots=True, eq=False)
class Video:
    """Latents [B, T, h, w, C], as many channels as there are, the first of them.

    ``known`` [B, T] frames are given: of a control all are. ``fps`` [B] are those of its pixels.
    """

    x: Tensor
    known: Tensor
    fps: Tensor

    def tokens(self, model: Transformer) -> Tensor:
        s = model.shape
        weight = model.proj_in.weight.view(s.hidden, -1, s.latent)[..., : self.x.shape[-1]]
        return F.linear(patches(self.x, s.patch), weight.flatten(1), model.proj_in.bias)

    def noisy(self, shape: Shape) -> Tensor:
        count = (self.x.shape[2] // shape.patch) * (self.x.shape[3] // shape.patch)
        return (~self.known).repeat_interleave(count, 1)

    def free(self) -> Tensor:
        return ~self.known[:, :, None, None, None]

    def places(self, lengths: Tensor, shape: Shape) -> Tensor:
        t, h, w = self.x.shape[1:4]
        grid = t, h // shape.patch, w // shape.patch
        return vision_places(grid, lengths, self.fps, shape)

    def velocity(self, model: Transformer, tokens: Tensor) -> Tensor:
        s, channels = model.shape, self.x.shape[-1]
        weight = model.proj_out.weight.view(-1, s.latent, s.hidden)[:, :channels].flatten(0, 1)
        bias = model.proj_out.bias.view(-1, s.latent)[:, :channels].flatten()
        t, h, w = self.x.shape[1:4]
        grid = t, h // s.patch, w // s.patch
        return unpatched(F.linear(tokens, weight, bias).float(), grid, s.patch)


@dataclass(frozen=True, slots=True, eq=False)
class Actions:
    """Rows [B, T, width of the model], one for each frame but the first, at the rate ``fps`` [B].

    Only the first ``channels`` carry numbers; the others are zero. ``known`` [B, T] rows are given.
    """

    x: Tensor
    known: Tensor
    fps: Tensor
    domain: int
    channels: int

    def tokens(self, model: Transformer) -> Tensor:
        part = model.action_proj_in
        weight = part.fc.weight[self.domain].view(self.x.shape[-1], -1)
        return self.x @ weight + part.bias.weight[self.domain] + model.action_modality_embed

    def noisy(self, shape: Shape) -> Tensor:
        return ~self.known

    def free(self) -> Tensor:
        used = torch.arange(self.x.shape[-1], device=self.x.device) < self.channels
        return ~self.known.unsqueeze(-1) & used

    def places(self, lengths: Tensor, shape: Shape) -> Tensor:
        index = torch.arange(self.x.shape[1], device=lengths.device) + 1
        times = index / self.fps[:, None] * (shape.base_fps / 4)
        return _on_time_axis(times + _start(lengths, shape)[:, None])

    def velocity(self, model: Transformer, tokens: Tensor) -> Tensor:
        part = model.action_proj_out
        weight = part.fc.weight[self.domain].view(-1, self.x.shape[-1])
        return (tokens @ weight.to(tokens.dtype)).float() + part.bias.weight[self.domain].float()


@dataclass(frozen=True, slots=True, eq=False)
class Sound:
    """Latents [B, T, C] at the rate of the sound autoencoder; all of them are denoised."""

    x: Tensor

    def tokens(self, model: Transformer) -> Tensor:
        return model.audio_proj_in(self.x) + model.audio_modality_embed

    def noisy(self, shape: Shape) -> Tensor:
        return torch.ones(self.x.shape[:2], dtype=torch.bool, device=self.x.device)

    def free(self) -> Tensor:
        return torch.ones((1, 1, 1), dtype=torch.bool, device=self.x.device)

    def places(self, lengths: Tensor, shape: Shape) -> Tensor:
        index = torch.arange(self.x.shape[1], device=lengths.device)
        times = index / shape.sound_fps * shape.base_fps
        return _on_time_axis(times + _start(lengths, shape)[:, None])

    def velocity(self, model: Transformer, tokens: Tensor) -> Tensor:
        return model.audio_proj_out(tokens).float()


def patches(x: Tensor, p: int) -> Tensor:
    """Latents [B, T, h, w, C] as tokens [B, T * rows * columns, p * p * C]."""
    x = x.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 1, 2, 4, 3, 5, 6)
    return x.flatten(4).flatten(1, 3)


def unpatched(tokens: Tensor, grid: tuple[int, int, int], p: int) -> Tensor:
    """The inverse of `patches` for a grid of (frames, rows, columns)."""
    x = tokens.unflatten(2, (p, p, -1)).unflatten(1, grid)
    return x.permute(0, 1, 2, 4, 3, 5, 6).flatten(4, 5).flatten(2, 3)


def vision_places(grid: tuple[int, int, int], lengths: Tensor, fps: Tensor, s: Shape) -> Tensor:
    """[3, B, S]: time after the text and the margin, row, column."""
    t, rows, columns = grid
    device, count = lengths.device, len(lengths)
    frames = torch.arange(t, device=device)
    # The order of the operations is the package's: float32 rounds to 0.001 here.
    times = frames / (fps[:, None] / 4) * (s.base_fps / 4) if t > 1 else frames.float()[None]
    times = (times + _start(lengths, s)[:, None])[:, :, None, None].expand(count, t, rows, columns)
    y = torch.arange(rows, device=device).float()[None, None, :, None].expand_as(times)
    x = torch.arange(columns, device=device).float()[None, None, None].expand_as(times)
    return torch.stack([times, y, x]).flatten(2)


def flattened(parts: Sequence[Tensor]) -> Tensor:
    """Latents of several streams as one tensor [B, N]."""
    return torch.cat([x.flatten(1) for x in parts], 1)


def separated(x: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `flattened`, for tensors of the shapes of ``like``."""
    split = x.split([one[0].numel() for one in like], 1)
    return [part.view_as(one) for part, one in zip(split, like, strict=True)]


def _start(lengths: Tensor, s: Shape) -> Tensor:
    return lengths.float() + s.margin


def _on_time_axis(times: Tensor) -> Tensor:
    return torch.stack([times, torch.zeros_like(times), torch.zeros_like(times)])
