"""Predicted velocities: which branches of guidance, of which samples, are evaluated together, recorded, reused.

Samples that are evaluated together may be of one request or of several whose plans have the same batch.
Their values in one stream are stacked along the first dimension, and so are their velocities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from vllm_cosmos3.checkpoint.latents import token_count
from vllm_cosmos3.generator.models.packed_texts import PackedTexts
from vllm_cosmos3.generator.models.transformer import Context, TextKV, Transformer, join
from vllm_cosmos3.generator.sampling.packing import Stream
from vllm_cosmos3.generator.sampling.step_cache import Reuse
from vllm_cosmos3.parallel.graphs import Recording, launches_matter
from vllm_cosmos3.parallel.mesh import Mesh
from vllm_cosmos3.request.plan import Plan

JOINED_TOKENS = 2048  # of all branches, up to which one forward is faster than one for each

Branches = tuple[int, ...]
Forward = Callable[..., Sequence[tuple[Tensor, ...]]]  # of the timestep and each stream's stacked x
NONE: frozenset[int] = frozenset()


@dataclass(slots=True, kw_only=True, eq=False)
class Predictor:
    """The transformer for one request, or for several of one batch, with the context of each branch of
    this rank in ``contexts``, by request.

    ``plan`` is that of any of them. A forward for some branches is made once, as it may be a recorded
    CUDA graph: unless layers rest on the host, ``offloaded``, whose weights move. ``start`` begins
    samples, or a chunk of one.
    """

    transformer: Transformer
    plan: Plan
    contexts: Sequence[Mapping[int, Context]]
    mesh: Mesh
    offloaded: bool
    _forwards: dict[tuple[Branches, int, bool], Forward] = field(default_factory=dict)
    _contexts: dict[tuple[Branches, int], Context] = field(default_factory=dict)  # joined
    _reuse: Reuse | None = None

    def start(self, *, fresh: bool) -> None:
        """Begin with new noise; ``fresh`` if what is given of the streams has changed as well."""
        if fresh:
            self._forwards.clear()
        policy, steps = self.plan.parameters.reuse, self.plan.parameters.num_inference_steps
        self._reuse = None if policy is None else Reuse(policy=policy, steps=steps)

    def decide(
        self, streams: Sequence[Stream], index: int, sigma: float, needed: Branches
    ) -> frozenset[int]:
        """Those of all branches that step ``index`` needs whose layers are not run but reused."""
        if self._reuse is None:
            return NONE
        moving = [s.x for s in streams if s.name == "vision" and bool(s.denoise_mask.any())]
        return self._reuse.decide(index, sigma, moving, list(self._groups(needed)))

    def predict(
        self,
        streams: Sequence[Stream],
        moving: Sequence[int],
        timestep: Tensor,
        index: int,
        reused: frozenset[int],
        branches: Sequence[int],
    ) -> list[tuple[Tensor, ...]]:
        """The velocities of the streams at the places ``moving``, by branch; of all samples, stacked.

        ``streams`` are those of one sample after the other. ``reused`` is what ``decide`` has said of
        step ``index``.
        """
        found: dict[int, tuple[Tensor, ...]] = {}
        for group in self._groups(branches, len(streams) // len(self.plan.streams)):
            seen = self.plan.seen(group[0])
            xs = (
                stacked([s.x for s in streams[place :: len(self.plan.streams)]]) for place in seen
            )
            evaluate = self._reused if reused.issuperset(group) else self._computed
            made = evaluate(streams, group, index, timestep, *xs)
            for branch, velocities in zip(group, made, strict=True):
                named = zip(seen, velocities, strict=True)
                found[branch] = tuple(v for place, v in named if place in moving)
        return [found[branch] for branch in branches]

    def clear(self) -> None:
        """Forget everything about the sample."""
        self._forwards.clear()
        self._contexts.clear()
        self._reuse = None

    def _groups(self, branches: Sequence[int], samples: int = 1) -> Iterator[Branches]:
        """Branches that are evaluated together: of the same streams, and where the tokens are few."""
        patch = self.transformer.config.latent_patch_size
        alike: dict[tuple[int, ...], list[int]] = {}
        for branch in branches:
            alike.setdefault(self.plan.seen(branch), []).append(branch)
        for group in alike.values():
            seen = (self.plan.streams[place] for place in self.plan.seen(group[0]))
            tokens = samples * sum(token_count(s.name, s.shape, patch) for s in seen)
            size = len(group) if tokens * len(group) <= JOINED_TOKENS else 1
            for first in range(0, len(group), size):
                yield tuple(group[first : first + size])

    def _computed(
        self, streams: Sequence[Stream], branches: Branches, index: int, *changing: Tensor
    ) -> Sequence[tuple[Tensor, ...]]:
        forward = self._forward(streams, branches)
        if self._reuse is None:
            return forward(*changing)
        *velocities, (residual_sD,) = forward(*changing)
        parts = residual_sD.chunk(len(branches))
        for branch, part in zip(branches, parts, strict=True):
            self._reuse.record(branch, index, part)
        return velocities

    def _reused(
        self, streams: Sequence[Stream], branches: Branches, index: int, *changing: Tensor
    ) -> Sequence[tuple[Tensor, ...]]:
        assert self._reuse is not None  # which has decided so
        residuals = [self._reuse.residual(branch, index) for branch in branches]
        given = self._given(streams, branches)
        return _continue(self.transformer, *given, torch.cat(residuals), *changing)

    def _given(
        self, streams: Sequence[Stream], branches: Branches
    ) -> tuple[list[Stream], Context, int]:
        """What stays the same from step to step."""
        each = len(self.plan.streams)
        seen = self.plan.seen(branches[0])
        places = range(0, len(streams), each)
        key = branches, len(places)
        if key not in self._contexts:
            if len(places) > 1:  # which has copies of texts: not of several groups at a time
                self._contexts.clear()
                self._forwards.clear()
            self._contexts[key] = self._joined(*key)
        return (
            [streams[first + place] for first in places for place in seen],
            self._contexts[key],
            self.plan.domain_id,
        )

    def _joined(self, branches: Branches, samples: int) -> Context:
        """The contexts of these branches of all samples as one."""
        contexts = [
            by_branch[branch]
            for by_branch in self.contexts
            for _ in range(samples // len(self.contexts))
            for branch in branches
        ]
        context = join(contexts, samples)
        texts = [text for text in context.texts if isinstance(text, TextKV)]
        if samples > 1 and self.mesh.ulysses.size == 1:  # else ranks have no whole sequences
            context = replace(context, packed=PackedTexts(texts, context.rope.length))
        return context

    def _forward(self, streams: Sequence[Stream], branches: Branches) -> Forward:
        key = branches, len(streams), self.transformer.precision.native
        if key not in self._forwards:
            seen, context, domain_id = self._given(streams, branches)
            evaluate = _evaluate if self._reuse is None else _evaluate_with_residual
            forward = partial(evaluate, self.transformer, seen, context, domain_id)
            tokens = context.rope.table.shape[0]  # of this rank, and the same on its neighbours
            # Of several chunks each has forwards of its own.
            whole = not self.plan.later_chunks
            steps = self.plan.steps if whole else self.plan.parameters.num_inference_steps
            recorded = not self.offloaded and launches_matter(
                tokens, steps, self.mesh, self.transformer.device
            )
            self._forwards[key] = Recording(forward) if recorded else forward
        return self._forwards[key]


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of several samples as one, along the first dimension."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _evaluate(
    transformer: Transformer,
    streams: Sequence[Stream],
    context: Context,
    domain_id: int,
    timestep: Tensor,
    *xs: Tensor,
) -> Sequence[tuple[Tensor, ...]]:
    """The velocities of some branches at once: what is recorded."""
    now = _moved(streams, xs)
    velocities: tuple[tuple[Tensor, ...], ...] = transformer(now, context, timestep, domain_id)
    return [
        tuple(stacked(branch[place :: len(xs)]) for place in range(len(xs)))
        for branch in velocities
    ]


def _evaluate_with_residual(
    transformer: Transformer,
    streams: Sequence[Stream],
    context: Context,
    domain_id: int,
    timestep: Tensor,
    *xs: Tensor,
) -> tuple[tuple[Tensor, ...], ...]:
    """The same, and last what the layers have added, [B s, D]."""
    now = _moved(streams, xs)
    x_sD = transformer.embed(now, context, timestep, domain_id)
    y_sD = transformer.run_layers(x_sD.clone(), context)
    return *transformer.velocities(now, context, y_sD, domain_id), (y_sD - x_sD,)


def _continue(
    transformer: Transformer,
    streams: Sequence[Stream],
    context: Context,
    domain_id: int,
    residual_sD: Tensor,
    timestep: Tensor,
    *xs: Tensor,
) -> tuple[tuple[Tensor, ...], ...]:
    """The same without the layers, which are taken to add ``residual_sD``."""
    now = _moved(streams, xs)
    x_sD = transformer.embed(now, context, timestep, domain_id)
    return transformer.velocities(now, context, x_sD + residual_sD, domain_id)


def _moved(streams: Sequence[Stream], xs: Sequence[Tensor]) -> list[Stream]:
    """The streams of one sample after the other, at what is stacked in ``xs``."""
    samples = len(streams) // len(xs)
    parts = zip(*(x.chunk(samples) for x in xs), strict=True)
    flat = (x for sample in parts for x in sample)
    return [replace(stream, x=x) for stream, x in zip(streams, flat, strict=True)]
