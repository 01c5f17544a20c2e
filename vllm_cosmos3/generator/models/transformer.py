"""The transformer of Cosmos 3: two towers with the same layers, one for text, one for latents.

The understanding tower reads the text, causally, once per request and guidance branch: nothing in it
depends on the timestep or on latents. What it leaves are the keys and values of every layer. The
generation tower runs at each step; its tokens attend to the text's and to each other, without a
mask. No user request, schedule or guidance is known here. What the layers are made of is a value,
the checkpoint's `Backbone`.

Under Ulysses each rank holds part of the generation tokens and, during attention, all tokens of part
of the heads. Under tensor parallelism vLLM's layers hold part of the heads throughout.

Several branches of guidance can be evaluated side by side, and those of several samples, in one sequence
whose parts attend only to themselves and to their text.

Shape suffixes: S tokens of the whole sequence, s of this rank, B branches of all samples, H heads, h key heads,
D values of a token or head, F rotary frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, silu
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from vllm_cosmos3.checkpoint.config import TransformerConfig
from vllm_cosmos3.checkpoint.latents import token_count
from vllm_cosmos3.checkpoint.quantization import Quantization
from vllm_cosmos3.checkpoint.tensors import TIME_FREQUENCIES
from vllm_cosmos3.compat import fused_qk_norm_rope
from vllm_cosmos3.generator.models.backbone import (
    ACTIVATIONS,
    Heads,
    NormedHeads,
    RawHeads,
    add_norm,
    make_norm,
)
from vllm_cosmos3.generator.models.modalities import Domain, adapters, timestep_conditioned
from vllm_cosmos3.generator.models.quantization import Fp8Layers, Precision, layers_of
from vllm_cosmos3.generator.models.rope import Rope, rotate
from vllm_cosmos3.generator.sampling.packing import Stream
from vllm_cosmos3.generator.sampling.positions import rotary_table, text_positions
from vllm_cosmos3.parallel.attention import Attend, Sequences, attend_in_turn
from vllm_cosmos3.parallel.axis import Axis
from vllm_cosmos3.parallel.mesh import (
    Mesh,
    building_layers,
    gather_heads,
    gather_sequence,
    own_heads,
    scatter_heads,
    shard_sequence,
)
from vllm_cosmos3.parallel.offload import HostLayers

MakeHeads = Callable[[int, int], Heads]  # of so many heads of queries and of keys, on this rank
# Of a layer's own keys and values [S, 2, h, D]: all that it sees.
Extend = Callable[[Tensor], Tensor]


class Past(Protocol):
    """What lies before the generation tokens: a text, or a text and clean frames.

    ``extends`` has a function for each layer: from keys and values of the tokens to those that their
    queries see [K, 2, h, D].
    """

    @property
    def extends(self) -> Sequence[Extend]: ...

    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TextKV:
    """Keys and values of a text by layer, of this rank's heads, to which generation tokens attend.

    Each layer is one tensor [S, 2, h, D]: the keys, normed and rotated, and the values.
    """

    layers: tuple[Tensor, ...]

    @property
    def extends(self) -> tuple[Extend, ...]:
        return tuple(partial(_appended, layer) for layer in self.layers)

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)


class Packed(Protocol):
    """What lies before the tokens of all parts, as one: see `packed_texts`."""

    @property
    def extends(self) -> Sequence[Extend]: ...

    @property
    def sequences(self) -> Sequences: ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Context:
    """The context of the generation tokens: the text of each branch, and their own positions.

    There are so many ``samples``, each with all of its branches. Where their texts are ``packed``, too,
    all of them attend at once.
    """

    texts: tuple[Past, ...]
    rope: Rope
    samples: int = 1
    packed: Packed | None = None


def join(contexts: Sequence[Context], samples: int = 1) -> Context:
    """Branches side by side, those of each sample after those of the one before.

    Their tokens may have different places, but are as many.
    """
    if len(contexts) == 1:
        return contexts[0]
    table = torch.cat([context.rope.table for context in contexts])
    rows = torch.arange(table.shape[0], device=table.device)
    return Context(
        texts=tuple(text for context in contexts for text in context.texts),
        rope=replace(contexts[0].rope, table=table, rows=rows),
        samples=samples,
    )


class Transformer(nn.Module):
    """Both towers and the adapters of each kind of latent.

    The matrices of the layers are FP8 where there is a ``quantization``; ``precision`` is then the mode
    of the generation layers. ``text_device`` and ``layer_device`` are where the weights of the
    understanding tower and of the generation layers are, if not on ``device`` with everything else; see
    `rest_on_host`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        mesh: Mesh,
        attend: Attend,
        *,
        dtype: torch.dtype,
        device: torch.device,
        quantization: Quantization | None = None,
        text_device: torch.device | None = None,
        layer_device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.config, self.dtype, self.device = config, dtype, device
        self._attend, self._ulysses = attend, mesh.ulysses
        fused = fused_qk_norm_rope(config.head_dim, dtype, device)
        self.precision = Precision()
        text = Precision(native=quantization is not None and quantization.text == "native")
        quantized = layers_of(quantization)
        normed = partial(NormedHeads, config, dtype=dtype, fused=fused)
        of_text = partial(RawHeads, config, dtype=dtype)
        with building_layers(mesh):
            with text_device or device:
                heads = normed if config.backbone.qk_norm_for_text else of_text
                parts = dtype, heads, quantized(text)
                self.understanding = Understanding(config, mesh.ulysses, attend, *parts)
            with layer_device or device:
                count, parts = config.num_hidden_layers, (dtype, normed, quantized(self.precision))
                self.layers = nn.ModuleList(Layer(config, *parts) for _ in range(count))
                self.sequence: Iterable[nn.Module] = tuple(self.layers)
            with device:
                self.norm = make_norm(config, config.hidden_size, dtype)
                self.adapters = adapters(config, dtype)
                self.time = TimeEmbedding(config)
        self.requires_grad_(requires_grad=False)

    def rest_on_host(self, *, text: bool, layers: bool) -> None:
        """Take loaded weights that were built on the host to the device only while they are used."""
        if text:
            tower = self.understanding
            tower.sequence = HostLayers(tower.sequence, self.device)
        if layers:
            self.sequence = HostLayers(self.layers, self.device)

    def rope(self, positions_3S: Tensor, controls: tuple[tuple[int, float], ...] = ()) -> Rope:
        """Tables for the generation tokens at ``positions_3S``; once per request and branch."""
        table = torch.cat(rotary_table(positions_3S, self.config), dim=1)
        rope = self._rope(shard_sequence(table, self._ulysses), positions_3S.shape[1])
        return replace(rope, controls=controls)

    def understand(self, ids_S: Tensor) -> TextKV:
        """Read the token ids of one branch, int64 on the device; once per request and branch."""
        length = ids_S.shape[0]
        table = torch.cat(rotary_table(text_positions(length), self.config), dim=1)
        return TextKV(layers=self.understanding(ids_S, self._rope(table, length)))

    def _rope(self, table: Tensor, length: int) -> Rope:
        rows = torch.arange(table.shape[0], device=self.device)
        return Rope(table=table.to(self.device, self.dtype), rows=rows, length=length)

    def forward(
        self,
        streams: Sequence[Stream],
        context: Context,
        timestep: Tensor,
        domain_id: Domain = 0,
    ) -> tuple[tuple[Tensor, ...], ...]:
        """The velocities of each branch: float32, in the shapes of the latents, 0 where not free.

        ``streams`` lie in the sequence in this order, at the positions of the context's rope; those of
        several samples follow one another, and so do their velocities.
        ``timestep`` is a float32 scalar in [0, 1000] on the device, ``domain_id`` the embodiment of
        the actions, or of each row.
        """
        x_sD = self.run_layers(self.embed(streams, context, timestep, domain_id), context)
        return self.velocities(streams, context, x_sD, domain_id)

    def embed(
        self, streams: Sequence[Stream], context: Context, timestep: Tensor, domain_id: Domain = 0
    ) -> Tensor:
        """What enters the layers: [B s, D], this rank's tokens of each branch."""
        temb_D = self.time(timestep).to(self.dtype)
        branches = len(context.texts) // context.samples
        parts = []
        for sample in _by_sample(streams, context):
            x_SD = torch.cat([self._embed(stream, temb_D, domain_id) for stream in sample])
            parts.append(shard_sequence(x_SD, self._ulysses).repeat(branches, 1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def run_layers(self, x_sD: Tensor, context: Context) -> Tensor:
        """What leaves the layers, normed. They may write over ``x_sD``."""
        residual_sD = None
        for layer, attend in zip(self.sequence, self._attends(context), strict=True):
            x_sD, residual_sD = layer(x_sD, residual_sD, context.rope, attend)
        x_sD, _ = self.norm(x_sD, residual_sD)
        return x_sD

    def velocities(
        self, streams: Sequence[Stream], context: Context, x_sD: Tensor, domain_id: Domain = 0
    ) -> tuple[tuple[Tensor, ...], ...]:
        """The velocities of each branch from what has left the layers."""
        length, branches = context.rope.length, len(context.texts) // context.samples
        parts = x_sD.chunk(len(context.texts))
        found: list[tuple[Tensor, ...]] = [()] * branches
        for place, sample in enumerate(_by_sample(streams, context)):
            for branch, x in enumerate(parts[place * branches : (place + 1) * branches]):
                x_SD = gather_sequence(x, self._ulysses, length)
                found[branch] += self._velocities(sample, x_SD, domain_id)
        return tuple(found)

    def _embed(self, stream: Stream, temb_D: Tensor, domain_id: Domain) -> Tensor:
        """Tokens of a stream; only those with something to denoise are timestep-conditioned."""
        x_SD = self.adapters[stream.name].embed(stream.x.to(self.dtype), domain_id)
        conditioned_S = timestep_conditioned(stream, self.config.latent_patch_size)
        return torch.addcmul(x_SD, conditioned_S.unsqueeze(1).to(self.dtype), temb_D)

    def _velocities(
        self, streams: Sequence[Stream], x_SD: Tensor, domain_id: Domain
    ) -> tuple[Tensor, ...]:
        patch = self.config.latent_patch_size
        counts = [token_count(stream.name, tuple(stream.x.shape), patch) for stream in streams]
        parts = zip(streams, x_SD.split(counts), strict=True)
        return tuple(self._velocity(stream, x, domain_id) for stream, x in parts)

    def _velocity(self, stream: Stream, x_SD: Tensor, domain_id: Domain) -> Tensor:
        velocity = self.adapters[stream.name].velocity(x_SD, stream.x.shape, domain_id)
        return torch.where(stream.denoise_mask, velocity.float(), 0.0)

    def _attends(self, context: Context) -> Iterator[Callable[[Tensor, Tensor, Tensor], Tensor]]:
        """The attention of each layer."""
        if context.packed is not None:
            for extend in context.packed.extends:
                yield partial(self._attend_packed, extend, context.packed.sequences)
            return
        for texts in zip(*(text.extends for text in context.texts), strict=True):
            yield partial(self._attend_all, texts, context.rope)

    def _attend_packed(
        self, extend: Extend, sequences: Sequences, q_SHD: Tensor, kv_S2hD: Tensor, _: Tensor
    ) -> Tensor:
        """The same as `_attend_all`, of all parts at once, where this rank has whole sequences."""
        k_KhD, v_KhD = extend(kv_S2hD).unbind(1)
        return self._attend(q_SHD, k_KhD, v_KhD, causal=False, sequences=sequences)

    def _attend_all(
        self, texts: Sequence[Extend], rope: Rope, q_sHD: Tensor, kv_s2hD: Tensor, _: Tensor
    ) -> Tensor:
        """Attention of each branch's tokens to its text and to each other, without a mask."""
        count = len(texts)
        parts = zip(texts, q_sHD.chunk(count), kv_s2hD.chunk(count), strict=True)
        o_sHD = [self._attend_branch(text, rope, q, kv) for text, q, kv in parts]
        return o_sHD[0] if count == 1 else torch.cat(o_sHD)

    def _attend_branch(self, extend: Extend, rope: Rope, q_sHD: Tensor, kv_s2hD: Tensor) -> Tensor:
        """The tokens that only fill the last rank's part are cut off before and put back after."""
        q_SHD, kv_S2hD = (scatter_heads(x, self._ulysses) for x in (q_sHD, kv_s2hD))
        k_KhD, v_KhD = extend(kv_S2hD[: rope.length]).unbind(1)
        attend = partial(self._attend, causal=False)
        if rope.controls:
            attend = partial(attend_in_turn, attend, rope.controls)
        o_SHD = attend(q_SHD[: rope.length], k_KhD, v_KhD)
        return gather_heads(_filled(o_SHD, q_SHD.shape[0]), self._ulysses)


class Understanding(nn.Module):
    """The text tower, as far as it is needed: the last layer ends at its keys and values."""

    def __init__(
        self,
        config: TransformerConfig,
        ulysses: Axis,
        attend: Attend,
        dtype: torch.dtype,
        heads: MakeHeads,
        quantized: Fp8Layers | None,
    ) -> None:
        super().__init__()
        self._ulysses, self._attend = ulysses, attend
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, params_dtype=dtype
        )
        self.layers = nn.ModuleList(
            Layer(config, dtype, heads, quantized) for _ in range(config.num_hidden_layers - 1)
        )
        self.last = LastLayer(config, dtype, quantized)
        self.sequence: Iterable[nn.Module] = (self.embed_tokens, *self.layers, self.last)

    def forward(self, ids_S: Tensor, rope: Rope) -> tuple[Tensor, ...]:
        cache: list[Tensor] = []
        parts = iter(self.sequence)
        next(parts)
        x_SD, residual_SD = self._embed(ids_S), None
        for layer in islice(parts, len(self.layers)):
            x_SD, residual_SD = layer(x_SD, residual_SD, rope, partial(self._attend_causal, cache))
        last = next(parts)
        return (*cache, self._own(last(x_SD, residual_SD, rope)))

    def _embed(self, ids_S: Tensor) -> Tensor:
        """The rows of ``ids_S``. vLLM 0.26 sums over the group even if this is its only rank."""
        if self.embed_tokens.tp_size == 1:
            return embedding(ids_S, self.embed_tokens.weight)
        return self.embed_tokens(ids_S)

    def _attend_causal(
        self, cache: list[Tensor], q_SHD: Tensor, kv_S2hD: Tensor, seen_S2hD: Tensor
    ) -> Tensor:
        cache.append(self._own(seen_S2hD))
        k_ShD, v_ShD = kv_S2hD.unbind(1)
        return self._attend(q_SHD, k_ShD, v_ShD, causal=True)

    def _own(self, kv_S2hD: Tensor) -> Tensor:
        """Every rank of the Ulysses axis reads the whole text, and keeps the heads it will use.

        A copy, as the layer's queries share the memory and are not needed any more.
        """
        return own_heads(kv_S2hD, self._ulysses).contiguous()


class Layer(nn.Module):
    """One layer of either tower; ``attend`` says what its tokens see.

    ``heads`` makes queries, keys and values of a projection. Matrices are ``quantized``, or of the
    ``dtype``.
    """

    def __init__(
        self,
        config: TransformerConfig,
        dtype: torch.dtype,
        heads: MakeHeads,
        quantized: Fp8Layers | None,
    ) -> None:
        super().__init__()
        width, head, backbone = config.hidden_size, config.head_dim, config.backbone
        count, kv_count = config.num_attention_heads, config.num_key_value_heads
        plain: dict[str, Any] = {
            "bias": False,
            "params_dtype": dtype,
            "return_bias": False,
            "quant_config": quantized,
        }
        self.input_norm = make_norm(config, width, dtype)
        self.qkv = QKVParallelLinear(width, head, count, kv_count, **plain)
        self.heads = heads(self.qkv.num_heads, self.qkv.num_kv_heads)
        self.out = RowParallelLinear(count * head, width, **plain)
        self.post_norm = make_norm(config, width, dtype)
        inner = [config.intermediate_size] * len(backbone.mlp_inputs)
        self.up = MergedColumnParallelLinear(width, inner, **plain)
        self.act = ACTIVATIONS[backbone.hidden_act]()
        self.down = RowParallelLinear(config.intermediate_size, width, **plain)

    def forward(
        self,
        x_SD: Tensor,
        residual_SD: Tensor | None,
        rope: Rope,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Hidden states and residual, which the next norm adds up."""
        x_SD, residual_SD = add_norm(self.input_norm, x_SD, residual_SD)
        q_SHD, kv_S2hD, seen_S2hD = self.heads(self.qkv(x_SD), rope)
        x_SD = self.out(attend(q_SHD, kv_S2hD, seen_S2hD).flatten(1))
        x_SD, residual_SD = add_norm(self.post_norm, x_SD, residual_SD)
        return self.down(self.act(self.up(x_SD))), residual_SD


class LastLayer(nn.Module):
    """The part of the last text layer that the generation tower sees."""

    def __init__(
        self, config: TransformerConfig, dtype: torch.dtype, quantized: Fp8Layers | None
    ) -> None:
        super().__init__()
        keys = config.num_key_value_heads * config.head_dim
        self._head_dim = config.head_dim
        self.input_norm = make_norm(config, config.hidden_size, dtype)
        self.kv = MergedColumnParallelLinear(
            config.hidden_size,
            [keys] * 2,
            bias=False,
            params_dtype=dtype,
            return_bias=False,
            quant_config=quantized,
        )
        self.k_norm = make_norm(config, config.head_dim, dtype)

    def forward(self, x_SD: Tensor, residual_SD: Tensor | None, rope: Rope) -> Tensor:
        x_SD, _ = add_norm(self.input_norm, x_SD, residual_SD)
        k_ShD, v_ShD = self.kv(x_SD).unflatten(1, (-1, self._head_dim)).chunk(2, dim=1)
        return torch.stack([rotate(self.k_norm(k_ShD), rope), v_ShD], dim=1)


class TimeEmbedding(nn.Module):
    """A timestep as one vector, in float32 throughout: thousandths matter at the last steps."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self._scale = config.timestep_scale
        self.linear_1 = nn.Linear(TIME_FREQUENCIES, config.hidden_size, dtype=torch.float32)
        self.linear_2 = nn.Linear(config.hidden_size, config.hidden_size, dtype=torch.float32)

    def forward(self, timestep: Tensor) -> Tensor:
        return self.linear_2(silu(self.linear_1(sinusoid(timestep * self._scale))))


def sinusoid(tau: Tensor) -> Tensor:
    """256 values of a float32 scalar: cosines, then sines, of frequencies 1 to 1/10000."""
    half = TIME_FREQUENCIES // 2
    index = torch.arange(half, dtype=torch.float32, device=tau.device)
    angle = tau * torch.exp(index * (-math.log(10000) / half))
    return torch.cat([angle.cos(), angle.sin()])


def _by_sample(streams: Sequence[Stream], context: Context) -> list[Sequence[Stream]]:
    each = len(streams) // context.samples
    return [streams[first : first + each] for first in range(0, len(streams), each)]


def _appended(text_K2hD: Tensor, own_S2hD: Tensor) -> Tensor:
    """Keys and values of the text, then of the tokens.

    Copied in words of eight bytes: as the tokens' are part of a wider row, torch copies element by
    element, and takes four times as long with two bytes each.
    """
    texts = text_K2hD.shape[0]
    both = own_S2hD.new_empty(texts + own_S2hD.shape[0], *own_S2hD.shape[1:])
    both[:texts] = text_K2hD
    both[texts:].view(torch.int64).copy_(own_S2hD.view(torch.int64))
    return both


def _filled(x: Tensor, length: int) -> Tensor:
    """``x`` with zeros appended up to ``length``; no copy where it is that long already."""
    missing = length - x.shape[0]
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x
