"""The example of a world model: a closed loop on a tiny simulator."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from rollouts import PICTURE

from vllm_cosmos3 import Cosmos3
from vllm_cosmos3.checkpoint.synthetic import write_checkpoint

EXAMPLE = Path(__file__).parents[2] / "examples" / "generator" / "world_model.py"


@pytest.mark.parametrize(("kind", "frames"), [("sim-bimanual-camera", 16), ("sim-bimanual", 8)])
def test_the_loop_is_closed(tmp_path: Path, kind: str, frames: int) -> None:
    spec = importlib.util.spec_from_file_location("world_model", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    write_checkpoint(tmp_path / "tiny", kind=kind)
    turns: list[float] = []

    def policy(seen: np.ndarray) -> float:
        turns.append(example.towards_the_light(seen))
        return turns[-1]

    with Cosmos3(tmp_path / "tiny", device="cpu") as model:
        world = example.WorldModel(model, prompt="A street", image=PICTURE, size="48x64", seed=1)
        made = example.closed_loop(world, policy, 2)
        again = example.closed_loop(world, policy, 2)
        world.close()
    assert made.shape == (1 + 2 * frames, 64, 48, 3)
    assert np.array_equal(made, again)
    assert turns[:2] == turns[2:]
    assert set(map(abs, turns)) == {example.TURN}
