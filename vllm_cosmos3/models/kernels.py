"""Triton kernels of the video autoencoder. Import on a GPU only, where vLLM has brought Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 4096  # of a program; whole positions, so that the norm needs one pass


@triton.jit
def _norm_silu(x, bias, gamma, out, positions, scale, channels: tl.constexpr, block: tl.constexpr, rows: tl.constexpr, biased: tl.constexpr):  # fmt: skip
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
    tl.store(out + place, value * tl.sigmoid(value), mask=inside)


def norm_silu(x_BCTHW: Tensor, bias_C: Tensor | None, gamma: Tensor) -> Tensor:
    """SiLU of ``x + bias`` scaled to root mean square ``gamma`` over the channels.

    ``x`` lies with channels innermost. Computed in float32 and rounded once.
    """
    channels = x_BCTHW.shape[1]
    positions = x_BCTHW.numel() // channels
    block = triton.next_power_of_2(channels)
    rows = max(1, ELEMENTS // block)
    out = torch.empty_like(x_BCTHW)
    _norm_silu[(triton.cdiv(positions, rows),)](
        x_BCTHW,
        gamma if bias_C is None else bias_C,
        gamma,
        out,
        positions,
        channels**0.5,
        channels=channels,
        block=block,
        rows=rows,
        biased=bias_C is not None,
    )
    return out
