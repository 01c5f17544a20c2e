"""The published numbers of each schedule, and what every schedule must be."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_cosmos3.checkpoint.config import SchedulerConfig
from vllm_cosmos3.generator.sampling import schedule as s

CHECKPOINT = SchedulerConfig(
    sigma_min=0.147,
    sigma_max=200.0,
    flow_shift=1.0,
    t_list=None,
)

# fmt: off
NATIVE_35 = [999, 996, 993, 990, 987, 983, 979, 975, 971, 966, 961, 956, 950, 944, 937, 930, 922, 913,
             904, 893, 882, 869, 855, 838, 820, 799, 775, 747, 714, 673, 624, 563, 483, 377, 227]
DIFFUSERS_35 = [999, 997, 993, 990, 987, 983, 979, 975, 971, 966, 961, 956, 950, 944, 937, 930, 922,
                913, 904, 894, 882, 869, 855, 839, 821, 800, 776, 748, 715, 675, 626, 565, 486, 381,
                233]
KARRAS_35 = [995, 994, 993, 992, 991, 990, 988, 986, 984, 981, 978, 975, 970, 965, 958, 950, 941, 929,
             915, 898, 877, 852, 822, 785, 742, 693, 636, 572, 504, 432, 361, 292, 229, 174, 128]
# fmt: on


@pytest.mark.parametrize(
    ("name", "timesteps"),
    [("native", NATIVE_35), ("diffusers", DIFFUSERS_35), ("karras", KARRAS_35)],
)
def test_published_timesteps(name: str, timesteps: list[int]) -> None:
    schedule = s.make_schedule(name, steps=35, shift=10.0, scheduler=CHECKPOINT)
    assert list(schedule.timesteps) == timesteps


def test_published_sigmas() -> None:
    sigmas = s.native(35, 10.0).sigmas
    assert sigmas[:3] == pytest.approx((0.9999, 0.996965, 0.993871), abs=1e-6)
    assert sigmas[-3:] == pytest.approx((0.377109, 0.227092, 0.0), abs=1e-6)
    assert s.native(4, 5.0).timesteps == (999, 937, 833, 624)
    assert s.native(50, 3.0).timesteps[:4] == (999, 992, 985, 978)


def test_a_distilled_checkpoint_has_its_own_list() -> None:
    levels = (1.0, 0.9375, 0.8333333333333334, 0.625)
    distilled = replace(CHECKPOINT, t_list=levels)
    schedule = s.make_schedule("native", steps=35, shift=10.0, scheduler=distilled)
    assert schedule.sigmas == pytest.approx((*levels, 0.0), abs=1e-7)
    assert schedule.timesteps == pytest.approx((1000, 937.5, 833.3333, 625), abs=1e-3)


def test_equal_timesteps_have_different_sigmas() -> None:
    """From 107 steps on a timestep can occur twice, so nothing may look a step up by it."""
    schedule = s.native(113, 10.0)
    assert schedule.timesteps[0] == schedule.timesteps[1]
    assert schedule.sigmas[0] > schedule.sigmas[1]
    assert len(set(s.native(106, 10.0).timesteps)) == 106


@given(
    name=st.sampled_from(sorted(s.SCHEDULES)), steps=st.integers(1, 200), shift=st.floats(0.01, 100)
)
def test_every_schedule_descends_to_zero(name: str, steps: int, shift: float) -> None:
    schedule = s.make_schedule(name, steps=steps, shift=shift, scheduler=CHECKPOINT)
    assert schedule.steps == steps == len(schedule.sigmas) - 1
    assert schedule.sigmas[-1] == 0
    assert all(a > b for a, b in zip(schedule.sigmas, schedule.sigmas[1:], strict=False))
    assert 0 < schedule.sigmas[0] < 1
    for sigma, t in zip(schedule.sigmas, schedule.timesteps, strict=False):
        assert t == int(t)
        assert t <= 1000 * sigma * (1 + 1e-6) < t + 1.002


def test_karras_needs_its_bounds() -> None:
    with pytest.raises(ValueError, match="sigma_min and sigma_max"):
        s.make_schedule("karras", steps=4, shift=1.0, scheduler=replace(CHECKPOINT, sigma_min=None))
