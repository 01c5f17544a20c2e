"""Noise by the two published rules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from vllm_cosmos3.generator.sampling.noise import initial_noise, step_noise
from vllm_cosmos3.request.request import SPECS

SHAPES = {"vision": (1, 48, 2, 3, 4), "sound": (64, 5), "action": (4, 64)}


def test_numpy_starts_again_for_every_stream() -> None:
    noise = initial_noise(SHAPES, seed=42, rule="numpy")
    for name, shape in SHAPES.items():
        expected = np.random.RandomState(42).standard_normal(shape).astype(np.float32)
        assert torch.equal(noise[name], torch.from_numpy(expected))
    assert torch.equal(noise["sound"].flatten()[:9], noise["action"].flatten()[:9])


def test_torch_draws_one_stream_after_the_other() -> None:
    generator = torch.Generator().manual_seed(42)
    expected = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    noise = initial_noise(SHAPES, seed=42, rule="torch")
    assert all(torch.equal(noise[name], expected[name]) for name in SHAPES)
    again = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    following = step_noise(SHAPES, seed=42, rule="torch", index=0)
    assert all(torch.equal(following[name], again[name]) for name in SHAPES)


@pytest.mark.parametrize("rule", SPECS["noise"].choices)
def test_noise_is_reproducible_and_new_at_each_step(rule: str) -> None:
    drawn = [step_noise(SHAPES, seed=7, rule=rule, index=i)["vision"] for i in (0, 1, 1, 2)]
    assert torch.equal(drawn[1], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[3])
    first = initial_noise(SHAPES, seed=7, rule=rule)["vision"]
    assert not torch.equal(first, initial_noise(SHAPES, seed=8, rule=rule)["vision"])
    assert first.dtype == torch.float32
    assert abs(float(first.std()) - 1) < 0.1


@pytest.mark.parametrize("rule", SPECS["noise"].choices)
def test_every_chunk_draws_its_own_noise(rule: str) -> None:
    """Initial and fresh, and numpy's by seeds that differ too."""
    steps, seed, small = 4, 2**32 - 1, {"vision": (1, 2, 2, 3, 4)}
    drawn = []
    for chunk in range(5):
        common: dict[str, Any] = {"seed": seed, "rule": rule, "chunk": chunk, "fresh": steps}
        drawn.append(initial_noise(small, **common)["vision"])
        for index in range(steps):
            drawn.append(step_noise(small, index=index, **common)["vision"])
    assert len({tuple(noise.flatten().tolist()) for noise in drawn}) == 5 * (1 + steps)
    if rule == "torch":
        generator = torch.Generator().manual_seed(seed)
        assert all(torch.equal(x, torch.randn(x.shape, generator=generator)) for x in drawn)


def test_numpy_steps_follow_the_seed() -> None:
    generator = torch.Generator().manual_seed(7 + 2)
    expected = torch.randn(SHAPES["vision"], generator=generator)
    assert torch.equal(step_noise(SHAPES, seed=7, rule="numpy", index=2)["vision"], expected)
