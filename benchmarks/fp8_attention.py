"""FlashAttention in FP8 as Triton kernels for Hopper: both products in E4M3, softmax and sums in float32.

Queries and keys have one scale for each block of rows of a head, values one for each channel of a
head. Softmax does not see what is subtracted from all keys, and its weights add up to one: so the
mean of the keys is dropped before they are quantised, and that of the values added to the result.
Probabilities are quantised as they are: the row's largest becomes 256.

Shapes: q [S, H, D], k and v [K, h, D], result [S, H, D]; H is a multiple of h.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LARGEST = 448.0  # of E4M3
ALIGNMENT = 16  # bytes between rows that the tensor memory accelerator reads
ROWS = 128  # that one program of the quantising kernel takes


@dataclass(frozen=True, slots=True)
class Tile:
    """How the kernel is laid out on the device.

    ``exact`` adds each block's product to the sum in float32 instead of inside the tensor cores,
    whose own sums of FP8 products keep 14 bits.
    """

    queries: int = 128
    keys: int = 128
    warps: int = 8
    stages: int = 3
    exact: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Quantised:
    """Queries [S, H, D], keys [K, h, D], values [h, D, K rounded up], and what undoes their scales."""

    q: Tensor
    q_scale: Tensor  # [H, blocks of queries]
    k: Tensor
    k_scale: Tensor  # [h, blocks of keys]
    v: Tensor
    v_scale: Tensor  # [h, D]
    v_mean: Tensor  # [h, D]
    keys: int
    tile: Tile


def quantise(
    q: Tensor, k: Tensor, v: Tensor, *, k_mean: Tensor, v_mean: Tensor, tile: Tile
) -> Quantised:
    """The means are float32 [h, D]; zeros leave keys and values as they are."""
    zero = torch.zeros(q.shape[1:], dtype=torch.float32, device=q.device)
    q8, q_scale = quantised_blocks(q, zero, tile.queries)
    k8, k_scale = quantised_blocks(k, k_mean, tile.keys)
    low, high = (extreme.float() for extreme in torch.aminmax(v, dim=0))
    v_scale = torch.maximum(high - v_mean, v_mean - low).clamp(min=1e-8) / LARGEST
    v8 = quantised(v, v_mean, v_scale, transposed=True)
    return Quantised(q8, q_scale, k8, k_scale, v8, v_scale, v_mean, len(k), tile)


def quantised_blocks(x: Tensor, mean: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """E4M3 of x - mean, and the scale [H, blocks] of each block of ``rows`` rows of a head."""
    length, heads, head = x.shape
    out = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    blocks = triton.cdiv(length, rows)
    scale = torch.empty(heads, blocks, dtype=torch.float32, device=x.device)
    _quantise[(blocks, heads)](
        *(x, mean, scale, out, length, x.stride(0), x.stride(1), head, heads * head, 1),
        *(head, rows, True),
    )
    return out, scale


def quantised(x: Tensor, mean: Tensor, scale: Tensor, *, transposed: bool = False) -> Tensor:
    """E4M3 of (x - mean) / scale, both float32 [H, D]; transposed it is [H, D, N], zeros after the last row."""
    length, heads, head = x.shape
    if transposed:
        padded = triton.cdiv(length, ALIGNMENT) * ALIGNMENT
        out = torch.zeros(heads, head, padded, dtype=torch.float8_e4m3fn, device=x.device)
        strides = (head * padded, 1, padded)
    else:
        out = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
        strides = (head, heads * head, 1)
    _quantise[(triton.cdiv(length, ROWS), heads)](
        *(x, mean, scale, out, length, x.stride(0), x.stride(1), *strides),
        *(head, ROWS, False),
    )
    return out


@triton.jit
def _quantise(
    x,
    mean,
    scale,
    out,
    length,
    x_row,
    x_head,
    out_head,
    out_row,
    out_channel,
    HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    PER_BLOCK: tl.constexpr,
):
    block, head = tl.program_id(0), tl.program_id(1)
    rows = block * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, HEAD)
    inside = (rows < length)[:, None]
    at = head.to(tl.int64) * x_head + rows.to(tl.int64)[:, None] * x_row + channels[None, :]
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    values = tl.where(inside, values - tl.load(mean + head * HEAD + channels)[None, :], 0.0)
    if PER_BLOCK:
        factor = tl.maximum(tl.max(tl.abs(values)) / 448.0, 1e-12)
        tl.store(scale + head * tl.num_programs(0) + block, factor)
        values = values / factor
    else:
        values = values / tl.load(scale + head * HEAD + channels)[None, :]
    values = tl.clamp(values, -448.0, 448.0).to(tl.float8e4nv)
    at = head.to(tl.int64) * out_head + rows.to(tl.int64)[:, None] * out_row
    tl.store(out + at + channels[None, :].to(tl.int64) * out_channel, values, mask=inside)


def attend(x: Quantised) -> Tensor:
    """Attention without a mask, bfloat16 [S, H, D]."""
    (kernel, grid, arguments, options), out = launch(x)
    kernel[grid](*arguments, **options)
    return out


def launch(x: Quantised) -> tuple[tuple[Any, ...], Tensor]:
    """The kernel, its grid, arguments and options; and where it writes."""
    (queries, heads, head), tile = x.q.shape, x.tile
    kv_heads = x.k.shape[1]
    out = torch.empty(x.q.shape, dtype=torch.bfloat16, device=x.q.device)
    q, k = x.q.view(queries, heads * head), x.k.view(x.keys, kv_heads * head)
    v = x.v.view(kv_heads * head, -1)
    arguments = (
        TensorDescriptor.from_tensor(q, [tile.queries, head]),
        TensorDescriptor.from_tensor(k, [tile.keys, head]),
        TensorDescriptor.from_tensor(v, [head, tile.keys]),
        TensorDescriptor.from_tensor(out.view(queries, heads * head), [tile.queries, head]),
        *(x.q_scale, x.k_scale, x.v_scale, x.v_mean, x.keys, head**-0.5 * 1.4426950408889634),
        *(heads // kv_heads, head, tile.queries, tile.keys, tile.exact),
    )
    grid = (triton.cdiv(queries, tile.queries), heads)
    return (_attend, grid, arguments, {"num_warps": tile.warps, "num_stages": tile.stages}), out


@triton.jit
def _attend(
    q,
    k,
    v,
    out,
    q_scale,
    k_scale,
    v_scale,
    v_mean,
    keys,
    to_exponent,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    EXACT: tl.constexpr,
):
    block, head = tl.program_id(0), tl.program_id(1)
    kv_head = head // GROUP
    k_scale += kv_head * tl.cdiv(keys, KEYS)
    factor = tl.load(q_scale + head * tl.num_programs(0) + block) * to_exponent
    mine = q.load([block * QUERIES, head * HEAD])
    largest = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sums = tl.zeros([QUERIES, HEAD], tl.float32)
    whole = keys // KEYS
    for n in range(whole):
        sums, total, largest = _block(
            mine, k, v, n, kv_head, factor * tl.load(k_scale + n), sums, total, largest,
            keys, HEAD, KEYS, LAST=False, EXACT=EXACT,
        )  # fmt: skip
    if whole * KEYS < keys:
        sums, total, largest = _block(
            mine, k, v, whole, kv_head, factor * tl.load(k_scale + whole), sums, total, largest,
            keys, HEAD, KEYS, LAST=True, EXACT=EXACT,
        )  # fmt: skip
    channels = kv_head * HEAD + tl.arange(0, HEAD)
    result = sums / total[:, None] * tl.load(v_scale + channels)[None, :]
    result += tl.load(v_mean + channels)[None, :]
    out.store([block * QUERIES, head * HEAD], result.to(tl.bfloat16))


@triton.jit
def _block(
    mine,
    k,
    v,
    n,
    kv_head,
    factor,
    sums,
    total,
    largest,
    keys,
    HEAD: tl.constexpr,
    KEYS: tl.constexpr,
    LAST: tl.constexpr,
    EXACT: tl.constexpr,
):
    theirs = k.load([n * KEYS, kv_head * HEAD])
    scores = tl.dot(mine, theirs.T)
    if LAST:
        scores = tl.where((n * KEYS + tl.arange(0, KEYS) < keys)[None, :], scores, -float("inf"))
    before = largest
    largest = tl.maximum(before, tl.max(scores, 1) * factor)
    p = tl.math.exp2(scores * factor - (largest - 8.0)[:, None])
    shrink = tl.math.exp2(before - largest)
    total = total * shrink + tl.sum(p, 1)
    sums = sums * shrink[:, None]
    values = v.load([kv_head * HEAD, n * KEYS])
    if EXACT:
        sums += tl.dot(p.to(tl.float8e4nv), values.T, max_num_imprecise_acc=KEYS)
    else:
        sums = tl.dot(p.to(tl.float8e4nv), values.T, sums)
    return sums, total, largest
