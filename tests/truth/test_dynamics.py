"""Actions of the demo checkpoint: rows move what they should, paths become rows, and a policy lifts a thing.

Bounds in pixels of a 320x192 picture are those that the seeds 0, 1 and 2 all pass.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from benchmarks.truth_actions import CHUNKS, carried_out_by, forward_errors, inverse_errors
from training.actions import CHUNK, WIDTH, closed_loop, lifted, picking
from training.scenes import Scene
from vllm_cosmos3 import Cosmos3

FIRST, COUNT = 61_000_000, 6
STEPS = {"num_inference_steps": 6, "seed": 0}


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [picking(FIRST + i, CHUNKS) for i in range(COUNT)]


@pytest.fixture(scope="module")
def policy() -> Iterator[Cosmos3]:
    with Cosmos3("demo-policy", device="cpu") as model:
        yield model


def test_forward_dynamics(demo: Cosmos3, scenes: list[Scene]) -> None:
    """Things end where the rows take them."""
    errors = forward_errors(demo, scenes, **STEPS)
    assert np.median(errors) < 12
    assert sum(error < 20 for error in errors) >= COUNT - 1


def test_inverse_dynamics(demo: Cosmos3, scenes: list[Scene]) -> None:
    """The rows of a clip are the gripper's path."""
    errors = inverse_errors(demo, scenes, **STEPS)
    assert max(errors) < 8


def test_a_policy_lifts_the_named_thing(policy: Cosmos3, scenes: list[Scene]) -> None:
    """In a closed loop: what it wants is carried out in the world, which it sees again."""
    wins = [lifted(scene) for scene in carried_out_by(policy, scenes, **STEPS)]
    assert sum(wins) >= COUNT - 1


def test_doing_nothing_lifts_nothing(scenes: list[Scene]) -> None:
    still = np.zeros((CHUNK, WIDTH), np.float32)
    assert not any(lifted(closed_loop(scene, lambda _: still, CHUNKS)) for scene in scenes)
