"""Nodes of a Ray cluster on this machine, each in a process group of its own, so that one can be killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from generators import eventually
from servers import environment

from ports import free_port

ANY_PORT = ("--min-worker-port", 0, "--max-worker-port", 0, "--dashboard-agent-listen-port", 0)


@contextmanager
def node(settings: dict[str, str], *flags: object) -> Iterator[subprocess.Popen[bytes]]:
    """One node until the block ends, or until its process group is killed."""
    command = [Path(sys.executable).with_name("ray"), "start", *flags]
    command += ["--object-store-memory", 10**8, "--block", *ANY_PORT]
    with subprocess.Popen(
        list(map(str, command)),
        env=settings,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            kill(process)  # a polite end takes half a minute


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a node as a host ends that loses its power."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def join(settings: dict[str, str], patch: pytest.MonkeyPatch) -> None:
    """Let this process, and those that it starts, find a cluster."""
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        patch.setenv(name, settings[name])


@contextmanager
def cluster(cache: Path, *flags: object, **variables: str) -> Iterator[dict[str, str]]:
    """The environment of processes that find a cluster of one node, once it is up. ``variables`` are its own."""
    port = free_port()
    settings = environment(cache) | {"RAY_ADDRESS": f"127.0.0.1:{port}"} | variables
    # Given here, as by itself Ray asks for a token if an earlier cluster has left one in the home folder.
    settings |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}
    settings |= {"PYTHONPATH": os.pathsep.join(sys.path), "RAY_USAGE_STATS_ENABLED": "0"}
    head = ["--head", "--port", port, "--include-dashboard", "false"]
    with (
        # Of its own, as Ray remembers the last cluster of a folder, dead or not; with a short name.
        TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder,
        node(settings, *head, "--temp-dir", folder, *flags) as process,
    ):
        written_last = Path(folder, "ray_current_cluster")
        eventually(lambda: written_last.exists() or process.poll() is not None)
        assert process.poll() is None, "the cluster does not start"
        yield settings
