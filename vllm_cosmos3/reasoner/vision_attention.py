"""Attention of the vision tower that splits and rotates queries and keys in one kernel.

vLLM runs the tower eagerly, and its attention spends most of its time in Python around a copy and a
rotation: the device waits for it where a request brings a clip or two.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VisionAttention
from vllm.triton_utils import tl, triton


def fuse_rotation(tower: torch.nn.Module) -> None:
    """Make the attention of every block of vLLM's Qwen3-VL tower a `VisionAttention`."""
    for block in tower.blocks:
        block.attn.__class__ = VisionAttention  # vLLM's blocks do not let their attention be chosen


class VisionAttention(Qwen2_5_VisionAttention):
    """vLLM's attention of a vision tower, with `split_rotated` where the device is a GPU."""

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor,
        rotary_pos_emb_cos: Tensor,
        rotary_pos_emb_sin: Tensor,
        max_seqlen: Tensor,
        sequence_lengths: Tensor | None,
    ) -> Tensor:
        """Attention among the patches of each frame: [S, 1, C] of all frames, to the same shape."""
        if not x.is_cuda:
            return super().forward(
                x, cu_seqlens, rotary_pos_emb_cos, rotary_pos_emb_sin, max_seqlen, sequence_lengths
            )
        qkv, _ = self.qkv(x)
        q, k, v = split_rotated(
            qkv[:, 0],
            rotary_pos_emb_cos,
            rotary_pos_emb_sin,
            self.num_attention_heads_per_partition,
        )
        context = self.attn(
            query=q[None],
            key=k[None],
            value=v[None],
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            sequence_lengths=sequence_lengths,
        )
        output, _ = self.proj(context.reshape(len(x), 1, -1))
        return output


def split_rotated(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys with rotary positions, and values, each [S, heads, D].

    ``qkv``: [S, 3 * heads * D], contiguous; the values returned are a view of it. ``cos``, ``sin``: [S, D/2], of the
    first half of each head's channels with the second. Rotated in float32 and rounded once.
    """
    count, half = cos.shape
    turned = torch.empty((2, count, heads, 2 * half), dtype=qkv.dtype, device=qkv.device)
    _rotate[(count,)](
        qkv,
        cos,
        sin,
        turned,
        count,
        heads=heads,
        half=half,
        rows=triton.next_power_of_2(2 * heads),
        block=triton.next_power_of_2(half),
    )
    return turned[0], turned[1], qkv.view(count, 3, heads, 2 * half)[:, 2]


@triton.jit
def _rotate(qkv, cos, sin, out, count, heads: tl.constexpr, half: tl.constexpr, rows: tl.constexpr, block: tl.constexpr):  # fmt: skip
    patch = tl.program_id(0).to(tl.int64)
    head, channel = tl.arange(0, rows), tl.arange(0, block)
    inside = (head[:, None] < 2 * heads) & (channel[None, :] < half)
    c = tl.load(cos + patch * half + channel, mask=channel < half, other=0.0).to(tl.float32)
    s = tl.load(sin + patch * half + channel, mask=channel < half, other=0.0).to(tl.float32)
    place = qkv + patch * 6 * heads * half + head[:, None] * 2 * half + channel[None, :]
    first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(place + half, mask=inside, other=0.0).to(tl.float32)
    row = ((head // heads) * count + patch) * heads + head % heads
    place = out + row[:, None] * 2 * half + channel[None, :]
    tl.store(place, first * c[None, :] - second * s[None, :], mask=inside)
    tl.store(place + half, first * s[None, :] + second * c[None, :], mask=inside)
