"""Attention of the vision tower that rotates queries and keys where the projection has written them.

vLLM runs the tower eagerly, and its attention spends most of its time in Python around a copy and a
rotation: the device waits for it where a request brings a clip or two.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VisionAttention
from vllm.v1.attention.backends.registry import AttentionBackendEnum


def rotate_in_place(tower: torch.nn.Module) -> None:
    """Make the attention of every block of vLLM's Qwen3-VL tower a `VisionAttention`."""
    for block in tower.blocks:
        block.attn.__class__ = VisionAttention  # vLLM's blocks do not let their attention be chosen


class VisionAttention(Qwen2_5_VisionAttention):
    """vLLM's attention of a vision tower, without a copy of queries and keys for FlashAttention.

    The other backends get vLLM's copy: that of cuDNN counts on its order in memory.
    """

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
        if self.attn.attn_backend != AttentionBackendEnum.FLASH_ATTN:
            return super().forward(
                x, cu_seqlens, rotary_pos_emb_cos, rotary_pos_emb_sin, max_seqlen, sequence_lengths
            )
        # Of vLLM's CUDA builds alone.
        from vllm.vllm_flash_attn.ops.triton.rotary import apply_rotary

        qkv, _ = self.qkv(x)
        count, half = rotary_pos_emb_cos.shape
        heads = self.num_attention_heads_per_partition
        parts = qkv.view(1, count, 3, heads, 2 * half)
        rotated = parts[:, :, :2].flatten(2, 3)
        apply_rotary(rotated, rotary_pos_emb_cos, rotary_pos_emb_sin, inplace=True)
        q, k, v = parts.unbind(2)
        context = self.attn(
            query=q,
            key=k,
            value=v,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            sequence_lengths=sequence_lengths,
        )
        output, _ = self.proj(context.reshape(count, 1, -1))
        return output
