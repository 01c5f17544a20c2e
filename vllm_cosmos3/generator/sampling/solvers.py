"""Solvers: one step from one noise level to the next, on one tensor of any shape.

A noisy sample is ``x = (1 - sigma) * clean + sigma * noise`` and the model predicts the velocity
``noise - clean``. Every solver is a function of the step counter and of an explicit `SolverState`, so
steps can be separate calls. Updates run in the dtype of ``x``: float32 in use, float64 in tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import expm1, log, log1p

from torch import Tensor, cat


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SolverState:
    """Memory of a solver: what it keeps of the steps before. One-step solvers keep an estimate, to show."""

    estimates: tuple[Tensor, ...] = ()  # of the clean sample, newest first, at most two
    corrected: Tensor | None = None  # the sample the last step started from
    order: int = 0  # of the last step


Step = Callable[
    [Tensor, Tensor, SolverState, Sequence[float], int, Tensor | None], tuple[Tensor, SolverState]
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Solver:
    """``step(x, velocity, state, sigmas, index, noise)`` returns the next x and state.

    ``sigmas`` has one entry more than there are steps. ``noise`` is fresh standard noise like x
    where ``draws_noise``, else None.
    """

    step: Step
    draws_noise: bool = False


def unipc(
    x: Tensor,
    velocity: Tensor,
    state: SolverState,
    sigmas: Sequence[float],
    index: int,
    _: Tensor | None,
) -> tuple[Tensor, SolverState]:
    """UniPC of order 2 with B(h) = exp(-h) - 1 and data prediction (Zhao et al. 2023, Alg. 1, 2).

    First corrects ``x`` with the new estimate, then predicts the next one. The first step is of
    order 1; the last, to noise level 0, ends at the estimate itself.
    """
    estimate = x - sigmas[index] * velocity
    if state.corrected is not None:
        x = _correct(state.corrected, estimate, state, sigmas, index)
    order = min(2, index + 1)
    following = _predict(x, estimate, state.estimates, order, sigmas, index)
    return following, SolverState(
        estimates=(estimate, *state.estimates[:1]), corrected=x, order=order
    )


def sde(
    x: Tensor,
    velocity: Tensor,
    state: SolverState,
    sigmas: Sequence[float],
    index: int,
    noise: Tensor | None,
) -> tuple[Tensor, SolverState]:
    """Distilled checkpoints: estimate the clean sample and noise it afresh to the next level."""
    estimate = x - sigmas[index] * velocity
    state = SolverState(estimates=(estimate,))
    level = sigmas[index + 1]
    if level == 0 or noise is None:
        return estimate, state
    return (1 - level) * estimate + level * noise, state


def stacked_states(states: Sequence[SolverState]) -> SolverState:
    """The state of several samples that are stacked along the first dimension, all after the same step."""
    if len(states) == 1:
        return states[0]
    first = states[0]
    corrected = [state.corrected for state in states if state.corrected is not None]
    return SolverState(
        estimates=tuple(map(cat, zip(*(state.estimates for state in states), strict=True))),
        corrected=cat(corrected) if corrected else None,
        order=first.order,
    )


def unstacked_states(state: SolverState, samples: int) -> list[SolverState]:
    """The state of each sample again."""
    if samples == 1:
        return [state]
    estimates = [x.chunk(samples) for x in state.estimates]
    corrected = (None,) * samples if state.corrected is None else state.corrected.chunk(samples)
    return [
        SolverState(
            estimates=tuple(parts[place] for parts in estimates),
            corrected=corrected[place],
            order=state.order,
        )
        for place in range(samples)
    ]


SOLVERS = {
    "unipc": Solver(step=unipc),
    "sde": Solver(step=sde, draws_noise=True),
}


def _predict(
    x: Tensor,
    estimate: Tensor,
    earlier: tuple[Tensor, ...],
    order: int,
    sigmas: Sequence[float],
    index: int,
) -> Tensor:
    now, following = sigmas[index], sigmas[index + 1]
    if following == 0:
        return estimate
    h = _log_snr(following) - _log_snr(now)
    weight = (1 - following) * expm1(-h)
    following_x = (following / now) * x - weight * estimate
    if order == 2:
        r = (_log_snr(sigmas[index - 1]) - _log_snr(now)) / h
        following_x = following_x - weight * 0.5 / r * (earlier[0] - estimate)
    return following_x


def _correct(
    corrected: Tensor, estimate: Tensor, state: SolverState, sigmas: Sequence[float], index: int
) -> Tensor:
    """The sample at ``index`` again, from the one before it, now that its own estimate is known."""
    now, before = sigmas[index], sigmas[index - 1]
    h = _log_snr(now) - _log_snr(before)
    phi = expm1(-h)
    last = state.estimates[0]
    if state.order == 1:
        slope = 0.5 * (estimate - last)
    else:
        r = (_log_snr(sigmas[index - 2]) - _log_snr(before)) / h
        k = phi / -h - 1
        b1, b2 = k / phi, 2 * (k / -h - 0.5) / phi
        rho = (b1 - b2) / (1 - r)
        slope = (rho / r) * (state.estimates[1] - last) + (b1 - rho) * (estimate - last)
    return (now / before) * corrected - (1 - now) * phi * (last + slope)


def _log_snr(sigma: float) -> float:
    """Log of signal over noise at a level in (0, 1)."""
    return log1p(-sigma) - log(sigma)
