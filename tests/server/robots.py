"""A robot's side of the policy protocol, written from its description and not from our server."""

from __future__ import annotations

import json
from types import TracebackType
from typing import Any

import msgspec
import numpy as np
from websockets.sync.client import ClientConnection, connect

PATH = "/v1/realtime/robot/openpi"
KEY = "robots only"


class Refused(Exception):
    """A text frame: an error of the server, as its envelope."""

    def __init__(self, text: str) -> None:
        self.error: dict[str, Any] = json.loads(text)["error"]
        super().__init__(self.error["message"])


class Robot:
    """A connection. ``metadata`` is what the server said first."""

    def __init__(self, url: str, path: str = "/", authorization: str | None = f"Api-Key {KEY}"):
        headers = {} if authorization is None else {"Authorization": authorization}
        self.socket: ClientConnection = connect(
            url.replace("http", "ws") + path, additional_headers=headers, max_size=None
        )
        self.metadata = self.receive()

    def ask(self, message: Any) -> Any:
        """The answer to one message."""
        self.send(message)
        return self.receive()

    def send(self, message: Any) -> None:
        raw = isinstance(message, (bytes, str))
        self.socket.send(message if raw else msgspec.msgpack.encode(message, enc_hook=_marked))

    def receive(self) -> Any:
        answer = self.socket.recv(timeout=120)
        if isinstance(answer, str):
            raise Refused(answer)
        return _unmarked(msgspec.msgpack.decode(answer))

    def __enter__(self) -> Robot:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.socket.close()


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
    """What a DROID robot sends; what is None is left out."""
    pictures = np.random.default_rng(1).integers(0, 256, (3, 90, 160, 3), np.uint8)
    whole = {
        "prompt": "pick up the cup",
        "observation/wrist_image_left": pictures[0],
        "observation/exterior_image_1_left": pictures[1],
        "observation/exterior_image_2_left": pictures[2],
        "observation/joint_position": np.linspace(-1, 1, 7),
        "observation/gripper_position": np.array([0.25]),
    }
    return {k: v for k, v in (whole | changes).items() if v is not None}
