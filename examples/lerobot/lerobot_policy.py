"""A served DROID policy as a policy of LeRobot: python lerobot_policy.py ws://127.0.0.1:8000 "pick it up"

Needs `pip install msgspec websockets` beside LeRobot, and a server:
vllm-cosmos3 serve nvidia/Cosmos3-Nano-Policy-DROID --surface generator
"""

import os
import sys
from collections import deque
from contextlib import ExitStack

import msgspec
import numpy as np
import torch
from websockets.sync.client import connect

CAMERAS = {  # of lerobot/droid, for the names of the server
    "observation.images.wrist_left": "observation/wrist_image_left",
    "observation.images.exterior_1_left": "observation/exterior_image_1_left",
    "observation.images.exterior_2_left": "observation/exterior_image_2_left",
}


class Cosmos3Policy:
    """`select_action` and `reset` as LeRobot's policies have them, for batches of one.

    ``steps`` of the 32 actions of an answer are carried out before the next observation is sent.
    """

    def __init__(self, url: str, steps: int = 16) -> None:
        key = os.environ.get("VLLM_API_KEY")
        headers = {"Authorization": f"Api-Key {key}"} if key else None
        connection = connect(url, max_size=None, additional_headers=headers)
        self._open = ExitStack()
        self._socket = self._open.enter_context(connection)
        self.metadata = _decoded(self._socket.recv())
        self._steps, self._actions = steps, deque()

    def select_action(self, batch: dict) -> torch.Tensor:
        """The next action [1, 8]: seven joint positions in radians, and the gripper from 0 to 1."""
        if not self._actions:
            self._actions.extend(self._ask(batch)[: self._steps])
        return torch.from_numpy(self._actions.popleft().copy())[None]

    def reset(self) -> None:
        """Begin a new episode."""
        self._actions.clear()
        self._send({"endpoint": "reset"})

    def close(self) -> None:
        """End the connection."""
        self._open.close()

    def _ask(self, batch: dict) -> np.ndarray:
        """The actions [32, 8] of one observation. Pictures are floats [1, 3, H, W] from 0 to 1."""
        state = batch["observation.state"][0].cpu().numpy().astype(np.float32)
        message = {"prompt": batch["task"][0], "session_id": "lerobot"}
        message |= {
            "observation/joint_position": state[:7],
            "observation/gripper_position": state[7:8],
        }
        for name, ours in CAMERAS.items():
            levels = (batch[name][0].clamp(0, 1) * 255).round().byte()
            message[ours] = levels.permute(1, 2, 0).cpu().numpy()
        return self._send(message)["actions"]

    def _send(self, message: dict) -> dict:
        self._socket.send(msgspec.msgpack.encode(message, enc_hook=_encoded))
        answer = self._socket.recv()
        if isinstance(answer, str):  # an error is text
            raise RuntimeError(msgspec.json.decode(answer)["error"]["message"])
        return _decoded(answer)


def _encoded(array: np.ndarray) -> dict:
    data = np.ascontiguousarray(array).tobytes()
    return {b"__ndarray__": True, b"data": data, b"dtype": array.dtype.str, b"shape": array.shape}


def _decoded(message: bytes) -> dict:
    return _arrays(msgspec.msgpack.decode(message))


def _arrays(value):
    if isinstance(value, dict) and b"__ndarray__" in value:
        return np.frombuffer(value[b"data"], value[b"dtype"]).reshape(value[b"shape"])
    return {k: _arrays(v) for k, v in value.items()} if isinstance(value, dict) else value


if __name__ == "__main__":
    policy = Cosmos3Policy(sys.argv[1])
    policy.reset()
    batch = {name: torch.rand(1, 3, 180, 320) for name in CAMERAS}
    batch |= {"observation.state": torch.zeros(1, 8), "task": [sys.argv[2]]}
    for step in range(3):
        print(step, policy.select_action(batch).numpy().round(3).tolist())
    policy.close()
