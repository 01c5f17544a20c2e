"""The demo checkpoint of this clone, in this process and served, and what is asked of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from judged import made
from servers import BIN, BOTH, SMALL, Server, running

from training.captions import draw_caption
from training.scenes import draw_scene
from training.yardstick import Prompt
from vllm_cosmos3 import Cosmos3

SEEDS = (60_000_001, 60_000_003, 60_000_004, 60_000_006, 60_000_007, 60_000_008)  # never trained on
PAIRS = (  # one thing pushes another
    *(60_000_108, 60_000_111, 60_000_113, 60_000_115),
    *(60_000_120, 60_000_124, 60_000_129, 60_000_130),
)


@pytest.fixture(scope="session")
def prompts() -> list[Prompt]:
    """Six prompts: of single things, of a push, of a gripper."""
    return [Prompt(scene, draw_caption(scene)) for scene in map(draw_scene, SEEDS)]


@pytest.fixture(scope="session")
def pairs() -> list[Prompt]:
    """Eight prompts of two things that touch: the hardest."""
    return [Prompt(scene, draw_caption(scene)) for scene in map(draw_scene, PAIRS)]


@pytest.fixture(scope="session")
def demo() -> Iterator[Cosmos3]:
    with Cosmos3("demo", device="cpu") as model:
        yield model


@pytest.fixture(scope="session")
def clips(demo: Cosmos3, prompts: list[Prompt]) -> list[np.ndarray]:
    """The clip of each prompt, from the prompt alone."""
    return [made(demo, prompt) for prompt in prompts]


@pytest.fixture(scope="session")
def server(vllm_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Both surfaces, started by the checkpoint's short name."""
    folder = tmp_path_factory.mktemp("demo")
    command = [str(BIN / "vllm-cosmos3"), "serve", "demo", *SMALL]
    command += ["--storage-path", str(folder / "storage")]
    with running(command, folder, vllm_cache, variables=BOTH) as server:
        yield server
