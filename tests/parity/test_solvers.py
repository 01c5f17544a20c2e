"""Solvers against the schedulers of diffusers on a nonlinear velocity field."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from vllm_cosmos3.generator.sampling import schedule as s
from vllm_cosmos3.generator.sampling.solvers import SOLVERS, SolverState

pytestmark = pytest.mark.parity

SHAPE = (1, 5, 10)


def field(x: Tensor, index: int) -> Tensor:
    """Any smooth velocity will do; this one differs from step to step."""
    return torch.tanh(1.7 * x) + 0.3 * x - 0.05 * index


def solve(name: str, schedule: s.Schedule, x: Tensor, noises: list[Tensor] | None = None) -> Tensor:
    state = SolverState()
    for index in range(schedule.steps):
        noise = noises[index] if noises else None
        x, state = SOLVERS[name].step(x, field(x, index), state, schedule.sigmas, index, noise)
    return x


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 35])
@pytest.mark.parametrize("name", ["native", "diffusers", "karras"])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
def test_unipc(steps: int, name: str, dtype: torch.dtype, bound: float) -> None:
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        sigma_max=200.0,
        sigma_min=0.147,
        flow_shift=10.0,
        use_karras_sigmas=name == "karras",
    )
    native = np.linspace(1 - 1 / 1000, 0, steps + 1)[:-1]
    scheduler.set_timesteps(steps, sigmas=native if name == "native" else None)
    scheduler.sigmas = scheduler.sigmas.to(dtype)  # float32 of its own making otherwise
    schedule = {
        "native": s.native(steps, 10.0),
        "diffusers": s.diffusers(steps, 10.0),
        "karras": s.karras(steps, 0.147, 200.0),
    }[name]
    start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=dtype)
    x = start
    for index, t in enumerate(scheduler.timesteps):
        x = scheduler.step(field(x, index), t, x, return_dict=False)[0]
    ours = solve("unipc", schedule, start)
    assert ours.dtype == dtype
    assert (ours - x).abs().max() <= bound
    assert (ours - start).abs().max() > 0.5


def test_sde() -> None:
    levels = [1.0, 0.9375, 0.8333333333333334, 0.625]
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=True)
    scheduler.set_timesteps(sigmas=levels)
    x = start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    for index, t in enumerate(scheduler.timesteps):
        x = scheduler.step(field(x, index), t, x, generator=generator, return_dict=False)[0]
    generator = torch.Generator().manual_seed(1)
    noises = [torch.randn(SHAPE, generator=generator) for _ in levels]
    ours = solve("sde", s.explicit(levels), start, noises)
    assert (ours - x).abs().max() <= 1e-6
