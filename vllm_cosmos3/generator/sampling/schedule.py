"""Noise schedules: the noise levels that a request visits, and their timesteps for the transformer.

A schedule is two lists of numbers. Solvers use the noise levels (sigmas) in full precision and are
indexed by a step counter; the integer timesteps are for the transformer alone, because from about
107 steps on two of them can be equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_cosmos3.checkpoint.config import SchedulerConfig

TRAIN_TIMESTEPS = 1000  # a timestep is a noise level in thousandths


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """``sigmas``: n + 1 descending noise levels in [0, 1], the last one 0; float32 values.

    ``timesteps``: n numbers in [0, 1000], the transformer's condition at each step.
    """

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]

    @property
    def steps(self) -> int:
        return len(self.timesteps)


def native(steps: int, shift: float) -> Schedule:
    """Evenly spaced from 0.999 towards 0, then shifted: the schedule the models were tuned with."""
    return _truncated(_shifted(np.linspace(1 - 1 / TRAIN_TIMESTEPS, 0, steps + 1)[:-1], shift))


def diffusers(steps: int, shift: float) -> Schedule:
    """Evenly spaced from 1 towards 0.001, then shifted: UniPC of diffusers with flow sigmas."""
    sigmas = _shifted(np.linspace(1, 1 / TRAIN_TIMESTEPS, steps + 1)[:-1], shift)
    sigmas[0] = min(sigmas[0], 1 - 1e-6)  # the log of the signal level must stay finite
    return _truncated(sigmas)


def karras(steps: int, sigma_min: float, sigma_max: float) -> Schedule:
    """Karras et al. 2022, eq. 5 with rho 7, mapped to flow levels by e / (1 + e). Has no shift."""
    ramp = np.linspace(0, 1, steps)
    low, high = sigma_min ** (1 / 7), sigma_max ** (1 / 7)
    levels = (high + ramp * (low - high)) ** 7.0
    return _truncated(levels / (levels + 1))


def explicit(sigmas: Sequence[float]) -> Schedule:
    """The fixed levels of a distilled checkpoint, without the final 0. Timesteps keep fractions."""
    levels = np.asarray(sigmas, dtype=np.float32)
    timesteps = levels * np.float32(TRAIN_TIMESTEPS)
    return Schedule(sigmas=(*map(float, levels), 0.0), timesteps=tuple(map(float, timesteps)))


def _karras_of_checkpoint(steps: int, _shift: float, scheduler: SchedulerConfig) -> Schedule:
    if scheduler.sigma_min is None or scheduler.sigma_max is None:
        raise ValueError("a karras schedule needs sigma_min and sigma_max in the scheduler file")
    return karras(steps, scheduler.sigma_min, scheduler.sigma_max)


SCHEDULES: dict[str, Callable[[int, float, SchedulerConfig], Schedule]] = {
    "native": lambda steps, shift, _: native(steps, shift),
    "diffusers": lambda steps, shift, _: diffusers(steps, shift),
    "karras": _karras_of_checkpoint,
}


def make_schedule(name: str, *, steps: int, shift: float, scheduler: SchedulerConfig) -> Schedule:
    """The schedule ``name`` of SCHEDULES; a distilled checkpoint's own list takes precedence."""
    if scheduler.t_list is not None:
        return explicit(scheduler.t_list)
    return SCHEDULES[name](steps, shift, scheduler)


def _shifted(levels: NDArray[np.float64], shift: float) -> NDArray[np.float64]:
    return shift * levels / (1 + (shift - 1) * levels)


def _truncated(sigmas: NDArray[np.float64]) -> Schedule:
    timesteps = tuple(float(int(t)) for t in sigmas * TRAIN_TIMESTEPS)
    return Schedule(sigmas=(*map(float, sigmas.astype(np.float32)), 0.0), timesteps=timesteps)
