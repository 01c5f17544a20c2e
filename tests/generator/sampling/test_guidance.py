"""Guidance: which branches run, on which rank, and that the formula holds."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import Ranks
from torch import Tensor

from vllm_cosmos3.engine_options import ParallelConfig
from vllm_cosmos3.generator.sampling.guidance import (
    branches_needed,
    branches_of_rank,
    guidance_per_step,
    guide,
)
from vllm_cosmos3.parallel.axis import Axis
from vllm_cosmos3.parallel.mesh import Mesh

ALONE = Axis("cfg", 1, 0, None)
SCALES = st.one_of(st.just(1.0), st.floats(-2, 10))


def velocities(branch: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(branch)
    return torch.randn(1, 3, 2, 4, generator=generator), torch.randn(5, 7, generator=generator)


def several(branches: Sequence[int]) -> list[tuple[Tensor, ...]]:
    return [velocities(branch) for branch in branches]


def test_the_interval_is_inclusive() -> None:
    timesteps = (1000.0, 999.0, 500.0, 400.0, 399.0)
    assert guidance_per_step(timesteps, 7.0, (400, 999)) == (1.0, 7.0, 7.0, 7.0, 1.0)
    assert guidance_per_step(timesteps, 7.0, None) == (7.0,) * 5


@given(scale=SCALES)
def test_plain_guidance(scale: float) -> None:
    ran = []
    guided = guide(lambda bs: (ran.extend(bs), several(bs))[1], (scale,), ALONE, velocities(0))
    for v, c, u in zip(guided, velocities(0), velocities(1), strict=True):
        torch.testing.assert_close(v, u + scale * (c - u))
    assert ran == ([0] if scale == 1 else [0, 1])


@given(control=SCALES, text=SCALES)
def test_nested_guidance(control: float, text: float) -> None:
    """Transfer: the control signal first, then the text, each against the branch without it."""
    guided = guide(several, (control, text), ALONE, velocities(0))
    full, bare, negative = (velocities(b) for b in range(3))
    for v, f, b, n in zip(guided, full, bare, negative, strict=True):
        strong = b + control * (f - b)
        torch.testing.assert_close(v, n + text * (strong - n), atol=1e-4, rtol=1e-5)


def test_branches_that_do_not_matter_are_not_run() -> None:
    assert branches_needed((1.0,)) == (0,)
    assert branches_needed((3.0, 1.0)) == (0, 1)
    assert branches_needed((1.0, 3.0)) == (0, 2)


@pytest.mark.parametrize(
    ("per_step", "expected"),
    [
        ([(6.0,)], [(0,), (1,)]),
        ([(1.0,)], [(0,), ()]),
        ([(1.0,), (6.0,)], [(0,), (1,)]),
        ([(3.0, 6.0)], [(0,), (1, 2)]),
        ([(3.0, 6.0), (3.0, 1.0), (1.0, 6.0)], [(0,), (1, 2)]),
    ],
)
def test_each_rank_reads_only_its_texts(
    per_step: list[tuple[float, ...]], expected: list[tuple[int, ...]]
) -> None:
    shares = [branches_of_rank(per_step, Axis("cfg", 2, rank, None)) for rank in range(2)]
    assert shares == expected


def guide_on_rank(mesh: Mesh, scales: tuple[float, ...]) -> tuple[list[int], list[Tensor]]:
    ran: list[int] = []
    guided = guide(lambda bs: (ran.extend(bs), several(bs))[1], scales, mesh.cfg, velocities(0))
    return ran, list(guided)


@pytest.mark.parametrize("scales", [(6.0,), (1.0,), (1.5, 3.0), (1.0, 3.0)])
def test_two_ranks_share_the_branches(scales: tuple[float, ...], ranks: Ranks) -> None:
    results = ranks(ParallelConfig(cfg_parallel_size=2), guide_on_rank, scales)
    expected = guide(several, scales, ALONE, velocities(0))
    for rank, (ran, guided) in enumerate(results):
        assert tuple(ran) == branches_of_rank([scales], Axis("cfg", 2, rank, None))
        for a, b in zip(guided, expected, strict=True):
            assert torch.equal(a, b)
