"""Poses of cameras and end effectors as action rows, and back.

A pose is a rigid transform [4, 4] from the body to the world, in metres and OpenCV's axes (x right,
y down, z forward) for cameras. A row is the step from one pose to the next as the body itself sees
it, inverse(pose_t) @ pose_t+1: its translation (3), then the first two columns of its rotation (6).
Everything is float64.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vllm_cosmos3.errors import InvalidRequest

Array = NDArray[np.float64]
WIDTH = 9  # of a row


def relative_rows(poses: ArrayLike, *, translation_scale: float = 1.0) -> Array:
    """Rows [T - 1, 9] of poses [T, 4, 4].

    ``translation_scale`` is what the embodiment's translations are multiplied with: 1.35 for av.

    Raises:
        InvalidRequest: fewer than two poses, of another shape or singular, or a scale of 0.
    """
    absolute = _checked("poses", poses, (4, 4), 2)
    _check_scale(translation_scale)
    try:
        steps = np.linalg.inv(absolute[:-1]) @ absolute[1:]
    except np.linalg.LinAlgError:
        raise InvalidRequest("poses", "a singular matrix", "rigid transforms") from None
    columns = steps[:, :3, :2].swapaxes(1, 2).reshape(-1, 6)
    return np.concatenate([steps[:, :3, 3] * translation_scale, columns], axis=1)


def absolute_poses(
    rows: ArrayLike, *, start: ArrayLike | None = None, translation_scale: float = 1.0
) -> Array:
    """Poses [T, 4, 4] of rows [T - 1, 9] (wider ones too: the rest is not read).

    ``start`` [4, 4] is the first pose; without it, the world is where the body started. Rotations
    that a model predicts are not quite rotations; the nearest ones are taken.

    Raises:
        InvalidRequest: rows that are too narrow, or a scale of 0.
    """
    possible = f"finite numbers [T, {WIDTH}] or wider"
    given = _numbers("rows", rows, possible)
    if given.ndim != 2 or given.shape[1] < WIDTH:
        raise InvalidRequest("rows", list(given.shape), possible)
    _check_scale(translation_scale)
    steps = np.tile(np.eye(4), (len(given), 1, 1))
    steps[:, :3, :3] = rotations(given[:, 3:WIDTH])
    steps[:, :3, 3] = given[:, :3] / translation_scale
    poses = [
        np.eye(4) if start is None else _checked("start", np.asarray(start)[None], (4, 4), 1)[0]
    ]
    for step in steps:
        poses.append(poses[-1] @ step)
    return np.stack(poses)


def rotations(columns: ArrayLike) -> Array:
    """The rotation matrices [T, 3, 3] nearest to their first two columns [T, 6]."""
    first, second = np.split(_checked("columns", columns, (6,), 0), 2, axis=1)
    u, _, vt = np.linalg.svd(np.stack([first, second, np.cross(first, second)], axis=-1))
    u[:, :, 2] *= np.linalg.det(u @ vt)[:, None]  # no mirror images
    return np.asarray(u @ vt, np.float64)


def poses_from_quaternions(positions: ArrayLike, quaternions: ArrayLike) -> Array:
    """Poses [T, 4, 4] of positions [T, 3] and quaternions x, y, z, w [T, 4] of any length but 0."""
    xyz = _checked("positions", positions, (3,), 0)
    given = _checked("quaternions", quaternions, (4,), 0)
    length = np.linalg.norm(given, axis=1, keepdims=True)
    if len(xyz) != len(given) or not length.all():
        raise InvalidRequest("quaternions", list(given.shape), f"{len(xyz)} of a length above 0")
    x, y, z, w = (given / length).T
    poses = np.tile(np.eye(4), (len(xyz), 1, 1))
    poses[:, :3, 3] = xyz
    poses[:, 0, 0], poses[:, 0, 1], poses[:, 0, 2] = (
        1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w),
    )  # fmt: skip
    poses[:, 1, 0], poses[:, 1, 1], poses[:, 1, 2] = (
        2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w),
    )  # fmt: skip
    poses[:, 2, 0], poses[:, 2, 1], poses[:, 2, 2] = (
        2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y),
    )  # fmt: skip
    return poses


def quaternions_from_poses(poses: ArrayLike) -> Array:
    """Unit quaternions x, y, z, w [T, 4] with w >= 0 of poses [T, 4, 4].

    The eigenvector of the largest eigenvalue of a symmetric matrix (Bar-Itzhack, 2000): no cases.
    """
    r = _checked("poses", poses, (4, 4), 0)[:, :3, :3]
    k = np.empty((len(r), 4, 4))
    trace = np.trace(r, axis1=1, axis2=2)
    k[:, :3, :3] = r + r.swapaxes(1, 2) - trace[:, None, None] * np.eye(3)
    twist = np.stack([r[:, 2, 1] - r[:, 1, 2], r[:, 0, 2] - r[:, 2, 0], r[:, 1, 0] - r[:, 0, 1]], 1)
    k[:, :3, 3], k[:, 3, :3], k[:, 3, 3] = twist, twist, trace
    quaternions = np.linalg.eigh(k / 3)[1][:, :, -1]
    return np.asarray(quaternions * np.where(quaternions[:, 3:] < 0, -1.0, 1.0), np.float64)


def _checked(name: str, values: ArrayLike, shape: tuple[int, ...], least: int) -> Array:
    possible = f"finite numbers {['T', *shape]} with T of at least {least}".replace("'", "")
    array = _numbers(name, values, possible)
    if array.shape[1:] != shape or len(array) < least:
        raise InvalidRequest(name, list(array.shape), possible)
    return array


def _numbers(name: str, values: ArrayLike, possible: str) -> Array:
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        raise InvalidRequest(name, values, possible, "invalid_type") from None
    if not np.isfinite(array).all():
        raise InvalidRequest(name, "not finite", possible)
    return array


def _check_scale(scale: float) -> None:
    if not scale or not math.isfinite(scale):
        raise InvalidRequest("translation_scale", scale, "a finite number other than 0")
