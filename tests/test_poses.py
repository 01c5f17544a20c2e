"""Poses to action rows and back, for any poses; and the conventions, by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vllm_cosmos3 import poses
from vllm_cosmos3.errors import InvalidRequest

number = st.floats(-1, 1, allow_subnormal=False)
quaternion = st.tuples(number, number, number, number).filter(
    lambda q: sum(x * x for x in q) > 0.01
)
position = st.tuples(*[st.floats(-100, 100)] * 3)
path = st.lists(st.tuples(position, quaternion), min_size=2, max_size=61)


def matrices(points: list[tuple[tuple[float, ...], tuple[float, ...]]]) -> NDArray[np.float64]:
    return poses.poses_from_quaternions([p for p, _ in points], [q for _, q in points])


def turn(degrees: float) -> NDArray[np.float64]:
    """A pose at the origin, turned about the camera's axis, z."""
    half = np.radians(degrees) / 2
    return poses.poses_from_quaternions([[0, 0, 0]], [[0, 0, np.sin(half), np.cos(half)]])[0]


@settings(deadline=None)
@given(path, st.floats(0.1, 10))
def test_rows_and_back(points: list, scale: float) -> None:
    there = matrices(points)
    rows = poses.relative_rows(there, translation_scale=scale)
    assert rows.shape == (len(points) - 1, 9)
    back = poses.absolute_poses(rows, start=there[0], translation_scale=scale)
    assert np.abs(back - there).max() <= 1e-6


@settings(deadline=None)
@given(path)
def test_quaternions_and_back(points: list) -> None:
    there = matrices(points)
    quaternions = poses.quaternions_from_poses(there)
    assert np.allclose(np.linalg.norm(quaternions, axis=1), 1)
    assert (quaternions[:, 3] >= 0).all()
    back = poses.poses_from_quaternions(there[:, :3, 3], quaternions)
    assert np.abs(back - there).max() <= 1e-6


@settings(deadline=None)
@given(path, path)
def test_rows_do_not_depend_on_the_world(points: list, world: list) -> None:
    there, moved = matrices(points), matrices(world)[0]
    assert np.abs(
        poses.relative_rows(moved @ there) - poses.relative_rows(there)
    ).max() <= 1e-6  # fmt: skip


@settings(deadline=None)
@given(st.lists(quaternion, min_size=1, max_size=5), st.integers(0, 2**31))
def test_what_a_model_predicts_becomes_the_nearest_rotation(points: list, seed: int) -> None:
    exact = poses.poses_from_quaternions(np.zeros((len(points), 3)), points)[:, :3, :3]
    columns = exact[:, :, :2].swapaxes(1, 2).reshape(-1, 6)
    noisy = columns + np.random.default_rng(seed).normal(0, 0.02, columns.shape)
    found = poses.rotations(noisy)
    assert np.abs(found @ found.swapaxes(1, 2) - np.eye(3)).max() <= 1e-9
    assert np.allclose(np.linalg.det(found), 1)
    assert np.abs(found - exact).max() <= 0.3


def test_a_step_forward_after_a_turn() -> None:
    """The translation is in the axes of the frame before; the rotation is written by columns."""
    left = turn(90)
    ahead = left @ np.array([[1.0, 0, 0, 2], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    rows = poses.relative_rows([np.eye(4), left, ahead], translation_scale=1.35)
    assert np.allclose(rows[0], [0, 0, 0, 0, 1, 0, -1, 0, 0])
    assert np.allclose(rows[1], [2.7, 0, 0, 1, 0, 0, 0, 1, 0])
    assert np.allclose(ahead[:3, 3], [0, 2, 0])


def test_further_numbers_of_a_row_are_not_read() -> None:
    rows = np.array([[1, 0, 0, 1, 0, 0, 0, 1, 0, 0.5]])
    assert np.allclose(poses.absolute_poses(rows)[1][:3, 3], [1, 0, 0])


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: poses.relative_rows([np.eye(4)]), "poses"),
        (lambda: poses.relative_rows(np.zeros((3, 3))), "poses"),
        (lambda: poses.relative_rows(np.zeros((3, 4, 4))), "poses"),
        (lambda: poses.relative_rows([[1, 2], [3]]), "poses"),
        (
            lambda: poses.relative_rows([np.eye(4)] * 2, translation_scale=np.nan),
            "translation_scale",
        ),
        (lambda: poses.absolute_poses(np.zeros((2, 8))), "rows"),
        (lambda: poses.absolute_poses([[np.nan] * 9]), "rows"),
        (lambda: poses.absolute_poses("a path"), "rows"),
        (lambda: poses.absolute_poses(np.zeros((1, 9)), translation_scale=0), "translation_scale"),
        (lambda: poses.absolute_poses(np.zeros((1, 9)), start=np.eye(3)), "start"),
        (lambda: poses.poses_from_quaternions([[0, 0, 0]], [[0, 0, 0, 0]]), "quaternions"),
        (lambda: poses.poses_from_quaternions([[0, 0, 0]] * 2, [[0, 0, 0, 1]]), "quaternions"),
    ],
)
def test_wrong_shapes(call, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        call()
    assert caught.value.field == field
