"""The parts of a layer in which backbones differ: norms, activation, and how heads are made.

A `Backbone` chooses them when a layer is built; a layer only calls them. Shape suffixes are those of
`transformer`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from vllm.model_executor.layers.activation import ReLUSquaredActivation, SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm

from vllm_cosmos3.checkpoint.config import TransformerConfig
from vllm_cosmos3.generator.models.rope import Rope, rotate

# Of what the matrices of `Backbone.mlp_inputs` make, side by side.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": SiluAndMul,
    "relu2": ReLUSquaredActivation,
}


class Heads(Protocol):
    """Queries [S, H, D]; keys with values [S, 2, h, D]; and those that the other tower sees."""

    def __call__(self, qkv: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]: ...


class RoundedOnceNorm(nn.Module):
    """RMS norm whose weight multiplies in float32: the result is rounded once.

    vLLM's rounds before the weight and after it, as Qwen3's does. Called as vLLM's.
    """

    def __init__(self, width: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, dtype=dtype))
        self.variance_epsilon = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """The norm of ``x``; with a ``residual`` that of the sum, and the sum, written over it."""
        if residual is None:
            return self._normed(x)
        residual.add_(x)
        return self._normed(residual), residual

    def _normed(self, x: Tensor) -> Tensor:
        return rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)


def make_norm(config: TransformerConfig, width: int, dtype: torch.dtype) -> nn.Module:
    """The norm of a checkpoint's backbone over ``width`` values."""
    if config.backbone.rounds_once:
        return RoundedOnceNorm(width, config.rms_norm_eps, dtype)
    return RMSNorm(width, config.rms_norm_eps, dtype=dtype)


def add_norm(norm: nn.Module, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """The norm of the sum, and the sum. Both may be written over the arguments."""
    return (norm(x), x) if residual is None else norm(x, residual)


class NormedHeads(nn.Module):
    """Queries and keys are normed, then rotated; the other tower sees the same keys.

    ``fused`` does it in place; without it torch's operations do.
    """

    def __init__(
        self,
        config: TransformerConfig,
        heads: int,
        kv_heads: int,
        *,
        dtype: torch.dtype,
        fused: Callable[..., None] | None,
    ) -> None:
        super().__init__()
        self._heads, self._kv_heads, self._head_dim = heads, kv_heads, config.head_dim
        self._eps, self._fused = config.rms_norm_eps, fused
        self.q_norm = make_norm(config, config.head_dim, dtype)
        self.k_norm = make_norm(config, config.head_dim, dtype)

    def forward(self, qkv: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        q_SHD, kv_S2hD = split_heads(qkv, self._heads, self._kv_heads, self._head_dim)
        if self._fused is None:
            k_ShD, v_ShD = kv_S2hD.unbind(1)
            k_ShD, q_SHD = rotate(self.k_norm(k_ShD), rope), rotate(self.q_norm(q_SHD), rope)
            kv_S2hD = torch.stack([k_ShD, v_ShD], dim=1)
            return q_SHD, kv_S2hD, kv_S2hD
        weights, neox = (self.q_norm.weight, self.k_norm.weight), True
        sizes = self._heads, self._kv_heads, self._kv_heads, self._head_dim
        self._fused(qkv, *sizes, self._eps, *weights, rope.table, neox, rope.rows)
        return q_SHD, kv_S2hD, kv_S2hD


class RawHeads(nn.Module):
    """Queries and keys are rotated as they are; the other tower sees keys that are normed before."""

    def __init__(
        self, config: TransformerConfig, heads: int, kv_heads: int, *, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self._heads, self._kv_heads, self._head_dim = heads, kv_heads, config.head_dim
        self.seen_norm = make_norm(config, config.head_dim, dtype)

    def forward(self, qkv: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        q_SHD, kv_S2hD = split_heads(qkv, self._heads, self._kv_heads, self._head_dim)
        k_ShD, v_ShD = kv_S2hD.unbind(1)
        own_S2hD, seen_S2hD = (
            torch.stack([rotate(k, rope), v_ShD], dim=1) for k in (k_ShD, self.seen_norm(k_ShD))
        )
        return rotate(q_SHD, rope), own_S2hD, seen_S2hD


def split_heads(qkv: Tensor, heads: int, kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Queries [S, H, D], and keys with values [S, 2, h, D], as views of a projection."""
    q_SHD, kv_S2hD = qkv.unflatten(1, (-1, head_dim)).split([heads, 2 * kv_heads], dim=1)
    return q_SHD, kv_S2hD.unflatten(1, (2, kv_heads))
