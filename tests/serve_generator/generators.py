"""Generator servers for the tests."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from limits import HANG
from servers import BIN, Server, running

SMALL = {"size": "64x64", "num_frames": 5, "num_inference_steps": 2, "seed": 1}
PICTURE = {"size": "64x64", "num_inference_steps": 2, "seed": 1}
LONG = {"size": "256x256", "num_frames": 21, "num_inference_steps": 200, "seed": 1}


@contextmanager
def generator(
    checkpoint: Path,
    folder: Path,
    cache: Path,
    *flags: str,
    while_starting: Callable[[Server], object] = lambda _: None,
) -> Iterator[Server]:
    """``vllm-cosmos3 serve CKPT --surface generator`` until the block ends."""
    command = [str(BIN / "vllm-cosmos3"), "serve", str(checkpoint), "--surface", "generator"]
    command += ["--storage-path", str(folder / "storage"), "--served-model-name", "tiny", *flags]
    with running(command, folder, cache, while_starting) as server:
        yield server


def create(server: Server, **fields: Any) -> dict[str, Any]:
    """A video that was accepted."""
    answer = httpx.post(
        f"{server.url}/v1/videos", json={"prompt": "a boat", **fields}, timeout=HANG
    )
    assert answer.status_code == 200, answer.text
    job: dict[str, Any] = answer.json()
    return job


def finished(server: Server, job: dict[str, Any], seconds: float = HANG) -> dict[str, Any]:
    """A job when it has ended."""
    with httpx.stream(
        "GET", f"{server.url}/v1/videos/{job['id']}/events", timeout=seconds
    ) as stream:
        for _ in stream.iter_lines():
            pass
    ended: dict[str, Any] = httpx.get(f"{server.url}/v1/videos/{job['id']}").json()
    return ended


def eventually(what: Callable[[], bool], seconds: float = HANG) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.03)


def refuses(server: Server) -> bool:
    """Whether nobody listens any more."""
    try:
        httpx.get(f"{server.url}/health/live")
    except httpx.TransportError:
        return True
    return False
