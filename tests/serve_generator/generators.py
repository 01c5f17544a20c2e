"""Generator servers for the tests."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
from limits import HANG
from servers import BIN, Server, running

SMALL = {"size": "64x64", "num_frames": 5, "num_inference_steps": 2, "seed": 1}
PICTURE = {"size": "64x64", "num_inference_steps": 2, "seed": 1}
# Minutes of short steps: it runs for as long as a test wants, and ends soon when it is deleted.
LONG = {
    "size": "256x256",
    "num_frames": 21,
    "num_inference_steps": 200,
    "num_chunks": 20,
    "seed": 1,
}
WAIT = {"Prefer": f"wait={HANG:.0f}"}  # for the end


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
    command += ["--storage-path", str(folder / "storage"), "--served-model-name", "tiny"]
    # After a short request that a busy machine has held up, one of `LONG` is taken for hours.
    command += ["--max-queue-gpu-seconds", "1e9", *flags]
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


def delete_all(server: Server) -> None:
    """End the videos that wait or run."""
    url = f"{server.url}/v1/videos"
    for job in httpx.get(url, params={"limit": 100}, timeout=HANG).json()["data"]:
        if job["status"] in ("queued", "in_progress"):
            httpx.delete(f"{url}/{job['id']}", timeout=HANG)


def idle(server: Server) -> None:
    """Wait until nothing waits or runs."""

    def is_idle() -> bool:
        report = httpx.get(f"{server.url}/health", timeout=HANG).json()
        fresh = report["last_sign_of_life"] < 1  # else it may be what was heard before
        return bool(fresh and report["queue"]["waiting"] == report["queue"]["running"] == 0)

    eventually(is_idle)


def ranks_of(server: Server) -> list[psutil.Process]:
    """The processes that compute: children of the stage processes."""
    commands: dict[psutil.Process, tuple[int, str]] = {}  # with their parents
    for process in psutil.Process(server.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has just ended
            commands[process] = process.ppid(), " ".join(process.cmdline())
    stages = {one.pid for one, (_, words) in commands.items() if "stage.process import" in words}
    return [
        one
        for one, (parent, words) in commands.items()
        if parent in stages and "resource_tracker" not in words
    ]


@contextmanager
def suspended(server: Server) -> Iterator[None]:
    """No request gets further until the block ends, which is to be soon: they would be given up."""
    ranks = ranks_of(server)
    for rank in ranks:
        rank.suspend()
    try:
        yield
    finally:
        for rank in ranks:
            rank.resume()


@contextmanager
def held(file: Path) -> Iterator[None]:
    """Whoever reads this file waits until the block ends, such as a rank that loads a checkpoint."""
    data, pipe, other = file.read_bytes(), file.with_name("pipe"), file.with_name("other")
    os.mkfifo(pipe)
    other.hardlink_to(pipe)
    other.replace(file)
    try:
        yield
    finally:
        other.write_bytes(data)
        other.replace(file)
        with suppress(OSError), open(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK), "wb") as waiting:
            waiting.write(data)  # unless nobody waits
        pipe.unlink()


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
