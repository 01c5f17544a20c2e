"""LeRobot's side of a dataset: imagined episodes, written through the calls of its own writer."""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from media_files import picture, png
from servers import Server

pytestmark = pytest.mark.serve
EXAMPLES = Path(__file__).parents[2] / "examples" / "lerobot"


class Dataset:
    """What `LeRobotDataset` 0.4 is to the example: the same calls, and its check of every frame."""

    made: Dataset

    def __init__(self, fps: int, features: dict[str, Any], root: str) -> None:
        self.fps, self.features, self.root = fps, features, root
        self.episodes: list[list[dict[str, Any]]] = []
        self._frames: list[dict[str, Any]] = []
        self.finalized = False

    @classmethod
    def create(
        cls, repo_id: str, fps: int, features: dict[str, Any], *, root: str | None = None
    ) -> Dataset:
        assert "/" in repo_id
        assert root is not None
        cls.made = cls(fps, features, root)
        return cls.made

    def add_frame(self, frame: dict[str, Any]) -> None:
        assert frame.keys() == {*self.features, "task"}
        for name, feature in self.features.items():
            assert frame[name].shape == tuple(feature["shape"])
            kinds = {"video": np.uint8, "float32": np.float32}
            assert frame[name].dtype == kinds[feature["dtype"]]
        self._frames.append(frame)

    def save_episode(self) -> None:
        assert self._frames
        self.episodes.append(self._frames)
        self._frames = []

    def finalize(self) -> None:
        self.finalized = True


def test_imagined_episodes_are_a_dataset(
    generator_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "first.png").write_bytes(png(picture(64, 64)))
    module = ModuleType("lerobot.datasets.lerobot_dataset")
    module.LeRobotDataset = Dataset  # type: ignore[attr-defined]
    for name in ("lerobot", "lerobot.datasets"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    fields = {"size": "64x64", "num_inference_steps": 1, "action_chunk_size": 4}
    monkeypatch.setitem(os.environ, "FIELDS", json.dumps(fields))
    words = [generator_server.url, str(tmp_path / "first.png"), str(tmp_path / "data")]
    monkeypatch.setattr(sys, "argv", ["lerobot_dataset.py", *words, "pick it up", "put it down"])
    runpy.run_path(str(EXAMPLES / "lerobot_dataset.py"), run_name="__main__")
    made = Dataset.made
    assert made.finalized
    assert (made.fps, made.root) == (5, str(tmp_path / "data"))
    assert made.features["action"]["shape"] == (10,)
    assert [[frame["task"] for frame in episode] for episode in made.episodes] == [
        ["pick it up"] * 4,
        ["put it down"] * 4,
    ]
