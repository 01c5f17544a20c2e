"""Clips from prompts in batches: the native schedule, UniPC of order 2 with its corrector, guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from math import expm1, log, log1p

import torch
from torch import Tensor

from training.streams import Video, flattened, separated
from training.transformer import Stream, Transformer


def schedule(steps: int, shift: float) -> list[float]:
    """Noise levels from 0.999 towards 0, shifted, and 0 at the end."""
    levels = [0.999 * (1 - j / steps) for j in range(steps)]
    return [shift * s / (1 + (shift - 1) * s) for s in levels] + [0.0]


def guided(
    model: Transformer,
    ids: Tensor,
    lengths: Tensor,
    fps: Tensor,
    known: Tensor,
    guidance: float,
) -> Callable[[Tensor, float], Tensor]:
    """Velocity at (latents, timestep). The first half of ``ids`` is asked for, the other avoided."""
    branches = 1 if guidance == 1 else 2
    count = len(known) * branches
    texts = model.understand(ids[:count])

    def velocity(x: Tensor, timestep: float) -> Tensor:
        video = Video(
            x.repeat(branches, 1, 1, 1, 1), known.repeat(branches, 1), fps.repeat(branches)
        )
        timesteps = torch.full((count,), timestep, device=x.device)
        (v,) = model.velocities([video], timesteps, texts, lengths[:count])
        if branches == 1:
            return v
        wanted, avoided = v.chunk(2)
        return avoided + guidance * (wanted - avoided)

    return velocity


def unguided(
    model: Transformer, ids: Tensor, lengths: Tensor, streams: Sequence[Stream]
) -> Callable[[Tensor, float], Tensor]:
    """Velocity at (latents of streams like these as one tensor [B, N], timestep), without guidance."""
    texts, like = model.understand(ids), [stream.x for stream in streams]

    def velocity(x: Tensor, timestep: float) -> Tensor:
        parts = zip(streams, separated(x, like), strict=True)
        moved = [replace(stream, x=part) for stream, part in parts]
        times = torch.full((len(ids),), timestep, device=x.device)
        return flattened(model.velocities(moved, times, texts, lengths))

    return velocity


@torch.no_grad()
def sample(
    velocity: Callable[[Tensor, float], Tensor],
    x: Tensor,
    free: Tensor,
    sigmas: Sequence[float],
) -> Tensor:
    """UniPC (bh2) from noise ``x``, in which values that are not ``free`` are given and stay."""
    clean = x.clone()
    estimates: list[Tensor] = []
    corrected, last_order = x, 0
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        estimate = x - sigma * velocity(x, float(int(sigma * 1000)))
        if last_order:
            x = _correct(corrected, estimate, estimates, last_order, sigmas, i)
        corrected, last_order = x, min(2, i + 1)
        if following == 0:
            x = estimate
        else:
            h = _log_snr(following) - _log_snr(sigma)
            weight = (1 - following) * expm1(-h)
            new = following / sigma * x - weight * estimate
            if last_order == 2:
                r = (_log_snr(sigmas[i - 1]) - _log_snr(sigma)) / h
                new = new - weight * 0.5 / r * (estimates[0] - estimate)
            x = new
        estimates = [estimate, *estimates[:1]]
        x = torch.where(free, x, clean)
    return x


def _correct(
    before_x: Tensor,
    estimate: Tensor,
    estimates: Sequence[Tensor],
    order: int,
    sigmas: Sequence[float],
    i: int,
) -> Tensor:
    now, before = sigmas[i], sigmas[i - 1]
    h = _log_snr(now) - _log_snr(before)
    phi = expm1(-h)
    if order == 1:
        slope = 0.5 * (estimate - estimates[0])
    else:
        r = (_log_snr(sigmas[i - 2]) - _log_snr(before)) / h
        k = phi / -h - 1
        b1, b2 = k / phi, 2 * (k / -h - 0.5) / phi
        rho = (b1 - b2) / (1 - r)
        slope = (rho / r) * (estimates[1] - estimates[0]) + (b1 - rho) * (estimate - estimates[0])
    return (now / before) * before_x - (1 - now) * phi * (estimates[0] + slope)


def _log_snr(sigma: float) -> float:
    return log1p(-sigma) - log(sigma)
