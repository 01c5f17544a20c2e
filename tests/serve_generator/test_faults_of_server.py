"""Rows 102 and 103 of the catalogue: memory that runs out and workers that die, with jobs on them."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from generators import LONG, SMALL, create, eventually, finished, held, ranks_of
from limits import HANG
from servers import Server

pytestmark = pytest.mark.serve


def health(server: Server) -> httpx.Response:
    return httpx.get(f"{server.url}/health", timeout=HANG)


def started(server: Server, **fields: Any) -> dict[str, Any]:
    """A job that is denoising, or has ended."""
    job = create(server, **fields)
    url = f"{server.url}/v1/videos/{job['id']}"

    def going() -> bool:
        job.update(httpx.get(url, timeout=HANG).json())
        return bool(job["cosmos3"]["step"] > 0 or job["status"] == "failed")

    eventually(going)
    return job


def worker(server: Server) -> psutil.Process:
    """The one rank of the server."""
    (rank,) = ranks_of(server)
    return rank


def failure(server: Server, job: dict[str, Any]) -> dict[str, Any]:
    """The error of a job that was accepted and then failed."""
    ended = finished(server, job)
    assert ended["status"] == "failed"
    error: dict[str, Any] = ended["error"]
    return error


def test_row_102_memory_runs_out(generator_server: Server) -> None:
    rank = worker(generator_server)
    restarts = health(generator_server).json()["restarts"]
    most = rank.memory_info().vms + 16 * 2**20
    rank.rlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
    # Its latents are 38 MB, more than glibc would take from what was freed before.
    job = create(generator_server, size="1360x768", num_frames=189, num_inference_steps=1)
    try:
        error = failure(generator_server, job)
    finally:
        rank.rlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert error["code"] == "out_of_memory"
    assert "fewer frames or a smaller size" in error["message"]
    eventually(lambda: health(generator_server).status_code == 200)
    assert health(generator_server).json()["restarts"] == restarts
    after = finished(generator_server, create(generator_server, **SMALL))
    assert after["status"] == "completed"


@pytest.mark.parametrize("victim", ["rank", "stage"])
def test_row_103_a_worker_dies(victim: str, generator_server: Server) -> None:
    job = started(generator_server, **LONG)
    rank = worker(generator_server)
    with held(Path(generator_server.model) / "transformer" / "config.json"):  # no new one is ready
        os.kill(rank.pid if victim == "rank" else rank.ppid(), signal.SIGKILL)
        eventually(lambda: health(generator_server).status_code == 503)
        assert failure(generator_server, job)["code"] == "worker_lost"
    eventually(lambda: health(generator_server).status_code == 200)
    after = finished(generator_server, create(generator_server, **SMALL))
    assert after["status"] == "completed"


@pytest.mark.parametrize("victim", ["rank", "stage"])
def test_a_process_that_hangs_is_reported_and_keeps_no_deadline(
    victim: str, generator_server: Server
) -> None:
    """Nothing waits for it for ever: neither those that are served, nor those that come, nor health."""
    jobs = (started(generator_server, **LONG, deadline_seconds=5 * 2**n) for n in range(8))
    job = next(
        job for job in jobs if job["status"] != "failed"
    )  # the first for which that is enough
    rank = worker(generator_server)
    stopped = rank.pid if victim == "rank" else rank.ppid()
    os.kill(stopped, signal.SIGSTOP)
    try:
        eventually(lambda: health(generator_server).status_code == 503)
        report = health(generator_server).json()
        assert report["error"]["code"] == "worker_lost"
        assert "no sign of life" in report["reason"]
        assert report["last_sign_of_life"] > 1
        body = {"prompt": "a boat", **SMALL}
        refused = httpx.post(f"{generator_server.url}/v1/videos", json=body, timeout=HANG)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "worker_lost")
        assert failure(generator_server, job)["code"] == "deadline_exceeded"
    finally:
        os.kill(stopped, signal.SIGCONT)
    eventually(lambda: health(generator_server).status_code == 200)
    after = finished(generator_server, create(generator_server, **SMALL))
    assert after["status"] == "completed"
