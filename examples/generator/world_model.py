"""A world model in a closed loop: a toy policy sees the frames, and turns the camera towards the light.

    python world_model.py nvidia/Cosmos3-Nano-Sim-Bimanual street.png street.mp4

No server is needed. Each chunk of actions gives the next frames, and those the next actions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from vllm_cosmos3 import Cosmos3
from vllm_cosmos3.media import write_video
from vllm_cosmos3.poses import relative_rows

Frames = np.ndarray  # uint8 [T, H, W, 3]
TURN = 0.01  # radians from one frame to the next


class WorldModel:
    """A simulator as an environment: ``reset`` gives the first frame, ``step`` those after actions."""

    def __init__(self, model: Cosmos3, **start: Any) -> None:
        self._model, self._start = model, {"domain_name": "camera_pose", **start}
        self._session = model.session(**self._start)

    def reset(self) -> Frames:
        if self._session.frames > 1:
            self._session.close()
            self._session = self._model.session(**self._start)
        return self._session.first

    def step(self, turn: float) -> Frames:
        """The frames while the camera turns right by so many radians from frame to frame."""
        count, _ = self._session.action_shape
        poses = np.tile(np.eye(4), (count + 1, 1, 1))
        angle = turn * np.arange(count + 1)
        poses[:, 0, 0] = poses[:, 2, 2] = np.cos(angle)
        poses[:, 0, 2], poses[:, 2, 0] = np.sin(angle), -np.sin(angle)
        return self._session.step(relative_rows(poses))

    def close(self) -> None:
        self._session.close()


def towards_the_light(frames: Frames) -> float:
    """A policy: right if the right half of the last frame is brighter, else left."""
    left, right = np.array_split(frames[-1].mean(axis=(0, 2)), 2)
    return TURN if right.mean() > left.mean() else -TURN


def closed_loop(world: WorldModel, policy: Callable[[Frames], float], steps: int) -> Frames:
    """All frames of so many steps, each with what the policy makes of the frames before."""
    seen = [world.reset()]
    for _ in range(steps):
        seen.append(world.step(policy(seen[-1])))
    return np.concatenate(seen)


def main(checkpoint: str, picture: str, out: str, steps: int = 6) -> None:
    with Cosmos3(checkpoint) as model:
        world = WorldModel(model, prompt="A street, seen by a slowly turning camera", image=picture)
        write_video(out, closed_loop(world, towards_the_light, steps), fps=24)
        world.close()


if __name__ == "__main__":
    main(*sys.argv[1:4])
