"""Schedules against the schedulers of diffusers: every number exact."""

from __future__ import annotations

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_cosmos3.generator.sampling import schedule as s

pytestmark = pytest.mark.parity

STEPS = st.integers(1, 130)
SHIFTS = st.sampled_from([1.0, 3.0, 5.0, 10.0, 12.5])


def oracle(**changes: object) -> UniPCMultistepScheduler:
    """As published with Nano and Super, changes aside."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        sigma_max=200.0,
        sigma_min=0.147,
        **changes,
    )


def assert_equal(ours: s.Schedule, scheduler: UniPCMultistepScheduler) -> None:
    assert list(ours.sigmas) == scheduler.sigmas.tolist()
    assert list(ours.timesteps) == scheduler.timesteps.tolist()


@settings(max_examples=60, deadline=None)
@given(steps=STEPS, shift=SHIFTS)
def test_native(steps: int, shift: float) -> None:
    scheduler = oracle(flow_shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1 - 1 / 1000, 0, steps + 1)[:-1])
    assert_equal(s.native(steps, shift), scheduler)


@settings(max_examples=60, deadline=None)
@given(steps=STEPS, shift=SHIFTS)
def test_diffusers(steps: int, shift: float) -> None:
    scheduler = oracle(flow_shift=shift)
    scheduler.set_timesteps(steps)
    assert_equal(s.diffusers(steps, shift), scheduler)


@settings(max_examples=30, deadline=None)
@given(steps=STEPS)
def test_karras(steps: int) -> None:
    scheduler = oracle(use_karras_sigmas=True)
    scheduler.set_timesteps(steps)
    assert_equal(s.karras(steps, sigma_min=0.147, sigma_max=200.0), scheduler)


def test_distilled() -> None:
    levels = [1.0, 0.9375, 0.8333333333333334, 0.625]
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=True)
    scheduler.set_timesteps(sigmas=levels)
    assert_equal(s.explicit(levels), scheduler)
