"""A server with two replicas: one is killed, the other goes on, and everything is whole again."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import promql_parser
import pytest
import yaml
from generators import LONG, PICTURE, SMALL, create, eventually, finished, generator, held
from limits import HANG
from prometheus_client.parser import text_string_to_metric_families
from ranks import by_age, processes_below
from servers import Server

ROOT = Path(__file__).parents[2]
OF_TARGETS = {
    "instance",
    "job",
    "namespace",
    "pod",
    "le",
}  # labels that Prometheus adds, and buckets
pytestmark = pytest.mark.serve


@pytest.fixture(scope="module")
def two_replicas(
    tiny_checkpoint: Path, vllm_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """Two replicas of one rank, of a checkpoint of their own: a test holds a file of it."""
    folder = tmp_path_factory.mktemp("replicas")
    checkpoint = shutil.copytree(tiny_checkpoint, folder / "tiny")
    flags = ["--data-parallel-size", "2"]
    with generator(checkpoint, folder, vllm_cache, *flags) as server:
        eventually(lambda: health(server)["status"] == "healthy")
        yield server


def get(server: Server, path: str) -> httpx.Response:
    return httpx.get(f"{server.url}{path}", timeout=HANG)


def health(server: Server) -> dict[str, Any]:
    report: dict[str, Any] = get(server, "/health").json()
    return report


def by_replica(server: Server, name: str) -> list[float]:
    """The values of a family of /metrics by replica."""
    families = text_string_to_metric_families(get(server, "/metrics").text)
    samples = next(family.samples for family in families if family.name == name)
    return [s.value for s in sorted(samples, key=lambda sample: sample.labels["replica"])]


def status_of(server: Server, job: dict[str, Any]) -> str:
    return str(get(server, f"/v1/videos/{job['id']}").json()["status"])


def test_replicas_are_shown(two_replicas: Server) -> None:
    block = get(two_replicas, "/v1/models").json()["data"][0]["cosmos3"]["replicas"]
    assert block == {
        "count": 2,
        "mesh": {"cfg": 1, "ulysses": 1, "tp": 1},
        "devices": [None, None],  # a CPU
    }
    report = health(two_replicas)
    assert [each["state"] for each in report["replicas"]] == ["ready", "ready"]
    assert report["surfaces"]["generator"] == "ready"
    eventually(lambda: by_replica(two_replicas, "cosmos3:replica_ready") == [1, 1])
    assert "serve: replicas: 2\n" in two_replicas.log.read_text()


def test_one_replica_is_killed_and_the_other_serves(two_replicas: Server) -> None:
    before = finished(two_replicas, create(two_replicas, **SMALL))  # by the first, as both are idle
    first, second = create(two_replicas, **LONG), create(two_replicas, **LONG)
    for job in (first, second):
        eventually(lambda job=job: status_of(two_replicas, job) == "in_progress")
    queued = create(two_replicas, **LONG)
    eventually(lambda: health(two_replicas)["queue"]["waiting"] == 1)

    stages = {
        process
        for process in processes_below(two_replicas.pid)
        if b"vllm_cosmos3.stage.process" in Path(f"/proc/{process}/cmdline").read_bytes()
    }
    with held(Path(two_replicas.model) / "transformer" / "config.json"):  # no new one is ready
        os.kill(by_age(stages)[0], signal.SIGKILL)  # the first one
        eventually(lambda: health(two_replicas)["status"] == "degraded")
        answer = get(two_replicas, "/health")
        assert answer.status_code == 200
        assert answer.json()["reason"] == "replica 0 is starting"
        eventually(lambda: by_replica(two_replicas, "cosmos3:replica_ready") == [0, 1])
        eventually(lambda: status_of(two_replicas, first) == "failed")
        error = get(two_replicas, f"/v1/videos/{first['id']}").json()["error"]
        assert error["code"] == "worker_lost"
        assert "the stage process ended with status -9" in error["message"]
        longer = finished(two_replicas, create(two_replicas, **SMALL, continue_from=before["id"]))
        assert (longer["status"], longer["num_frames"]) == ("completed", 9)
        assert status_of(two_replicas, second) == "in_progress"
        assert status_of(two_replicas, queued) == "queued"
        httpx.delete(f"{two_replicas.url}/v1/videos/{second['id']}", timeout=HANG)
        eventually(lambda: status_of(two_replicas, queued) == "in_progress")
        httpx.delete(f"{two_replicas.url}/v1/videos/{queued['id']}", timeout=HANG)

    eventually(lambda: health(two_replicas)["status"] == "healthy")
    assert [each["restarts"] for each in health(two_replicas)["replicas"]] == [1, 0]
    eventually(lambda: by_replica(two_replicas, "cosmos3:replica_restarts") == [1, 0])
    picture = PICTURE | {"prompt": "a boat"}
    answer = httpx.post(f"{two_replicas.url}/v1/images/generations", json=picture, timeout=HANG)
    assert answer.status_code == 200


def queries() -> list[str]:
    """Every query of the dashboard, the alerts and the autoscaler."""
    board = json.loads((ROOT / "deploy/grafana/dashboards/cosmos3.json").read_text())
    found = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    alerts = yaml.safe_load((ROOT / "deploy/alerts.yaml").read_text())
    found += [rule["expr"] for group in alerts["groups"] for rule in group["rules"]]
    adapter = yaml.safe_load((ROOT / "deploy/kubernetes/prometheus-adapter.yaml").read_text())
    for rule in adapter["rules"]["custom"]:
        found += [rule["seriesQuery"], re.sub(r"<<.LabelMatchers>>", "", rule["metricsQuery"]).replace("<<.GroupBy>>", "pod")]  # fmt: skip
    return found


def test_queries_are_of_families_that_the_server_has(two_replicas: Server) -> None:
    """After a request of every kind of end, with the labels that they have."""
    text = get(two_replicas, "/metrics").text
    labels: dict[str, set[str]] = {"up": set()}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    for query in queries():
        families: list[str] = []
        named: set[str] = set()

        def visit(node: object, families: list[str] = families, named: set[str] = named) -> None:
            if isinstance(node, promql_parser.VectorSelector):
                families.append(node.name)
                named.update(matcher.name for matcher in node.matchers.matchers)
            elif isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
                named.update(node.modifier.labels)

        promql_parser.walk(promql_parser.parse(query), visit)
        assert families
        assert set(families) <= labels.keys(), query
        assert named <= OF_TARGETS.union(*(labels[name] for name in families)), query
