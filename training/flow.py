"""Flow matching: noise levels of the product's schedule, noised streams, and the loss of video after text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from training.pools import Pool
from training.streams import Actions, Sound, Video
from training.transformer import Transformer

AnyStream = TypeVar("AnyStream", Video, Actions, Sound, Video | Actions | Sound)


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """How noise, given frames and dropped prompts are drawn, and what an error weighs."""

    shift: float = 8.0
    dropped: float = 0.1
    empty: float = 0.3  # of the dropped
    one_given: float = 0.25
    two_given: float = 0.05
    things: float = 3.0  # additional weight where something is and the noise level shows it


def drawn_levels(batch: int, shift: float, device: torch.device) -> Tensor:
    """Noise levels [B], one in each of as many equal parts of the schedule."""
    u = (torch.arange(batch, device=device) + torch.rand(batch, device=device)) / batch
    return shift * u / (1 + (shift - 1) * u)


def mixed(streams: Sequence[AnyStream], sigma: Tensor) -> tuple[list[AnyStream], list[Tensor]]:
    """Streams with noise at the levels ``sigma`` [B] where they are free, and their velocities."""
    noised, targets = [], []
    for stream in streams:
        clean = stream.x
        level = sigma.view(-1, *[1] * (clean.ndim - 1)) * stream.free()
        noise = torch.randn_like(clean)
        noised.append(replace(stream, x=clean + level * (noise - clean)))
        targets.append(noise - clean)
    return noised, targets


def flow_loss(
    model: Transformer, pool: Pool, batch: int, flow: Flow, *, structured: bool
) -> Tensor:
    """Error of the velocity of a batch of clips."""
    device = pool.latents.device
    (ids, lengths), (none, none_lengths) = (
        (pool.structured, pool.none_structured) if structured else (pool.plain, pool.none)
    )
    with torch.no_grad():
        index = (torch.rand(batch, device=device) * len(pool.latents)).long()
        clean = pool.latents[index].float()
        sigma = drawn_levels(batch, flow.shift, device)
        given = torch.rand(batch, 1, device=device)
        frame = torch.arange(clean.shape[1], device=device)
        known = (given < flow.one_given) & (frame == 0) | (given < flow.two_given) & (frame == 1)
        known &= frame < frame[-1]  # something is left to make
        drop = torch.rand(batch, device=device) < flow.dropped
        other = pool.which[index] * 2 + (torch.rand(batch, device=device) < flow.empty)
        text = torch.where(drop[:, None], none[other], ids[index])
        length = torch.where(drop, none_lengths[other], lengths[index])
        (noised,), (target,) = mixed([Video(clean, known, pool.fps[index])], sigma)
        # Where the noise hides whether something is there, a weight would draw things into the mean.
        shown = ((0.8 - sigma) / 0.2).clamp(0, 1)[:, None, None, None]
        weight = (~known)[:, :, None, None] * (1 + flow.things * shown * pool.things[index])
    with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
        texts = model.understand(text)
        (v,) = model.velocities([noised], (sigma * 1000).floor(), texts, length)
    error = (v - target).square().mean(-1)
    return (error * weight).sum() / weight.sum()
