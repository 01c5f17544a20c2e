"""The demo checkpoint of this clone, and what was asked of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from training.captions import Caption, draw_caption
from training.scenes import Scene, draw_scene
from vllm_cosmos3 import Cosmos3

DEMO = Path(__file__).parents[2] / "checkpoints" / "demo"
SEEDS = (60_000_001, 60_000_003, 60_000_004, 60_000_006, 60_000_007, 60_000_008)  # never trained on


@pytest.fixture(scope="session")
def demo() -> Iterator[Cosmos3]:
    with Cosmos3(DEMO, device="cpu") as model:
        yield model


@pytest.fixture(scope="session")
def asked() -> list[tuple[Scene, Caption]]:
    """Six scenes and their prompts."""
    scenes = [draw_scene(seed) for seed in SEEDS]
    return [(scene, draw_caption(scene)) for scene in scenes]
