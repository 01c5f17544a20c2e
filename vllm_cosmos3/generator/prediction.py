"""Predicted velocities of a request: which branches of guidance are evaluated together, and recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor

from vllm_cosmos3.generator.models.transformer import Context, Transformer, join
from vllm_cosmos3.generator.sampling.packing import Stream
from vllm_cosmos3.parallel.graphs import Recording, launches_matter
from vllm_cosmos3.parallel.mesh import Axis
from vllm_cosmos3.request.plan import Plan

JOINED_TOKENS = 2048  # of all branches, up to which one forward is faster than one for each

Forward = Callable[..., Sequence[tuple[Tensor, ...]]]  # of the timestep and each stream's x


@dataclass(slots=True, kw_only=True, eq=False)
class Predictor:
    """The transformer for one request, with the ``contexts`` of this rank's branches.

    A forward for some branches is made once, as it may be a recorded CUDA graph: unless layers rest
    on the host, ``offloaded``, whose weights move.
    """

    transformer: Transformer
    plan: Plan
    contexts: Mapping[int, Context]
    world: Axis
    offloaded: bool
    _forwards: dict[tuple[int, ...], Forward] = field(default_factory=dict)

    def predict(
        self,
        streams: Sequence[Stream],
        moving: Sequence[int],
        timestep: Tensor,
        branches: Sequence[int],
    ) -> list[tuple[Tensor, ...]]:
        """The velocities of the streams at the places ``moving``, by branch."""
        found: dict[int, tuple[Tensor, ...]] = {}
        for group in self._groups(branches):
            seen = self.plan.seen(group[0])
            xs = (streams[place].x for place in seen)
            made = self._forward(streams, group)(timestep, *xs)
            for branch, velocities in zip(group, made, strict=True):
                named = zip(seen, velocities, strict=True)
                found[branch] = tuple(v for place, v in named if place in moving)
        return [found[branch] for branch in branches]

    def clear(self) -> None:
        """Forget all forwards: what is given of the streams is part of them, and changes."""
        self._forwards.clear()

    def _groups(self, branches: Sequence[int]) -> Iterator[tuple[int, ...]]:
        """Branches that are evaluated together: of the same streams, and where the tokens are few."""
        alike: dict[tuple[int, ...], list[int]] = {}
        for branch in branches:
            alike.setdefault(self.plan.seen(branch), []).append(branch)
        for group in alike.values():
            tokens = self.contexts[group[0]].rope.length
            size = len(group) if tokens * len(group) <= JOINED_TOKENS else 1
            for first in range(0, len(group), size):
                yield tuple(group[first : first + size])

    def _forward(self, streams: Sequence[Stream], branches: tuple[int, ...]) -> Forward:
        if branches not in self._forwards:
            context = join([self.contexts[branch] for branch in branches])
            seen = [streams[place] for place in self.plan.seen(branches[0])]
            forward = partial(_evaluate, self.transformer, seen, context, self.plan.domain_id)
            tokens = context.rope.table.shape[0]
            # Of several chunks each has forwards of its own.
            whole = not self.plan.later_chunks
            steps = self.plan.steps if whole else self.plan.parameters.num_inference_steps
            recorded = not self.offloaded and launches_matter(
                tokens, steps, self.world, self.transformer.device
            )
            self._forwards[branches] = Recording(forward) if recorded else forward
        return self._forwards[branches]


def _evaluate(
    transformer: Transformer,
    streams: Sequence[Stream],
    context: Context,
    domain_id: int,
    timestep: Tensor,
    *xs: Tensor,
) -> tuple[tuple[Tensor, ...], ...]:
    """The transformer as a function of what changes from step to step."""
    now = [replace(stream, x=x) for stream, x in zip(streams, xs, strict=True)]
    velocities: tuple[tuple[Tensor, ...], ...] = transformer(now, context, timestep, domain_id)
    return velocities
