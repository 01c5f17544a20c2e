"""Both towers of the Cosmos 3 transformer, in batches, for training. Tensor names are the published ones.

Texts of a batch are filled up on the right. The generation tokens do not see the filling, and their
positions start where each text really ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

_TEXT = ("to_", "norm_q", "norm_k", "mlp.", "input_layernorm.", "post_attention_layernorm.")


@dataclass(frozen=True, slots=True)
class Shape:
    """What `transformer/config.json` says."""

    hidden: int = 256
    layers: int = 7
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    intermediate: int = 384
    vocabulary: int = 1024
    theta: float = 1000.0
    axes: tuple[int, int, int] = (6, 5, 5)
    base_fps: float = 24.0
    margin: float = 15000.0
    latent: int = 48
    patch: int = 2
    domains: int = 32
    action: int = 64
    sound: int = 64
    sound_fps: float = 25.0


# Queries, keys, values, real lengths of the texts, and how many of the keys are text.
Attend = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.rsqrt(length.square() / x.shape[-1] + 1e-6)
        return x * scale.to(x.dtype) * self.weight.to(x.dtype)


class Attention(nn.Module):
    """The projections and norms of both towers."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.shape = s
        queries, keys = s.heads * s.head_dim, s.kv_heads * s.head_dim
        for q, k, v, out, norm_q, norm_k in (
            ("to_q", "to_k", "to_v", "to_out", "norm_q", "norm_k"),
            (
                "add_q_proj",
                "add_k_proj",
                "add_v_proj",
                "to_add_out",
                "norm_added_q",
                "norm_added_k",
            ),
        ):
            for name, width in ((q, queries), (k, keys), (v, keys)):
                setattr(self, name, nn.Linear(s.hidden, width, bias=False))
            setattr(self, out, nn.Linear(queries, s.hidden, bias=False))
            for name in (norm_q, norm_k):
                setattr(self, name, RMSNorm(s.head_dim))

    def qkv(
        self, x: Tensor, table: tuple[Tensor, Tensor], *, generating: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, S, D], keys and values [B, h, S, D]."""
        s = self.shape
        if generating:
            parts = self.add_q_proj, self.add_k_proj, self.add_v_proj
            norms = self.norm_added_q, self.norm_added_k
        else:
            parts, norms = (self.to_q, self.to_k, self.to_v), (self.norm_q, self.norm_k)
        joined = F.linear(x, torch.cat([part.weight for part in parts]))
        joined = joined.unflatten(-1, (-1, s.head_dim))
        q, k, v = joined.split([s.heads, s.kv_heads, s.kv_heads], 2)
        q, k = (rotate(norm(y), table) for norm, y in zip(norms, (q, k), strict=True))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class MLP(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(s.hidden, s.intermediate, bias=False)
        self.up_proj = nn.Linear(s.hidden, s.intermediate, bias=False)
        self.down_proj = nn.Linear(s.intermediate, s.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        both = F.linear(x, torch.cat([self.gate_proj.weight, self.up_proj.weight]))
        gate, up = both.chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


class Layer(nn.Module):
    """One layer of both towers."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.self_attn, self.mlp, self.mlp_moe_gen = Attention(s), MLP(s), MLP(s)
        for suffix in ("", "_moe_gen"):
            setattr(self, f"input_layernorm{suffix}", RMSNorm(s.hidden))
            setattr(self, f"post_attention_layernorm{suffix}", RMSNorm(s.hidden))

    def understand(self, x: Tensor, table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The text tower's part, and its keys and values [B, h, S, D]."""
        q, k, v = self.self_attn.qkv(self.input_layernorm(x), table, generating=False)
        share = q.shape[1] // k.shape[1]
        wide_k, wide_v = (y.repeat_interleave(share, 1) for y in (k, v))
        out = F.scaled_dot_product_attention(q, wide_k, wide_v, is_causal=True)
        x = x + self.self_attn.to_out(out.transpose(1, 2).flatten(2))
        return x + self.mlp(self.post_attention_layernorm(x)), k, v

    def generate(
        self,
        x: Tensor,
        table: tuple[Tensor, Tensor],
        text: tuple[Tensor, Tensor],
        lengths: Tensor,
        attend: Attend,
    ) -> Tensor:
        """The generation tower's part; its tokens see the text and each other."""
        q, k, v = self.self_attn.qkv(self.input_layernorm_moe_gen(x), table, generating=True)
        k, v = torch.cat([text[0], k], 2), torch.cat([text[1], v], 2)
        out = attend(q, k, v, lengths, text[0].shape[2])
        x = x + self.self_attn.to_add_out(out.transpose(1, 2).flatten(2))
        return x + self.mlp_moe_gen(self.post_attention_layernorm_moe_gen(x))


def attend_masked(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, text: int) -> Tensor:
    """Attention where of the first ``text`` keys only ``lengths`` of each row are seen."""
    place = torch.arange(k.shape[2], device=q.device)
    hidden = (place >= lengths[:, None]) & (place < text)
    mask = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device)
    mask = mask.masked_fill(hidden, float("-inf"))
    mask = mask[:, None, None].expand(-1, -1, q.shape[2], -1)
    share = q.shape[1] // k.shape[1]
    wide_k, wide_v = (y.repeat_interleave(share, 1) for y in (k, v))
    return F.scaled_dot_product_attention(q, wide_k, wide_v, attn_mask=mask)


def attend_flexibly(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, text: int) -> Tensor:
    """The same as one Triton kernel; only for compiled layers on a GPU."""

    def seen(score: Tensor, b: Tensor, _h: Tensor, _q: Tensor, place: Tensor) -> Tensor:
        return torch.where((place < lengths[b]) | (place >= text), score, -float("inf"))

    return flex_attention(q, k, v, score_mod=seen, enable_gqa=True)


class TimeEmbedder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(256, width), nn.Linear(width, width)

    def forward(self, timestep: Tensor) -> Tensor:
        frequency = torch.exp(torch.arange(128, device=timestep.device) * (-math.log(10000) / 128))
        angle = timestep.float()[:, None] * 0.001 * frequency
        return self.linear_2(F.silu(self.linear_1(torch.cat([angle.cos(), angle.sin()], 1))))


class DomainLinear(nn.Module):
    """One matrix [in, out] and one bias for each embodiment, as rows of tables."""

    def __init__(self, domains: int, before: int, after: int) -> None:
        super().__init__()
        self.fc, self.bias = nn.Embedding(domains, before * after), nn.Embedding(domains, after)
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.bias.weight)


class Stream(Protocol):
    """Latents ``x``, the first axis of which is the batch."""

    x: Tensor

    def tokens(self, model: Transformer) -> Tensor:
        """[B, S, hidden]."""

    def noisy(self, shape: Shape) -> Tensor:
        """Bool [B, S]: tokens with something to denoise."""

    def free(self) -> Tensor:
        """Bool, to be broadcast to ``x``: values that are denoised."""

    def places(self, lengths: Tensor, shape: Shape) -> Tensor:
        """[3, B, S]: time, row, column, after texts of ``lengths`` [B]."""

    def velocity(self, model: Transformer, tokens: Tensor) -> Tensor:
        """Like ``x``."""


class Transformer(nn.Module):
    """Both towers with their heads. The adapters of sound and actions are zero until trained."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.shape, self.attend = s, attend_masked
        self.embed_tokens = nn.Embedding(s.vocabulary, s.hidden)
        self.lm_head = nn.Linear(s.hidden, s.vocabulary, bias=False)
        self.layers = nn.ModuleList(Layer(s) for _ in range(s.layers))
        self.norm, self.norm_moe_gen = RMSNorm(s.hidden), RMSNorm(s.hidden)
        width = s.latent * s.patch**2
        self.proj_in, self.proj_out = nn.Linear(width, s.hidden), nn.Linear(s.hidden, width)
        self.time_embedder = TimeEmbedder(s.hidden)
        self.action_proj_in = DomainLinear(s.domains, s.action, s.hidden)
        self.action_proj_out = DomainLinear(s.domains, s.hidden, s.action)
        self.audio_proj_in = nn.Linear(s.sound, s.hidden)
        self.audio_proj_out = nn.Linear(s.hidden, s.sound)
        self.action_modality_embed = nn.Parameter(torch.zeros(s.hidden))
        self.audio_modality_embed = nn.Parameter(torch.zeros(s.hidden))
        nn.init.normal_(self.embed_tokens.weight, std=0.5)
        for layer in self.layers:  # residual branches start small
            attention = layer.self_attn
            for out in (attention.to_out, attention.to_add_out):
                nn.init.normal_(out.weight, std=0.08 / (2 * s.layers) ** 0.5)
            for mlp in (layer.mlp, layer.mlp_moe_gen):
                nn.init.normal_(mlp.down_proj.weight, std=0.08 / (2 * s.layers) ** 0.5)
        for out in (self.proj_out, self.audio_proj_in, self.audio_proj_out):
            nn.init.zeros_(out.weight)
            nn.init.zeros_(out.bias)

    @torch.no_grad()
    def ignore_channels(self, used: int) -> None:
        """Neither read nor write latent channels beyond the first ``used``."""
        s = self.shape
        self.proj_in.weight.view(s.hidden, -1, s.latent)[..., used:] = 0
        self.proj_out.weight.view(-1, s.latent, s.hidden)[:, used:] = 0
        self.proj_out.bias.view(-1, s.latent)[:, used:] = 0

    def understand(self, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every layer for token ids [B, L], filled up on the right."""
        place = torch.arange(ids.shape[1], device=ids.device).float()
        table = rotary(place.expand(3, 1, -1), self.shape)
        x, kept = _cast(self.embed_tokens(ids)), []
        for layer in self.layers:
            x, k, v = layer.understand(x, table)
            kept.append((k, v))
        return kept

    def velocities(
        self,
        streams: Sequence[Stream],
        timestep: Tensor,
        texts: Sequence[tuple[Tensor, Tensor]],
        lengths: Tensor,
    ) -> list[Tensor]:
        """Velocities of streams that lie in the sequence in this order, at the timestep [B]."""
        temb = self.time_embedder(timestep)[:, None]
        parts = []
        for stream in streams:
            x = _cast(stream.tokens(self))
            parts.append(x + (stream.noisy(self.shape).unsqueeze(-1) * temb).to(x.dtype))
        table = rotary(torch.cat([s.places(lengths, self.shape) for s in streams], 2), self.shape)
        tokens = torch.cat(parts, 1)
        for layer, text in zip(self.layers, texts, strict=True):
            tokens = layer.generate(tokens, table, text, lengths, self.attend)
        split = self.norm_moe_gen(tokens).split([part.shape[1] for part in parts], 1)
        return [stream.velocity(self, x) for stream, x in zip(streams, split, strict=True)]


def is_text(name: str) -> bool:
    """Whether a tensor rests where only the generation tower is trained: the text tower's, and the adapters."""
    if name.startswith(("embed_tokens", "lm_head", "norm.", "action_", "audio_")):
        return True
    inner = name.split(".", 2)[2] if name.startswith("layers.") else name
    inner = inner.removeprefix("self_attn.")
    return inner.startswith(_TEXT) and not inner.startswith("to_add_out")


def save_changed(model: Transformer, out: Path) -> None:
    """The generation tower's tensors that were trained, for a checkpoint that differs from its base in them."""
    changed = {
        name: p.detach().to(torch.bfloat16).contiguous()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    save_file(changed, out / "changed.safetensors", {"format": "pt"})


def rotary(places: Tensor, s: Shape) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, S, 1, D / 2] of places [3, B, S] (time, row, column), interleaved."""
    axis, frequency = _frequencies(s, places.device)
    angle = (places.float()[axis].movedim(0, -1) * frequency).unsqueeze(2)
    return angle.cos(), angle.sin()


@cache
def _frequencies(s: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """The axis of each frequency, and the frequencies."""
    frequency = 1.0 / s.theta ** (torch.arange(0, s.head_dim, 2).float() / s.head_dim)
    axis = [i % 3 if i % 3 and i < 3 * s.axes[i % 3] else 0 for i in range(s.head_dim // 2)]
    return torch.tensor(axis, device=device), frequency.to(device)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Heads [B, S, H, D] turned by their places."""
    cos, sin = (t.to(x.dtype) for t in table)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def compile_layers(model: Transformer, *, flexible: bool) -> None:
    """Compile what the layers do; with ``flexible`` attention is a Triton kernel too."""
    import torch._dynamo

    torch._dynamo.config.cache_size_limit = 512
    torch._dynamo.config.accumulated_cache_size_limit = 4096
    if flexible:
        model.attend = attend_flexibly
    for layer in model.layers:
        layer.understand = torch.compile(layer.understand, dynamic=False)
        layer.generate = torch.compile(layer.generate, dynamic=False)


def uncompile_layers(model: Transformer) -> None:
    """Undo `compile_layers`: for shapes that come once."""
    model.attend = attend_masked
    for layer in model.layers:
        layer.__dict__.pop("understand", None)
        layer.__dict__.pop("generate", None)


def _cast(x: Tensor) -> Tensor:
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
