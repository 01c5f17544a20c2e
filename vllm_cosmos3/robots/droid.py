"""The DROID robot: from what it sees and measures to a policy request, and back to where it goes.

For checkpoints such as Cosmos3-Nano-Policy-DROID: a Franka arm with seven joints, a gripper and
three cameras. The numbers are those of its training. A policy moves the joints, or (for checkpoints
that were trained like that) the end effector, whose steps are relative to each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.media import Pixels
from vllm_cosmos3.poses import (
    absolute_poses,
    poses_from_quaternions,
    quaternions_from_poses,
    rotations,
)

NAME = "droid"  # of the robot, in `kinds.KINDS`
# How the checkpoints of each kind were told what to do; Edge's by a JSON caption.
PROMPT_FORMATS = {"policy-droid": "plain", "edge-policy-droid": "auto"}
JOINT_POS, MIDTRAIN = "joint_pos", "midtrain"  # what an action is about: joints, end effector
JOINTS = 7
WIDTH = 8  # of an answer: seven joints, or position and quaternion; and the gripper
HORIZON = 32  # actions of one answer
FPS = 15.0  # actions per second
CANVAS = (540, 640)  # height and width of the composed views
MAX_SIDE = 2560  # pixels of a camera; those of DROID have 2208
VIEWS = (
    "The top row is from the wrist-mounted camera. The bottom row contains two horizontally "
    "concatenated third-person perspective views of the scene from opposite sides, with the robot "
    "visible."
)
IMAGE = "observation/image"
WRIST = "observation/wrist_image_left"
# openpi counts the cameras of the room from 1, RoboArena from 0.
FROM_ONE = ("observation/exterior_image_1_left", "observation/exterior_image_2_left")
FROM_ZERO = ("observation/exterior_image_0_left", "observation/exterior_image_1_left")
ARM, GRIPPER = "observation/joint_position", "observation/gripper_position"
POSITION, QUATERNION = "observation/eef_pos", "observation/eef_quat"
ADJUSTABLE = ("num_inference_steps", "guidance_scale", "flow_shift")


def metadata(space: str) -> dict[str, Any]:
    """What a policy server of the RoboArena family tells its clients."""
    return {
        "image_resolution": list(CANVAS),
        "n_external_cameras": 2,
        "needs_wrist_camera": True,
        "needs_stereo_camera": False,
        "needs_session_id": True,
        "action_space": "joint_position" if space == JOINT_POS else "cartesian_position",
    }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Observation:
    """One moment of the robot.

    ``image`` is uint8 [540, 640, 3]: the wrist camera above, the two of the room below. ``state``
    is float32: seven joints [rad], or position [m] and the first two columns of the rotation (6) of
    the end effector; then the gripper, 0 open to 1 closed.
    """

    prompt: str
    image: Pixels
    state: NDArray[np.float32]
    sampling: Mapping[str, Any]


def read(message: Mapping[str, Any], space: str = JOINT_POS) -> Observation:
    """An observation from the keys that DROID clients send; other keys are ignored.

    Pictures are uint8 [H, W, 3]: ``observation/image`` with all views as `compose` lays them out,
    or one for each camera. They are stretched to the size that the policy knows. Positions are [7]
    and one number, or series of them, of which the last counts.

    Raises:
        InvalidRequest: a key is missing or has a wrong type or shape; its field is the key.
    """
    prompt = message.get("prompt")
    if not isinstance(prompt, str):
        raise InvalidRequest("prompt", prompt, "text", _absent(prompt))
    if space == JOINT_POS:
        arm = _last(message, ARM, JOINTS, "joint positions [rad]")
    else:
        arm = _end_effector(message)
    gripper = _numbers(message, GRIPPER, "a number from 0 (open) to 1 (closed), or a series")
    if gripper.ndim > 2 or not gripper.size or gripper.shape[1:] not in ((), (1,)):
        shape = f"an array {list(gripper.shape)}"
        raise InvalidRequest(GRIPPER, shape, "one number, [T] or [T, 1]", "invalid_type")
    return Observation(
        prompt=prompt,
        image=_canvas(message),
        state=np.array([*arm, gripper.reshape(-1)[-1]], np.float32),
        sampling=_sampling(message),
    )


def request_fields(
    observation: Observation, *, seed: int | None, kind: str = "policy-droid"
) -> dict[str, Any]:
    """The policy request of one observation, for `Cosmos3.generate` or `request.from_fields`.

    ``kind`` is the checkpoint's, policy-droid or edge-policy-droid. No pixels are made of it, only
    actions.
    """
    state = observation.state.copy()
    state[-1] = 1 - state[-1]  # the model's gripper is 1 when open
    return {
        "prompt": observation.prompt,
        "prompt_format": PROMPT_FORMATS[kind],
        "action_mode": "policy",
        "domain_name": "droid_lerobot",
        "raw_action_dim": len(state),
        "action_chunk_size": HORIZON,
        "action_state": state.tolist(),
        "image": observation.image,
        "image_size": 480,
        "fps": FPS,
        "view_point": "concat_view",
        "view_description": VIEWS,
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "flow_shift": 5.0,
        "output_type": "latent",
        "seed": seed,
        **observation.sampling,
    }


def actions(rows: NDArray[np.float32], observation: Observation) -> NDArray[np.float32]:
    """Where to go, float32 [32, 8]: joint positions [rad] and the gripper (0 open, 1 closed).

    For the end effector it is position [m], quaternion x, y, z, w, and the gripper. ``rows`` are the
    actions of the output of the observation's request.
    """
    arm, gripper = rows[:, :-1], 1 - rows[:, -1:]
    if arm.shape[1] != JOINTS:
        start = np.eye(4)
        start[:3, 3] = observation.state[:3]
        start[:3, :3] = rotations(observation.state[None, 3:9])[0]
        poses = absolute_poses(arm, start=start)[1:]
        arm = np.concatenate([poses[:, :3, 3], quaternions_from_poses(poses)], axis=1)
    goals: NDArray[np.float32] = np.concatenate([arm, gripper], axis=1).astype(np.float32)
    return goals


def example() -> dict[str, Any]:
    """A message with everything that `read` needs for joints."""
    pictures = np.random.default_rng(0).integers(0, 256, (3, 360, 640, 3), np.uint8)
    return {
        "prompt": "put the cup on the plate",
        "session_id": "example",
        WRIST: pictures[0],
        FROM_ONE[0]: pictures[1],
        FROM_ONE[1]: pictures[2],
        ARM: np.linspace(-1, 1, JOINTS, dtype=np.float32),
        GRIPPER: np.zeros(1, np.float32),
    }


def compose(wrist: Pixels, left: Pixels, right: Pixels) -> Pixels:
    """Three views in one picture: the wrist above, the others below in half its size.

    With a wrist of uint8 [360, 640, 3] it is the picture of the training; others have its layout.
    """
    height, width = wrist.shape[0] // 2, wrist.shape[1] // 2
    below = [_stretched(view, height, width) for view in (left, right)]
    return np.concatenate([wrist[:, : 2 * width], np.concatenate(below, axis=1)])


def _canvas(message: Mapping[str, Any]) -> Pixels:
    if IMAGE in message:
        return _stretched(_picture(message, IMAGE), *CANVAS)
    names = FROM_ZERO if FROM_ZERO[0] in message else FROM_ONE
    return _stretched(compose(*(_picture(message, name) for name in (WRIST, *names))), *CANVAS)


def _stretched(picture: Pixels, height: int, width: int) -> Pixels:
    """A picture in another size, bilinear without antialiasing and rounded down.

    So the pictures of the training and of its own server were made.
    """
    if picture.shape[:2] == (height, width):
        return picture.copy()  # a view of a message is read-only
    import torch  # here, so that an observation can be checked without it
    import torch.nn.functional as F

    x = torch.from_numpy(picture.astype(np.float32)).movedim(2, 0)[None]
    x = F.interpolate(x, size=(height, width), mode="bilinear")
    stretched: Pixels = x[0].movedim(0, 2).numpy().astype(np.uint8)
    return stretched


def _picture(message: Mapping[str, Any], key: str) -> Pixels:
    value = message.get(key)
    possible = f"a picture, uint8 [H, W, 3] with sides up to {MAX_SIDE}"
    if not isinstance(value, np.ndarray):
        raise InvalidRequest(key, value, possible, _absent(value))
    good = value.dtype == np.uint8 and value.ndim == 3 and value.shape[2] == 3
    if not good or not all(16 <= side <= MAX_SIDE for side in value.shape[:2]):
        given = f"an array {value.dtype} {list(value.shape)}"
        raise InvalidRequest(key, given, possible, "invalid_type")
    return value


def _end_effector(message: Mapping[str, Any]) -> NDArray[np.float32]:
    position = _last(message, POSITION, 3, "coordinates [m]")
    quaternion = _last(message, QUATERNION, 4, "numbers x, y, z, w of a quaternion")
    if not quaternion.any():
        raise InvalidRequest(QUATERNION, "0", "a quaternion of a length above 0")
    pose = poses_from_quaternions(position[None], quaternion[None])[0]
    return np.concatenate([position, pose[:3, :2].T.reshape(-1)])


def _last(message: Mapping[str, Any], key: str, width: int, what: str) -> NDArray[np.float32]:
    """The last of one or several rows of numbers."""
    rows = _numbers(message, key, f"{width} {what}, or rows of them")
    if rows.ndim not in (1, 2) or rows.shape[-1] != width or not rows.size:
        shape = f"an array {list(rows.shape)}"
        raise InvalidRequest(key, shape, f"[{width}] or [T, {width}]", "invalid_type")
    last: NDArray[np.float32] = rows.reshape(-1, width)[-1]
    return last


def _numbers(message: Mapping[str, Any], key: str, possible: str) -> NDArray[np.float32]:
    value = message.get(key)
    if not isinstance(value, (np.ndarray, list, Real)) or isinstance(value, bool):
        raise InvalidRequest(key, value, possible, _absent(value))
    try:
        numbers = np.asarray(value)
    except ValueError:  # rows of several lengths
        raise InvalidRequest(key, value, possible, "invalid_type") from None
    if numbers.dtype.kind not in "iuf":
        raise InvalidRequest(key, f"an array {numbers.dtype}", possible, "invalid_type")
    with np.errstate(over="ignore"):
        singles: NDArray[np.float32] = numbers.astype(np.float32)
    if not np.isfinite(singles).all():
        raise InvalidRequest(key, "not finite", f"finite: {possible}")
    return singles


def _sampling(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the client says of the sampling; null says nothing."""
    given = message.get("sampling_params", {})
    if not isinstance(given, Mapping):
        raise InvalidRequest("sampling_params", given, "a map", "invalid_type")
    for name in given:
        if name not in ADJUSTABLE:
            possible = f"left out, or one of {', '.join(ADJUSTABLE)}"
            raise InvalidRequest(f"sampling_params.{name}", given[name], possible)
    return {name: value for name, value in given.items() if value is not None}


def _absent(value: object) -> str:
    return "missing_required" if value is None else "invalid_type"
