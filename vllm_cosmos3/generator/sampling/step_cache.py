"""Step cache (SeaCache, arXiv 2602.18993): which denoising steps are computed and which reused.

From step to step the noisy latents of the video are filtered, so that what is signal at this noise
level remains, and compared. Where little has changed since the last computed step, the layers are
passed over: their output is their input plus a residual, what they added to it in the computed steps
before.

Everything is decided from whole latents, which are the same bits on every rank, and for all branches of
guidance, not only those of this rank. So ranks agree without a message, whatever the mesh.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vllm_cosmos3.request.step_cache import StepCache

POWER = 3.0  # of the frequency, by which the spectrum of clean video falls
TINY = 1e-16
CLOSEST = 1e-6  # of a noise level to 0 and 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Trail:
    """A branch after a step: the change since it was last computed, and steps reused since then."""

    step: int
    change: float
    reused: int


@dataclass(slots=True, kw_only=True, eq=False)
class Reuse:
    """What is reused of the steps of one sample, or of one chunk of it.

    ``decide`` is called once in each step. Residuals are [s, D], of the tokens of this rank, by branch:
    of the last computed steps, with their indexes, newest last.
    """

    policy: StepCache
    steps: int
    _seen: tuple[Tensor, ...] = ()  # the filtered latents of the last step
    _trails: dict[int, Trail] = field(default_factory=dict)
    _residuals: dict[int, tuple[tuple[int, Tensor], ...]] = field(default_factory=dict)

    def decide(
        self,
        index: int,
        sigma: float,
        latents: Sequence[Tensor],
        groups: Sequence[tuple[int, ...]],
    ) -> frozenset[int]:
        """The branches that are reused in step ``index``, of those in ``groups``.

        ``latents`` are the videos [1, C, T, h, w] with something to denoise, as they enter the step at
        noise level ``sigma``. Branches of one group are evaluated together, so they share a decision.
        The first and the last step are computed, and a branch that was left out of the step before.
        """
        seen = tuple(filtered(x, sigma) for x in latents)
        change = mean_change(seen, self._seen)
        self._seen = seen
        reused: set[int] = set()
        for group in groups:
            trails = [self._trail(branch, index) for branch in group]
            computed = index in (0, self.steps - 1) or any(
                trail is None
                or trail.reused >= self.policy.max_reused
                or not trail.change + change < self.policy.threshold  # also if it is no number
                for trail in trails
            )
            for branch, trail in zip(group, trails, strict=True):
                now = Trail(step=index, change=0.0, reused=0)
                if trail is not None and not computed:
                    now = Trail(step=index, change=trail.change + change, reused=trail.reused + 1)
                self._trails[branch] = now
            reused.update(() if computed else group)
        return frozenset(reused)

    def record(self, branch: int, index: int, residual_sD: Tensor) -> None:
        """Remember what the layers have added in a computed step."""
        kept = (*self._residuals.get(branch, ()), (index, residual_sD))
        self._residuals[branch] = kept[-self.policy.kept :]

    def residual(self, branch: int, index: int) -> Tensor:
        """What they would add in step ``index``, by the computed ones."""
        *earlier, (last, latest) = self._residuals[branch]
        if not earlier:
            return latest
        before, previous = earlier[-1]
        return latest + (latest - previous) * ((index - last) / (last - before))

    def _trail(self, branch: int, index: int) -> Trail | None:
        """The branch in the step before; what is older is forgotten."""
        trail = self._trails.get(branch)
        if trail is None or trail.step == index - 1:
            return trail
        self._residuals.pop(branch, None)
        return None


def filtered(x: Tensor, sigma: float) -> Tensor:
    """Signal in the noisy video ``x`` [1, C, T, h, w] at level ``sigma``: float32 [T, h, w, C].

    A Wiener filter for video whose power falls with the frequency on each axis, scaled to mean 1.
    """
    x_ThwC = x[0].movedim(0, -1).contiguous().float()
    sigma = min(max(sigma, CLOSEST), 1 - CLOSEST)
    axes, gain = (0, 1, 2), torch.ones((), device=x.device)
    for axis in axes:
        frequency = torch.fft.fftfreq(x_ThwC.shape[axis], device=x.device, dtype=torch.float32)
        power = 1 / (frequency.abs().pow(POWER) + TINY)
        along = (1 - sigma) * power / ((1 - sigma) ** 2 * power + sigma**2 + TINY)
        gain = gain * along.view([-1 if each == axis else 1 for each in range(4)])
    spectrum = torch.fft.fftn(x_ThwC, dim=axes) * (gain / gain.mean())
    return torch.fft.ifftn(spectrum, dim=axes).real


def mean_change(now: Sequence[Tensor], before: Sequence[Tensor]) -> float:
    """Mean absolute change of each tensor over its mean absolute value before, on average.

    Infinite where there is nothing to compare, so that nothing is reused. Waits for the device.
    """
    if not now or len(now) != len(before):
        return float("inf")
    changes = [
        float((x - y).abs().mean() / (y.abs().mean() + TINY))
        for x, y in zip(now, before, strict=True)
    ]
    return sum(changes) / len(changes)
