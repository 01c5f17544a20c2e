"""What solvers must do whatever the model says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_cosmos3.generator.sampling.schedule import native
from vllm_cosmos3.generator.sampling.solvers import SOLVERS, SolverState
from vllm_cosmos3.request.request import SPECS

DETERMINISTIC = [name for name, solver in SOLVERS.items() if not solver.draws_noise]
STEP = {
    "unipc": SOLVERS["unipc"].step,
    "euler": lambda x, v, state, s, i, _: (x + (s[i + 1] - s[i]) * v, state),
}


def solve(name: str, steps: int, x: Tensor, velocity: Tensor, shift: float = 5.0) -> Tensor:
    state, schedule = SolverState(), native(steps, shift)
    for index in range(steps):
        x, state = SOLVERS[name].step(x, velocity, state, schedule.sigmas, index, None)
    return x


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(DETERMINISTIC),
    steps=st.integers(1, 50),
    shift=st.sampled_from([SPECS["flow_shift"].low, 5.0, SPECS["flow_shift"].high]),
    seed=st.integers(0, 99),
)
def test_a_straight_path_is_solved_exactly(name: str, steps: int, shift: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    clean, noise = (torch.randn(20, generator=generator, dtype=torch.float64) for _ in range(2))
    top = native(steps, shift).sigmas[0]
    x = (1 - top) * clean + top * noise
    torch.testing.assert_close(
        solve(name, steps, x, noise - clean, shift), clean, atol=1e-9, rtol=0
    )


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_no_velocity_means_no_change(name: str) -> None:
    x = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert (solve(name, 35, x, torch.zeros_like(x)) - x).abs().max() <= 2e-6


def test_unipc_converges_faster_than_euler() -> None:
    """On dx/dsigma = x - 1 from x(1) = 2, an exact answer is known."""

    def error(name: str, steps: int) -> float:
        x, state = torch.tensor([2.0], dtype=torch.float64), SolverState()
        sigmas = [*(1 - 1e-6 - i / steps for i in range(steps)), 0.0]
        for index in range(steps):
            x, state = STEP[name](x, x - 1, state, sigmas, index, None)
        return float((x - 1 - torch.exp(torch.tensor(-1.0, dtype=torch.float64))).abs())

    assert error("unipc", 40) < error("euler", 40) / 20
    assert error("unipc", 80) < error("unipc", 40) / 3
    assert error("euler", 80) > error("euler", 40) / 3


def test_state_is_a_value() -> None:
    """A step can be repeated from the same state with the same result: nothing is written over."""
    x, state, sigmas = torch.randn(9), SolverState(), native(4, 5.0).sigmas
    for index in range(3):
        before = x.clone()
        first = SOLVERS["unipc"].step(x, x.sin(), state, sigmas, index, None)
        again = SOLVERS["unipc"].step(x, x.sin(), state, sigmas, index, None)
        assert torch.equal(first[0], again[0])
        assert torch.equal(x, before)
        x, state = first


def test_sde_adds_the_noise_it_is_given() -> None:
    x, velocity, noise = (torch.randn(50) for _ in range(3))
    following, _ = SOLVERS["sde"].step(x, velocity, SolverState(), (1.0, 0.25, 0.0), 0, noise)
    torch.testing.assert_close(following, 0.75 * (x - velocity) + 0.25 * noise)
    last, _ = SOLVERS["sde"].step(x, velocity, SolverState(), (1.0, 0.25, 0.0), 1, noise)
    torch.testing.assert_close(last, x - 0.25 * velocity)
