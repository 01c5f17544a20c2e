"""The gripper as an embodiment: its path as action rows and back, and what rows do to the world.

The rows are those of ``umi``: how the gripper gets from one frame to the next as a translation, here
in units of eight pixels, a rotation, which is none, and how far it is open.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.captions import instruction
from training.rendering import true_clip
from training.scenes import Canvas, Gripper, Scene, draw_scene, window

EMBODIMENT, DOMAIN, WIDTH = "umi", 6, 10
VIEW = "This video is captured from a wrist-mounted camera."  # the embodiment's, word for word
FPS, CHUNK = 20, 16
UNIT = 8.0  # pixels
OPEN = 20.0  # pixels between the middle and a finger of a gripper that counts as 1
_NO_ROTATION = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
_NEAR, _SNUG = 8.0, 6.0  # pixels: from the middle of what is gripped, and beyond its sides

Rows = NDArray[np.float32]


def rows_of(gripper: Gripper) -> Rows:
    """Action rows [T - 1, 10] of a path of T frames."""
    path = gripper.path
    rows = np.zeros((len(path) - 1, WIDTH), np.float32)
    rows[:, :2] = np.diff(path[:, :2], axis=0) / UNIT
    rows[:, 3:9] = _NO_ROTATION
    rows[:, 9] = path[1:, 2] / OPEN
    return rows


def path_of(rows: Rows, start: tuple[float, float]) -> NDArray[np.float64]:
    """x and y of the palm and half its opening [T, 3], from where it starts.

    Half the opening in the first frame is not told by the rows: it repeats the second's.
    """
    steps = np.vstack([[start], rows[:, :2].astype(float) * UNIT])
    opening = np.concatenate([rows[:1, 9], rows[:, 9]]) * OPEN
    return np.column_stack([steps.cumsum(0), opening])


def carried_out(scene: Scene, rows: Rows) -> Scene:
    """What the rows [T - 1, 10] do to the first frame of a scene with a gripper: a scene of T frames.

    A thing that the closed fingers are around moves with them; the others stay where they are.
    """
    assert scene.gripper is not None
    first = scene.gripper.path[0]
    moved = path_of(rows, (float(first[0]), float(first[1])))
    moved[0, 2] = first[2]
    path = np.column_stack([moved, np.full(len(moved), first[3])])
    things = []
    for thing in scene.things:
        palm = 1.4 * thing.radius + 4
        place = np.repeat(thing.path[:1], len(path), axis=0)
        for frame in range(1, len(path)):
            place[frame] = place[frame - 1]
            before, now = path[frame - 1], path[frame]
            around = np.abs(before[:2] + np.array([0, palm]) - place[frame - 1]).max() < _NEAR
            if around and max(before[2], now[2]) < thing.half_width + 3 + _SNUG:
                place[frame] += now[:2] - before[:2]
        things.append(replace(thing, path=place))
    canvas = replace(scene.canvas, frames=len(path))
    return replace(scene, canvas=canvas, things=tuple(things), gripper=Gripper(path), contacts=())


def picking(seed: int, chunks: int) -> Scene:
    """A scene of so many chunks in which the gripper goes to one of two things and lifts it."""
    return draw_scene(seed, Canvas(frames=chunks * CHUNK + 1, fps=FPS), {"pick": 1})


def action_fields(scene: Scene, mode: str) -> dict[str, Any]:
    """Those of `Cosmos3.generate` for a chunk of a scene, but for what is given and the number of steps."""
    return {
        "action_mode": mode, "domain_name": EMBODIMENT, "action_chunk_size": CHUNK,
        "prompt": f"{instruction(scene)}.".capitalize(), "seed": scene.seed % 2**32,
        "size": f"{scene.canvas.width}x{scene.canvas.height}",
    }  # fmt: skip


def closed_loop(scene: Scene, policy: Callable[[NDArray[np.uint8]], Rows], chunks: int) -> Scene:
    """What a policy does to the first frame of a scene, in ``chunks * CHUNK + 1`` frames.

    It is asked for the rows of a chunk with a picture [H, W, 3]; they are carried out in the world, which is
    drawn anew for the next chunk.
    """
    (done,) = closed_loops([scene], lambda pictures: [policy(*pictures)], chunks)
    return done


def closed_loops(
    scenes: Sequence[Scene],
    policy: Callable[[list[NDArray[np.uint8]]], Sequence[Rows]],
    chunks: int,
) -> list[Scene]:
    """`closed_loop` of several scenes, for whose chunks the policy is asked together, by scene."""
    now = [window(scene, 0, 1) for scene in scenes]
    done = now
    for _ in range(chunks):
        pictures = [true_clip(scene)[0].numpy() for scene in now]
        rows = policy(pictures)
        parts = [carried_out(a, b[:, :WIDTH]) for a, b in zip(now, rows, strict=True)]
        done = [_joined(a, b) for a, b in zip(done, parts, strict=True)]
        now = [window(part, CHUNK, 1) for part in parts]
    return done


def _joined(scene: Scene, following: Scene) -> Scene:
    """A scene and what follows, whose first frame is the last one of the scene."""
    assert scene.gripper is not None
    assert following.gripper is not None
    pairs = zip(scene.things, following.things, strict=True)
    things = tuple(replace(a, path=np.vstack([a.path, b.path[1:]])) for a, b in pairs)
    path = np.vstack([scene.gripper.path, following.gripper.path[1:]])
    canvas = replace(scene.canvas, frames=len(path))
    return replace(scene, canvas=canvas, things=things, gripper=Gripper(path))


def lifted(scene: Scene, least: float = 30.0) -> bool:
    """Whether the first thing, and no other, ends at least so many pixels higher than it began."""
    up = [thing.path[0, 1] - thing.path[-1, 1] for thing in scene.things]
    return bool(up[0] >= least and max(up[1:], default=0.0) < least)
