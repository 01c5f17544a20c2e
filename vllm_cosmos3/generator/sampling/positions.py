"""Positions of all tokens on the three axes time, height and width, and their rotary angles.

Text counts up on all axes at once. The generated streams are siblings: they all start at the same
time, a margin after the text, and each advances at its own rate, so that equal times mean equal
moments. Positions are float32 and the products with the frequencies too: they reach 15,000, where
another precision would turn the fast frequencies visibly.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from vllm_cosmos3.checkpoint.config import TransformerConfig

TEMPORAL_COMPRESSION = 4  # pixel frames in one latent frame after the first


def text_positions(length: int) -> Tensor:
    """[3, length]: 0, 1, 2, ... on every axis."""
    return torch.arange(length, dtype=torch.float32).expand(3, -1)


def generation_start(text_length: int, config: TransformerConfig) -> float:
    """The time at which every generated stream begins. Differs between guidance branches."""
    return float(text_length + config.temporal_margin)


def vision_positions(
    frames: int, rows: int, columns: int, *, start: float, fps: float, config: TransformerConfig
) -> Tensor:
    """[3, frames * rows * columns] of a latent video's patches, time-major; ``fps`` of its pixels.

    Rows and columns count from 0 in every stream.
    """
    time = _times(frames, start, fps / TEMPORAL_COMPRESSION, TEMPORAL_COMPRESSION, 0, config)
    row = torch.arange(rows, dtype=torch.float32)
    column = torch.arange(columns, dtype=torch.float32)
    return torch.stack(torch.meshgrid(time, row, column, indexing="ij")).flatten(1)


def sound_positions(length: int, *, start: float, config: TransformerConfig) -> Tensor:
    """[3, length] of sound latents. Their axis is four times as long as that of the video."""
    time = _times(length, start, config.sound_latent_fps, 1, 0, config)
    return _on_time_axis(time)


def action_positions(
    length: int, *, start: float, fps: float, first: int, config: TransformerConfig
) -> Tensor:
    """[3, length] of action rows at ``fps``. Row 0 belongs to pixel frame ``first``.

    ``first`` is 1 for actions between frames, 0 if row 0 is the initial state.
    """
    time = _times(length, start, fps, TEMPORAL_COMPRESSION, first, config)
    return _on_time_axis(time)


def rollout_positions(
    frames: tuple[int, int],
    rows: int,
    columns: int,
    actions: int,
    *,
    start: float,
    fps: float,
    config: TransformerConfig,
) -> Tensor:
    """[3, S] of a range of latent frames of a rollout: all its actions, then all its patches.

    ``actions`` rows lead to each frame, the last one to its own time; those of frame 0, which do
    nothing, have all that time. A single frame is modulated like several.
    """
    rate = fps / TEMPORAL_COMPRESSION
    time = torch.arange(*frames, dtype=torch.float32)
    before = torch.arange(1 - actions, 1, dtype=torch.float32) / actions
    acted = (time.unsqueeze(1) + before).clamp(min=0).flatten()
    row = torch.arange(rows, dtype=torch.float32)
    column = torch.arange(columns, dtype=torch.float32)
    scale = config.base_fps / TEMPORAL_COMPRESSION
    patches = torch.stack(
        torch.meshgrid(time / rate * scale + start, row, column, indexing="ij")
    ).flatten(1)
    return torch.cat([_on_time_axis(acted / rate * scale + start), patches], dim=1)


def next_start(positions: Tensor) -> float:
    """Start of a stream that does not share the positions of the stream before it."""
    return float(math.ceil(float(positions.max())) + 1)


def rotary_table(positions_3S: Tensor, config: TransformerConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines [S, head_dim / 2] in float32: one angle for each pair (i, i + head_dim/2).

    Each frequency turns with one axis: time, height, width in turn while height and width last,
    time for the rest (interleaved mRoPE).
    """
    half = config.head_dim // 2
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequency = 1.0 / (config.rope_theta**exponent)
    axis = torch.tensor(frequency_axes(half, config.rope_axes_dim))
    angle_SF = positions_3S.float().cpu()[axis].T * frequency
    return angle_SF.cos(), angle_SF.sin()


@cache
def frequency_axes(count: int, axes_dim: tuple[int, int, int]) -> tuple[int, ...]:
    """The axis (0 time, 1 height, 2 width) of each of ``count`` frequencies."""
    return tuple(i % 3 if i % 3 and i < 3 * axes_dim[i % 3] else 0 for i in range(count))


def _times(
    length: int, start: float, rate: float, compression: int, first: int, config: TransformerConfig
) -> Tensor:
    """Times of ``length`` latents at ``rate`` per second, on the axis of the base frame rate.

    ``compression``: pixel frames per latent that the base rate counts in. A single latent, and every
    latent of a model without frame-rate modulation, counts in whole numbers. The order of
    the operations is the reference's: float32 rounds to 0.001 here.
    """
    index = torch.arange(length, dtype=torch.float32) + first
    if length > 1 and config.enable_fps_modulation:
        index = index / rate * (config.base_fps / compression)
    return index + start


def _on_time_axis(time: Tensor) -> Tensor:
    return torch.stack([time, torch.zeros_like(time), torch.zeros_like(time)])
