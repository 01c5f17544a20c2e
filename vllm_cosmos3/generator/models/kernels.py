"""Triton kernels of the video autoencoder. Import on a GPU only, where vLLM has brought Triton.

Tensors are [1, C, T, H, W] with channels innermost. Values are computed in float32 and rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 4096  # of a program; whole positions, so that the norm needs one pass


@triton.jit
def _norm_silu(x, bias, gamma, out, positions, plane, width, step_t, step_h, step_w, scale, channels: tl.constexpr, block: tl.constexpr, rows: tl.constexpr, biased: tl.constexpr):  # fmt: skip
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    channel = tl.arange(0, block)
    inside = (row[:, None] < positions) & (channel[None, :] < channels)
    place = row[:, None].to(tl.int64) * channels + channel[None, :]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if biased:
        value += tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
    norm = tl.maximum(tl.sqrt(tl.sum(value * value, axis=1)), 1e-12)
    weight = tl.load(gamma + channel, mask=channel < channels, other=0.0).to(tl.float32) * scale
    value = value / norm[:, None] * weight[None, :]
    frame, inner = row // plane, row % plane
    place = frame.to(tl.int64) * step_t + (inner // width) * step_h + (inner % width) * step_w
    tl.store(out + place[:, None] + channel[None, :], value * tl.sigmoid(value), mask=inside)


@triton.jit
def _add_with_bias(x, other, bias, positions, channels: tl.constexpr, block: tl.constexpr, rows: tl.constexpr):  # fmt: skip
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    channel = tl.arange(0, block)
    inside = (row[:, None] < positions) & (channel[None, :] < channels)
    place = row[:, None].to(tl.int64) * channels + channel[None, :]
    value = tl.load(x + place, mask=inside).to(tl.float32)
    value += tl.load(other + place, mask=inside).to(tl.float32)
    value += tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
    tl.store(x + place, value, mask=inside)


@triton.jit
def _join_corners(corners, shortcut, bias, out, positions, height, width, channels: tl.constexpr, shares: tl.constexpr, frames: tl.constexpr, time: tl.constexpr, block: tl.constexpr, rows: tl.constexpr):  # fmt: skip
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    channel = tl.arange(0, block)
    inside = (row[:, None] < positions) & (channel[None, :] < channels)
    column, line, frame = row % (2 * width), row // (2 * width), row // (4 * width * height)
    line %= 2 * height
    a, b, x, y = line % 2, column % 2, column // 2, line // 2
    place = (frame * (height + 1) + y + a).to(tl.int64) * (width + 1) + x + b
    place = (place * 4 + a * 2 + b) * channels
    value = tl.load(corners + place[:, None] + channel[None, :], mask=inside).to(tl.float32)
    place = (frame // frames * height + y).to(tl.int64) * width + x
    place = (place * channels)[:, None] + channel[None, :]
    if shares > 1:  # else channels are neighbours, and loaded several at once
        within = ((frame % frames + time - frames) * 4 + a * 2 + b) * shares // (4 * time)
        place = place * shares + within[:, None]
    value += tl.load(shortcut + place, mask=inside).to(tl.float32)
    value += tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
    tl.store(out + row[:, None].to(tl.int64) * channels + channel[None, :], value, mask=inside)


def norm_silu(out: Tensor, x: Tensor, bias_C: Tensor | None, gamma: Tensor) -> None:
    """SiLU of ``x + bias`` scaled to root mean square ``gamma`` over the channels, into ``out``.

    ``out`` may be part of a larger tensor.
    """
    channels, _, height, width = x.shape[1:]
    positions, block, rows = _division(x)
    _norm_silu[(triton.cdiv(positions, rows),)](
        x,
        gamma if bias_C is None else bias_C,
        gamma,
        out,
        positions,
        height * width,
        width,
        *out.stride()[2:],
        channels**0.5,
        channels=channels,
        block=block,
        rows=rows,
        biased=bias_C is not None,
    )


def add_with_bias(x: Tensor, other: Tensor, bias_C: Tensor) -> Tensor:
    """``x + other + bias``, written over ``x``."""
    positions, block, rows = _division(x)
    other = other.contiguous(memory_format=torch.channels_last_3d)
    _add_with_bias[(triton.cdiv(positions, rows),)](
        x, other, bias_C, positions, channels=x.shape[1], block=block, rows=rows
    )
    return x


def join_corners(corners: Tensor, shortcut: Tensor, bias_C: Tensor, time: int) -> Tensor:
    """The corners of each position side by side, plus bias and ``shortcut``: see `models.vae.join_corners`."""
    shortcut = shortcut.contiguous(memory_format=torch.channels_last_3d)
    channels, frames = corners.shape[1] // 4, corners.shape[2]
    height, width = shortcut.shape[3:]
    out = torch.empty(
        (1, channels, frames, 2 * height, 2 * width),
        dtype=shortcut.dtype,
        device=shortcut.device,
        memory_format=torch.channels_last_3d,
    )
    positions, block, rows = _division(out)
    _join_corners[(triton.cdiv(positions, rows),)](
        corners,
        shortcut,
        bias_C,
        out,
        positions,
        height,
        width,
        channels=channels,
        shares=shortcut.shape[1] // channels,
        frames=frames // shortcut.shape[2],
        time=time,
        block=block,
        rows=rows,
    )
    return out


def _division(x: Tensor) -> tuple[int, int, int]:
    """Positions of ``x``, channels rounded up to a power of two, and positions of a program."""
    block = triton.next_power_of_2(x.shape[1])
    return x.numel() // x.shape[1], block, max(1, ELEMENTS // block)
