"""Servers that die, stop, share a storage and forget."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sqlite3
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
from generators import (
    LONG,
    SMALL,
    create,
    eventually,
    finished,
    generator,
    refuses,
    suspended,
)
from limits import HANG
from safetensors import safe_open
from servers import BIN, Server, run_to_end

from ports import free_port
from vllm_cosmos3.server.jobs.journal import Journal
from vllm_cosmos3.server.jobs.video_job import VideoJob

pytestmark = pytest.mark.serve


def get(server: Server, path: str) -> httpx.Response:
    return httpx.get(f"{server.url}{path}", timeout=HANG)


def job_of(server: Server, job: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = get(server, f"/v1/videos/{job['id']}").json()
    return found


def stored(journal: Journal, job: dict[str, Any]) -> VideoJob:
    found = journal.get(job["id"])
    assert found is not None
    return found


def content(server: Server, job: dict[str, Any]) -> httpx.Response:
    return get(server, f"/v1/videos/{job['id']}/content")


def continuing(server: Server, job: dict[str, Any]) -> tuple[int, str]:
    """How a request to go on from a video is refused."""
    body = {"prompt": "a boat", **SMALL, "continue_from": job["id"]}
    answer = httpx.post(f"{server.url}/v1/videos", json=body, timeout=HANG)
    return answer.status_code, answer.json()["error"]["code"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A server, and what it has said of its health while it loaded."""

    server: Server
    heard: list[dict[str, Any]]


@pytest.fixture(scope="module")
def loaded(
    tiny_checkpoint: Path, vllm_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Loaded]:
    """Of a checkpoint that goes on loading when somebody has heard of it, with limits on its files; a
    test kills it."""
    folder = tmp_path_factory.mktemp("life")
    checkpoint, heard = folder / "tiny", list[dict[str, Any]]()
    shutil.copytree(tiny_checkpoint, checkpoint)
    names, pipe = indexed(checkpoint / "vae")

    def let_read() -> None:
        Thread(target=pipe.write_text, args=(names,), daemon=True).start()

    def listen(server: Server) -> None:
        assert get(server, "/health/live").status_code == 200
        while (answer := get(server, "/health")).status_code == 503:
            before = heard[-1]["loaded_percent"] if heard else 0
            heard.append(answer.json())
            if before == 0 < heard[-1]["loaded_percent"]:
                let_read()  # the rank, which has filled the transformer

    let_read()  # the server, before it starts any rank
    flags = ["--file-ttl", "3600", "--storage-quota", "90000", "--guardrails", "off"]
    with generator(checkpoint, folder, vllm_cache, *flags, while_starting=listen) as server:
        yield Loaded(server=server, heard=heard)


def test_loading_is_told_and_files_expire_by_age_and_quota(loaded: Loaded) -> None:
    server, heard = loaded.server, loaded.heard
    percents = [report["loaded_percent"] for report in heard]
    assert percents == sorted(percents)
    assert any(0 < percent < 100 for percent in percents)
    assert {report["error"]["code"] for report in heard} == {"loading"}
    assert f"{percents[-1]} % of its weights" in heard[-1]["reason"]
    first = finished(server, create(server, **SMALL))
    assert content(server, first).status_code == 200
    assert get(server, "/health").json()["guardrails"] == "disabled"
    assert first["cosmos3"]["guardrails"] == {"requested": None, "effective": "disabled"}
    jobs = [finished(server, create(server, **SMALL)) for _ in range(3)]
    # Four results are more than the quota, so the oldest goes.
    eventually(lambda: content(server, first).status_code == 410)
    last = jobs[-1]
    assert content(server, last).status_code == 200
    assert last["expires_at"] - last["completed_at"] in (3600, 3601)  # in whole seconds
    file = server.log.parent / "storage" / "jobs.sqlite"
    with closing(sqlite3.connect(file, timeout=HANG)) as journal:
        journal.execute("update jobs set expires = ? where id = ?", (time.time(), last["id"]))
        journal.commit()  # as if an hour had gone by
    eventually(lambda: content(server, last).status_code == 410)
    for gone in (first, last):
        assert content(server, gone).json()["error"]["code"] == "expired"
        assert continuing(server, gone) == (410, "expired")
        kept = job_of(server, gone)
        assert kept["status"] == "completed"
        assert kept["expires_at"] <= time.time()
    for job in (first, *jobs):
        url = f"{server.url}/v1/videos/{job['id']}"
        assert httpx.delete(url, timeout=HANG).status_code == 200


def test_jobs_outlive_servers(loaded: Loaded, tiny_checkpoint: Path, vllm_cache: Path) -> None:
    """A server is killed; two others, one with replicas, share its storage; one of them is asked to stop."""

    killed, folder = loaded.server, loaded.server.log.parent

    def start(stack: ExitStack, *flags: str) -> Server:
        return stack.enter_context(generator(tiny_checkpoint, folder, vllm_cache, *flags))

    with ExitStack() as stack:
        done = finished(killed, create(killed, **SMALL))
        cut = create(killed, **LONG)
        eventually(lambda: job_of(killed, cut)["status"] == "in_progress")
        waiting = create(killed, **LONG)
        os.killpg(killed.pid, signal.SIGKILL)

        first = start(stack, "--data-parallel-size", "2")
        assert job_of(first, done) == done
        assert content(first, done).status_code == 200
        for lost in (cut, waiting):
            ended = job_of(first, lost)
            assert (ended["status"], ended["error"]["code"]) == ("failed", "interrupted")
        continued = finished(first, create(first, **SMALL, continue_from=done["id"]))
        assert (continued["status"], continued["num_frames"]) == ("completed", 9)
        assert continuing(first, cut) == (409, "job_failed")
        assert (
            httpx.delete(f"{first.url}/v1/videos/{continued['id']}", timeout=HANG).status_code
            == 200
        )

        second = start(stack, "--drain-seconds", "1")
        shared = create(first, **LONG)
        eventually(lambda: job_of(second, shared)["cosmos3"]["step"] > 0)
        listed = get(second, "/v1/videos").json()["data"]
        assert [job["id"] for job in listed] == [shared["id"], waiting["id"], cut["id"], done["id"]]
        assert (
            httpx.delete(f"{second.url}/v1/videos/{shared['id']}", timeout=HANG).status_code == 200
        )
        assert get(first, f"/v1/videos/{shared['id']}").status_code == 404
        eventually(lambda: get(first, "/health").json()["queue"]["running"] == 0)
        eventually(lambda: not (folder / "storage" / "files" / shared["id"]).exists())
        eventually(lambda: "cosmos3:requests_cancelled_total 1.0" in get(first, "/metrics").text)

        with suspended(first):
            last = create(first, **SMALL)
            os.kill(first.pid, signal.SIGTERM)
            eventually(lambda: get(first, "/health").status_code == 503)
            body = {"prompt": "a boat", **SMALL}
            answer = httpx.post(f"{first.url}/v1/videos", json=body, timeout=HANG)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
            assert int(answer.headers["retry-after"]) > 0
            assert job_of(first, last)["status"] in ("queued", "in_progress")
        assert finished(second, last)["status"] == "completed"
        assert content(second, last).status_code == 200
        eventually(lambda: refuses(first))

        late = create(second, **LONG)
        eventually(lambda: job_of(second, late)["status"] == "in_progress")
        os.kill(second.pid, signal.SIGTERM)
        journal = stack.enter_context(closing(Journal(folder / "storage")))
        eventually(lambda: stored(journal, late).status == "failed")
        assert (stored(journal, late).error or {})["code"] == "interrupted"  # by itself, in time


def test_it_ends_with_a_generator_that_cannot_start(
    tiny_checkpoint: Path, vllm_cache: Path, tmp_path: Path
) -> None:
    """What nobody could know before its processes have started is one line and a status as well."""
    command = [str(BIN / "vllm-cosmos3"), "serve", str(tiny_checkpoint), "--surface", "generator"]
    command += ["--host", "127.0.0.1", "--port", str(free_port()), "--storage-path", str(tmp_path)]
    status, output = run_to_end([*command, "--attention-backend", "flash"], vllm_cache)
    assert status == 2
    assert re.search(r"^vllm-cosmos3 serve: attention_backend flash .*use sdpa or auto$", output, re.M)  # fmt: skip
    assert "Traceback" not in output


def indexed(component: Path) -> tuple[str, Path]:
    """An index of the only file of a component, and a pipe in its place, at which its readers wait."""
    (file,) = component.glob("*.safetensors")
    pipe = file.with_name(f"{file.name}.index.json")
    os.mkfifo(pipe)
    with safe_open(file, framework="np") as tensors:
        return json.dumps({"weight_map": dict.fromkeys(tensors.keys(), file.name)}), pipe
