"""A robot's side of the policy protocol, written from its description and not from our server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from limits import HANG
from websockets.sync.client import ClientConnection, connect

PATH = "/v1/realtime/robot/openpi"
KEY = "robots only"


class Refused(Exception):
    """A text frame: an error of the server, as its envelope."""

    def __init__(self, text: str) -> None:
        self.error: dict[str, Any] = json.loads(text)["error"]
        super().__init__(self.error["message"])


@dataclass(frozen=True, slots=True, eq=False)
class Robot:
    """A connection. ``metadata`` is what the server said first."""

    socket: ClientConnection
    metadata: dict[str, Any]

    def ask(self, message: Any) -> Any:
        """The answer to one message."""
        self.send(message)
        return self.receive()

    def send(self, message: Any) -> None:
        raw = isinstance(message, (bytes, str))
        self.socket.send(message if raw else msgspec.msgpack.encode(message, enc_hook=_marked))

    def receive(self) -> Any:
        return _received(self.socket)


@contextmanager
def robot(
    url: str, path: str = "/", authorization: str | None = f"Api-Key {KEY}"
) -> Iterator[Robot]:
    """A robot that is connected until the block ends."""
    headers = {} if authorization is None else {"Authorization": authorization}
    address = url.replace("http", "ws") + path
    patience = {"open_timeout": HANG, "ping_timeout": HANG}
    with connect(address, additional_headers=headers, max_size=None, **patience) as socket:
        yield Robot(socket, _received(socket))


def _received(socket: ClientConnection) -> Any:
    answer = socket.recv(timeout=HANG)
    if isinstance(answer, str):
        raise Refused(answer)
    return _unmarked(msgspec.msgpack.decode(answer))


def _marked(array: Any) -> dict[bytes, Any]:
    return {
        b"__ndarray__": True,
        b"data": array.tobytes(),
        b"dtype": array.dtype.str,
        b"shape": array.shape,
    }


def _unmarked(value: Any) -> Any:
    if isinstance(value, dict) and b"__ndarray__" in value:
        return np.frombuffer(value[b"data"], value[b"dtype"]).reshape(value[b"shape"])
    if isinstance(value, dict):
        return {key: _unmarked(item) for key, item in value.items()}
    return value


def observation(**changes: Any) -> dict[str, Any]:
    """What a DROID robot sends, asking for one step without guidance; what is None is left out."""
    pictures = np.random.default_rng(1).integers(0, 256, (3, 90, 160, 3), np.uint8)
    whole = {
        "prompt": "pick up the cup",
        "observation/wrist_image_left": pictures[0],
        "observation/exterior_image_1_left": pictures[1],
        "observation/exterior_image_2_left": pictures[2],
        "observation/joint_position": np.linspace(-1, 1, 7),
        "observation/gripper_position": np.array([0.25]),
        "sampling_params": {"num_inference_steps": 1, "guidance_scale": 1},
    }
    return {k: v for k, v in (whole | changes).items() if v is not None}
