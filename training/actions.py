"""The gripper as an embodiment: its path as action rows and back, and what rows do to the world.

The rows are those of ``umi``: how the gripper gets from one frame to the next as a translation, here
in units of eight pixels, a rotation, which is none, and how far it is open.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from training.scenes import Gripper, Scene

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


def lifted(before: Scene, after: Scene, least: float = 30.0) -> bool:
    """Whether the first thing, and no other, ends at least so many pixels higher than it began."""
    pairs = zip(before.things, after.things, strict=True)
    up = [start.path[0, 1] - end.path[-1, 1] for start, end in pairs]
    return up[0] >= least and max(up[1:], default=0.0) < least
