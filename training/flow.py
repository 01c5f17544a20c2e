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

Texts = tuple[Tensor, Tensor]  # ids [N, L], lengths [N]


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


def with_dropped(texts: Texts, none: Texts, other: Tensor, drop: Tensor) -> Texts:
    """Texts (ids [B, L], lengths [B]); where ``drop`` [B] is True, the dropped prompt ``other`` [B] of ``none``."""
    ids = torch.where(drop[:, None], none[0][other], texts[0])
    return ids, torch.where(drop, none[1][other], texts[1])


def weights_of(things: Tensor, free: Tensor, sigma: Tensor, weight: float) -> Tensor:
    """What the error at each latent position [B, T, h, w] counts: ``weight`` more where ``things`` are.

    Where the noise hides whether something is there, a weight would draw things into the mean.
    """
    shown = ((0.8 - sigma) / 0.2).clamp(0, 1)[:, None, None, None]
    return free * (1 + weight * shown * things)


def flow_loss(
    model: Transformer, pool: Pool, batch: int, flow: Flow, *, structured: bool
) -> Tensor:
    """Error of the velocity of a batch of clips."""
    device = pool.latents.device
    (ids, lengths), none = (
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
        text, length = with_dropped((ids[index], lengths[index]), none, other, drop)
        (noised,), (target,) = mixed([Video(clean, known, pool.fps[index])], sigma)
        weight = weights_of(pool.things[index], (~known)[:, :, None, None], sigma, flow.things)
    with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
        texts = model.understand(text)
        (v,) = model.velocities([noised], (sigma * 1000).floor(), texts, length)
    error = (v - target).square().mean(-1)
    return (error * weight).sum() / weight.sum()
