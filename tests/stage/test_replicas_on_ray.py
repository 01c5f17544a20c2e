"""A server whose replicas are on two nodes of a Ray cluster, of which one is killed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray_platform
from generators import eventually
from limits import HANG
from ray_nodes import cluster, join, kill, node
from servers import BIN, running
from vllm.platforms import current_platform

from vllm_cosmos3 import media
from vllm_cosmos3.errors import WorkerDied
from vllm_cosmos3.stage.ray_cluster import reserve

SMALL = {"prompt": "a boat", "size": "64x64", "num_inference_steps": 2, "seed": 1}
LONG = SMALL | {"size": "256x256", "num_frames": 21, "num_inference_steps": 200, "num_chunks": 10}
FLAGS = ["--surface", "generator", "--data-parallel-size", "2", "--generator-executor-backend", "ray"]  # fmt: skip
# vLLM takes one platform: here not the one of the tests' other servers.
PLUGINS = {"VLLM_PLUGINS": "cosmos3,cosmos3_ray_platform"}
ONE = ("--num-cpus", 1, "--num-gpus", 1, "--node-name")
pytestmark = pytest.mark.serve


@pytest.fixture
def start_second(
    vllm_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Starts the second node of a cluster, in which each has one device for Ray."""
    ray_platform.install(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    noticed_at_once = {"RAY_health_check_period_ms": "300"}
    with ExitStack() as stack, cluster(vllm_cache, *ONE, "first", **noticed_at_once) as settings:
        join(settings, monkeypatch)
        second = ("--address", settings["RAY_ADDRESS"], *ONE, "second")
        yield lambda: stack.enter_context(node(settings, *second))


class Client:
    """What the tests ask of a server."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def health(self) -> dict[str, Any]:
        found: dict[str, Any] = self._http.get("/health").json()
        return found

    def until(self, status: str) -> list[dict[str, Any]]:
        """The replicas, once the server says that it is so."""
        eventually(lambda: self.health()["status"] == status)
        replicas: list[dict[str, Any]] = self.health()["replicas"]
        return replicas

    def create(self, **fields: Any) -> str:
        """A video whose denoising has begun: lost before, it would be made again."""
        name = str(self._http.post("/v1/videos", json=fields).json()["id"])
        eventually(lambda: self.job(name)["cosmos3"]["step"] > 0)
        return name

    def job(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self._http.get(f"/v1/videos/{name}").json()
        return found

    def in_progress(self, names: list[str]) -> list[str]:
        return [name for name in names if self.job(name)["status"] == "in_progress"]

    def ended(self, name: str) -> dict[str, Any]:
        with self._http.stream("GET", f"/v1/videos/{name}/events") as stream:
            for _ in stream.iter_lines():
                pass
        return self.job(name)

    def frames(self, name: str, file: Path) -> int:
        file.write_bytes(self._http.get(f"/v1/videos/{name}/content").content)
        return sum(1 for _ in media.frames_of(file, limit=100))

    def picture(self) -> str:
        fields = SMALL | {"response_format": "b64_json"}
        answer = self._http.post("/v1/images/generations", json=fields).json()
        return str(answer["data"][0]["b64_json"])

    def delete(self, name: str) -> None:
        """Deletes a video, the only one in progress, and waits until its replica is idle again."""
        self._http.delete(f"/v1/videos/{name}")
        eventually(lambda: all(not each["running"] for each in self.health()["replicas"]
                               if each["state"] == "ready"))  # fmt: skip


def test_replicas_start_no_cluster_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(current_platform, "ray_device_key", "GPU")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(WorkerDied, match="run ray start --head first"):
        reserve(1, here=False)


def test_replicas_on_two_nodes_of_which_one_is_lost(
    tiny_checkpoint: Path,
    vllm_cache: Path,
    tmp_path: Path,
    start_second: Callable[[], subprocess.Popen[bytes]],
) -> None:
    second = start_second()
    command = [str(BIN / "vllm-cosmos3"), "serve", str(tiny_checkpoint), *FLAGS]
    command += ["--storage-path", str(tmp_path / "storage")]
    with (
        running(command, tmp_path, vllm_cache, variables=PLUGINS) as server,
        httpx.Client(base_url=server.url, timeout=HANG) as http,
    ):
        client = Client(http)
        replicas = client.until("healthy")
        assert sorted(each["nodes"] for each in replicas) == [["first"], ["second"]]
        away = next(each["replica"] for each in replicas if each["nodes"] == ["second"])

        # A request goes to the first replica that is idle.
        held, pictures = client.create(**LONG), [client.picture()]
        if away == 0:
            client.delete(held)
        begun = client.create(**SMALL, num_frames=5)
        assert client.ended(begun)["status"] == "completed"
        longer = client.create(**SMALL, num_frames=5, continue_from=begun)
        assert client.ended(longer)["status"] == "completed"
        assert client.frames(longer, tmp_path / "longer.mp4") == 9
        if away == 1:
            client.delete(held)
        pictures.append(client.picture())
        assert pictures[0] == pictures[1]

        both = [client.create(**LONG), client.create(**LONG)]
        kill(second)
        eventually(lambda: client.in_progress(both) != both)
        (kept,) = client.in_progress(both)
        (lost,) = (client.job(name) for name in both if name != kept)
        assert (lost["status"], lost["error"]["code"]) == ("failed", "worker_lost")
        assert "a worker process ended in" in lost["error"]["message"]
        degraded = client.until("degraded")
        assert [each["state"] for each in degraded if each["nodes"] == ["first"]] == ["ready"]
        client.delete(kept)
        assert client.picture() == pictures[0]  # by the one that is left
        start_second()
        replicas = client.until("healthy")
        assert [each["restarts"] for each in replicas] == [int(at == away) for at in range(2)]
        assert replicas[away]["nodes"] == ["second"]
