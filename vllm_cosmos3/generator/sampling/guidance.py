"""Classifier-free guidance: how far each step goes from the weaker to the stronger condition.

Branches are ordered from the fullest condition to the emptiest; branch 0 is the prompt. A step has
one scale between each branch and the next: plain guidance has two branches and one scale, transfer
nests a second pair. A scale of 1 means that the weaker branch does not matter and is not run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vllm_cosmos3.parallel.axis import Axis
from vllm_cosmos3.parallel.mesh import all_gather

Velocities = tuple[Tensor, ...]  # one float32 tensor for each stream
Scales = tuple[float, ...]  # one less than there are branches


def guidance_per_step(
    timesteps: Sequence[float], scale: float, interval: tuple[float, float] | None
) -> tuple[float, ...]:
    """``scale`` where ``interval`` (inclusive, in timesteps 0 to 1000) holds the step, else 1."""
    low, high = interval or (0.0, 1000.0)
    return tuple(scale if low <= t <= high else 1.0 for t in timesteps)


def branches_needed(scales: Scales) -> tuple[int, ...]:
    """Branches that a step with these scales evaluates: always 0, others unless their scale is 1."""
    return (0, *(branch for branch, scale in enumerate(scales, start=1) if scale != 1))


def branches_of_rank(per_step: Sequence[Scales], axis: Axis) -> tuple[int, ...]:
    """Branches that this rank evaluates in any of the steps: those whose text it must understand."""
    return tuple(sorted({branch for scales in per_step for branch in _share(scales, axis)}))


def idle_ranks(per_step: Sequence[Scales], axis: Axis) -> tuple[str, ...]:
    """A warning for the user if the CFG axis has nothing to share: no step is guided."""
    if axis.size == 1 or any(len(branches_needed(scales)) > 1 for scales in per_step):
        return ()
    return (
        f"cfg_parallel_size={axis.size} did not make this request faster: no step is guided, so "
        "all ranks but the first of that axis were idle; ulysses_degree would share the work",
    )


def guide(
    predict: Callable[[Sequence[int]], Sequence[Velocities]],
    scales: Scales,
    axis: Axis,
    latents: Velocities,
) -> Velocities:
    """The guided velocities of one step; ``predict`` evaluates some branches, perhaps at once.

    Branches are dealt over the CFG axis and gathered by one collective. A rank without a branch evaluates
    nothing and learns from ``latents`` what it receives. Every rank returns the same values.
    """
    needed = branches_needed(scales)
    share = _share(scales, axis)
    mine = dict(zip(share, predict(share), strict=True)) if share else {}
    velocities = mine if axis.size == 1 else _gathered(mine, needed, axis, latents)
    guided = velocities[0]
    for branch in needed[1:]:
        scale, weaker = scales[branch - 1], velocities[branch]
        guided = tuple(
            base + scale * (strong - base) for base, strong in zip(weaker, guided, strict=True)
        )
    return guided


def _share(scales: Scales, axis: Axis) -> tuple[int, ...]:
    """This rank's branches."""
    return _dealt(branches_needed(scales), axis.size)[axis.rank]


def _dealt(branches: Sequence[int], ranks: int) -> list[tuple[int, ...]]:
    """The branches of each rank: of the first the fullest condition, of the last all that are left.

    A branch has the same rank in every step, whichever are needed: that rank keeps its step cache.
    """
    last = ranks - 1
    return [tuple(b for b in branches if min(b, last) == rank) for rank in range(ranks)]


def _gathered(
    mine: dict[int, Velocities], needed: tuple[int, ...], axis: Axis, latents: Velocities
) -> dict[int, Velocities]:
    """All branches from all ranks, with one collective of equal sizes."""
    dealt = _dealt(needed, axis.size)
    flat = [torch.cat([v.flatten() for v in velocities]) for velocities in mine.values()]
    sizes = [x.numel() for x in latents]
    flat += [latents[0].new_zeros(sum(sizes))] * (max(map(len, dealt)) - len(flat))
    gathered = all_gather(torch.stack(flat), axis)
    return {
        branch: tuple(
            part.view_as(like) for part, like in zip(x.split(sizes), latents, strict=True)
        )
        for branches, rows in zip(dealt, gathered, strict=True)
        for branch, x in zip(branches, rows, strict=False)
    }
