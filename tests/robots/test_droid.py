"""What a DROID robot sends becomes the request of its policy, and the answer joint positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from vllm_cosmos3.checkpoint.config import read_config
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.poses import poses_from_quaternions, relative_rows
from vllm_cosmos3.request.planner import make_plan
from vllm_cosmos3.request.prompts import load_tokenizer
from vllm_cosmos3.request.request import from_fields
from vllm_cosmos3.robots import droid


def message(**changes: Any) -> dict[str, Any]:
    return {k: v for k, v in (droid.example() | changes).items() if v is not None}


def end_effector(position: Any, quaternion: Any, gripper: Any = 0.25) -> dict[str, Any]:
    measured = {droid.POSITION: position, droid.QUATERNION: quaternion, droid.GRIPPER: gripper}
    return droid.example() | measured


def test_the_views_are_laid_out_as_in_the_training() -> None:
    colours = (np.array([200, 0, 0]), np.array([0, 200, 0]), np.array([0, 0, 200]))
    for shape in ((360, 640), (720, 1280), (224, 224)):
        views = [np.broadcast_to(colour.astype(np.uint8), (*shape, 3)) for colour in colours]
        keys = (droid.WRIST, *droid.FROM_ONE)
        image = droid.read(message(**dict(zip(keys, views, strict=True)))).image
        assert image.shape == (540, 640, 3)
        places = (image[:356], image[364:, :316], image[364:, 324:])
        for place, colour in zip(places, colours, strict=True):
            assert abs(place.astype(int) - colour).max() <= 1, shape


def test_a_wrist_of_the_usual_size_is_not_touched() -> None:
    wrist, left, right = np.random.default_rng(0).integers(0, 256, (3, 360, 640, 3), np.uint8)
    image = droid.compose(wrist, left, right)
    np.testing.assert_array_equal(image[:360], wrist)
    halves = left.reshape(180, 2, 320, 2, 3).mean((1, 3))  # the mean of four, rounded down
    np.testing.assert_array_equal(image[360:, :320], np.floor(halves))


def test_a_composed_picture_is_taken_as_it_is() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (540, 640, 3), np.uint8)
    picture.flags.writeable = False
    found = droid.read(message(**{droid.IMAGE: picture, droid.WRIST: None})).image
    np.testing.assert_array_equal(found, picture)
    assert found.flags.writeable


def test_cameras_may_be_counted_from_zero() -> None:
    from_one = droid.example()
    first, second = (from_one.pop(name) for name in droid.FROM_ONE)
    from_zero = from_one | dict(zip(droid.FROM_ZERO, (first, second), strict=True))
    np.testing.assert_array_equal(droid.read(from_zero).image, droid.read(droid.example()).image)


@pytest.mark.parametrize("arm", [np.arange(7), np.stack([np.ones(7), np.arange(7)]), [*range(7)]])
@pytest.mark.parametrize("gripper", [0.5, np.float32(0.5), [1, 0.5], np.array([[1.0], [0.5]])])
def test_the_last_of_a_series_counts(arm: Any, gripper: Any) -> None:
    seen = droid.read(message(**{droid.ARM: arm, droid.GRIPPER: gripper}))
    np.testing.assert_array_equal(seen.state, [*range(7), 0.5])
    assert seen.state.dtype == np.float32


BAD: dict[str, Any] = {
    "prompt": [None, 3, b"go"],
    droid.WRIST: [None, 1, np.zeros((4, 4, 3), np.uint8), np.zeros((90, 160, 4), np.uint8)],
    droid.FROM_ONE[1]: [None, np.zeros((90, 160, 3), np.float32)],
    droid.IMAGE: [None, np.zeros((16, 2561, 3), np.uint8)],
    droid.ARM: [None, True, "x", [1, "x"], [[1], [1, 2]], [{}] * 7, np.zeros((0, 7)), np.zeros((1, 1, 7)), np.full(7, np.inf)],
    droid.GRIPPER: [None, False, np.zeros(0), np.zeros((2, 2)), np.zeros(1, bool), "0.5"],
    "sampling_params": [3, [1]],
}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [(key, value) for key in BAD for value in BAD[key]])
def test_what_is_wrong_is_named(key: str, value: Any) -> None:
    if key == droid.IMAGE and value is None:
        bad = droid.example() | {key: None}
    else:
        bad = message() | {key: value}
        if value is None:
            del bad[key]
    with pytest.raises(InvalidRequest) as refused:
        droid.read(bad)
    assert refused.value.field == key
    assert f"{key} is " in str(refused.value)


def test_null_in_the_sampling_is_nothing() -> None:
    asked = {"num_inference_steps": None, "guidance_scale": None, "flow_shift": 7.0}
    seen = droid.read(message(sampling_params=asked))
    request = from_fields(droid.request_fields(seen, seed=0))
    assert (request.num_inference_steps, request.guidance_scale, request.flow_shift) == (4, 3, 7)
    with pytest.raises(InvalidRequest, match=r"sampling_params.steps is missing"):
        droid.read(message(sampling_params={"steps": None}))


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.binary(),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=10,
) | arrays.arrays(
    st.sampled_from(["u1", "i8", "f2", "f8", "b1"]), arrays.array_shapes(min_dims=0, max_side=8)
)


@given(st.dictionaries(st.sampled_from([*BAD, droid.POSITION, droid.QUATERNION]), VALUES))
@settings(max_examples=300, deadline=None)
def test_whatever_is_sent_is_read_or_refused_by_its_key(changes: dict[str, Any]) -> None:
    views = dict.fromkeys((droid.WRIST, *droid.FROM_ONE), np.zeros((16, 16, 3), np.uint8))
    for space in (droid.JOINT_POS, droid.MIDTRAIN):
        usual = end_effector(np.zeros(3), np.ones(4)) | views
        try:
            seen = droid.read(usual | changes, space)
        except InvalidRequest as error:
            at_fault = error.field.split(".")[0]
        else:
            at_fault = next(iter(changes), "nothing")
            assert np.isfinite(seen.state).all()
        assert at_fault in {*changes, "nothing"}


@given(st.lists(st.floats(-3, 3, width=32), min_size=8, max_size=8))
@settings(deadline=None)
def test_the_gripper_is_turned_around_on_both_ways(state: list[float]) -> None:
    seen = droid.Observation(
        prompt="go",
        image=np.zeros((540, 640, 3), np.uint8),
        state=np.array(state, np.float32),
        sampling={},
    )
    given_to_model = droid.request_fields(seen, seed=0)["action_state"]
    back = droid.actions(np.array([given_to_model], np.float32), seen)[0]
    np.testing.assert_allclose(back, state, atol=1e-6)
    assert given_to_model[:7] == state[:7]
    assert given_to_model[7] == pytest.approx(1 - state[7], abs=1e-6)


@given(st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_steps_of_the_end_effector_lead_to_its_poses(seed: int) -> None:
    random = np.random.default_rng(seed)
    quaternions = random.normal(size=(33, 4))
    quaternions /= np.linalg.norm(quaternions, axis=1, keepdims=True)
    quaternions *= np.where(quaternions[:, 3:] < 0, -1, 1)
    positions = random.uniform(-1, 1, (33, 3))
    seen = droid.read(end_effector(positions[0], quaternions[0]), droid.MIDTRAIN)
    grippers = random.uniform(0, 1, 32)
    steps = relative_rows(poses_from_quaternions(positions, quaternions))
    rows = np.concatenate([steps, 1 - grippers[:, None]], axis=1).astype(np.float32)
    found = droid.actions(rows, seen)
    assert (found.shape, found.dtype) == ((32, 8), np.float32)
    np.testing.assert_allclose(found[:, :3], positions[1:], atol=1e-4)
    turned = abs((found[:, 3:7] * quaternions[1:]).sum(1))  # 1 where both are the same rotation
    np.testing.assert_allclose(turned, 1, atol=1e-5)
    np.testing.assert_allclose(found[:, 7], grippers, atol=1e-6)


def test_the_state_of_the_end_effector_is_its_pose() -> None:
    turn = [0, 0, np.sin(np.pi / 4), np.cos(np.pi / 4)]  # x becomes y
    seen = droid.read(end_effector([[9, 9, 9], [1, 2, 3]], [turn, turn]), droid.MIDTRAIN)
    np.testing.assert_allclose(seen.state, [1, 2, 3, 0, 1, 0, -1, 0, 0, 0.25], atol=1e-6)
    fields = droid.request_fields(seen, seed=0)
    assert fields["raw_action_dim"] == 10
    assert fields["action_state"][-1] == 0.75


@pytest.mark.parametrize(
    ("key", "value"),
    [(droid.POSITION, np.zeros(2)), (droid.QUATERNION, np.zeros(4)), (droid.QUATERNION, "x")],
)
def test_an_end_effector_that_is_nowhere(key: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as refused:
        droid.read(end_effector(np.zeros(3), np.ones(4)) | {key: value}, droid.MIDTRAIN)
    assert refused.value.field == key


def test_the_request_is_that_of_the_policy(tiny_checkpoint: Path) -> None:
    seen = droid.read(droid.example())
    request = from_fields(droid.request_fields(seen, seed=3))
    tokenizer = load_tokenizer(tiny_checkpoint)
    plan = make_plan(request, read_config(tiny_checkpoint), tokenizer)
    streams = {stream.name: stream for stream in plan.streams}
    assert streams["vision"].shape == (1, 48, 9, 33, 40)
    assert streams["vision"].known == (0,)
    action = streams["action"]
    assert (action.shape, action.known, action.first_frame) == ((33, 64), (0,), 0)
    np.testing.assert_allclose(action.source[0, :8], [*seen.state[:7], 1 - seen.state[7]])
    assert (
        plan.parameters.fps,
        plan.parameters.num_inference_steps,
        plan.parameters.guidance_scale,
        plan.parameters.flow_shift,
    ) == (
        15,
        4,
        3,
        5,
    )
    assert (plan.domain_id, plan.decoded, plan.seeds) == (8, False, (3,))
    text = tokenizer.decode(plan.token_ids[0])
    assert (
        "put the cup on the plate. This video contains concatenated views from multiple camera "
        "perspectives. The top row is from the wrist-mounted camera. The bottom row contains two "
        "horizontally concatenated third-person perspective views of the scene from opposite sides, "
        "with the robot visible. The video is 2.2 seconds long and is of 15 FPS. "
    ) in text
    assert "This video is of 544x736 resolution." in text
