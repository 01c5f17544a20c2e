"""The gripper's path as action rows of an embodiment, and back.

The rows are those of ``umi``: how the gripper gets from one frame to the next as a translation, here
in hundreds of pixels, a rotation, which is none, and how far it is open.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from training.scenes import Gripper

EMBODIMENT, WIDTH = "umi", 10
UNIT = 100.0  # pixels
OPEN = 60.0  # pixels between the middle and a finger of a gripper that counts as 1
_NO_ROTATION = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)

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
