"""Files of deploy/: valid by their schemas, and of a piece with the server that they start."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from compose_pydantic import ComposeSpecification

from vllm_cosmos3.cli import main
from vllm_cosmos3.server.options import OPTIONS
from vllm_cosmos3.server.routes import info

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
VERSION = kubernetes_validate.latest_version()
SCHEMA = json.loads((Path(__file__).parent / "leaderworkerset.schema.json").read_text())
CUSTOM = "leaderworkerset.x-k8s.io/v1"
PATHS = {route.path for route in info.router.routes}
Manifest = dict[str, Any]


def documents(name: str) -> list[Manifest]:
    return list(yaml.safe_load_all((DEPLOY / "kubernetes" / name).read_text()))


MANIFESTS = {
    f"{name}: {one['kind']}": one
    for name in ("server.yaml", "several-hosts.yaml")
    for one in documents(name)
}


def pods(manifest: Manifest) -> list[Manifest]:
    """The templates of pods in a manifest, the server's first."""
    spec = manifest["spec"]
    if manifest["apiVersion"] == CUSTOM:
        template = spec["leaderWorkerTemplate"]
        return [template["leaderTemplate"], template["workerTemplate"]]
    return [spec["template"]] if "template" in spec else []


def servers() -> Iterator[tuple[Manifest, Manifest]]:
    """Each container that serves, with its pod."""
    for manifest in MANIFESTS.values():
        for pod in pods(manifest)[:1]:
            for container in pod["spec"]["containers"]:
                yield pod, container


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_are_valid(name: str) -> None:
    manifest = MANIFESTS[name]
    if manifest["apiVersion"] == CUSTOM:
        jsonschema.validate(manifest, SCHEMA)
    else:
        kubernetes_validate.validate(manifest, VERSION, strict=True)
    for pod in pods(manifest):
        as_pod = {"apiVersion": "v1", "kind": "Pod", **pod}
        as_pod["metadata"] = {"name": "any", **pod.get("metadata", {})}
        kubernetes_validate.validate(as_pod, VERSION, strict=True)
        volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
        for container in pod["spec"]["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes


def test_a_wrong_manifest_is_found() -> None:
    deployment, custom = documents("server.yaml")[1], documents("several-hosts.yaml")[0]
    deployment["spec"]["replica"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, VERSION, strict=True)
    custom["spec"]["leaderWorkerTemplate"]["restartPolicy"] = "Never"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(custom, SCHEMA)


def test_servers_have_three_probes_and_time_to_drain() -> None:
    assert len(list(servers())) == 2
    for pod, server in servers():
        ports = {port["name"] for port in server["ports"]}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            asked = server[probe]["httpGet"]
            assert asked["path"] in PATHS
            assert asked["port"] in ports
        assert server["livenessProbe"]["httpGet"]["path"] == "/health/live"
        assert pod["spec"]["terminationGracePeriodSeconds"] > OPTIONS["drain_seconds"].default


def test_what_belongs_together_has_the_same_names() -> None:
    claim, deployment, service, scaler = documents("server.yaml")
    pod = deployment["spec"]["template"]
    labels = pod["metadata"]["labels"].items()
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels
    assert service["spec"]["selector"].items() <= labels
    assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    claims = [volume.get("persistentVolumeClaim") for volume in pod["spec"]["volumes"]]
    assert {"claimName": claim["metadata"]["name"]} in claims
    adapter = yaml.safe_load((DEPLOY / "kubernetes/prometheus-adapter.yaml").read_text())
    (rule,), (metric,) = adapter["rules"]["custom"], scaler["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    mesh, front = documents("several-hosts.yaml")
    assert front["spec"]["selector"].items() <= pods(mesh)[0]["metadata"]["labels"].items()


def test_compose_is_valid_and_its_files_exist() -> None:
    raw = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    spec = ComposeSpecification.model_validate(raw)
    assert spec.services is not None
    assert spec.services.keys() == {"server", "prometheus", "grafana"}
    for service in raw["services"].values():
        for volume in service["volumes"]:
            source = volume.partition(":")[0]
            found = (DEPLOY / source).exists() if "/" in source else source in raw["volumes"]
            assert found, source
    prometheus = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())
    assert prometheus["scrape_configs"][0]["static_configs"] == [{"targets": ["server:8000"]}]
    assert prometheus["rule_files"] == ["/etc/prometheus/alerts.yaml"]
    board = json.loads((DEPLOY / "grafana/dashboards/cosmos3.json").read_text())
    folder = DEPLOY / "grafana/provisioning/datasources"
    (source,) = yaml.safe_load((folder / "prometheus.yaml").read_text())["datasources"]
    assert {panel["datasource"]["uid"] for panel in board["panels"]} == {source["uid"]}


def test_flags_are_those_of_the_server(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    known = capsys.readouterr().out
    words = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["server"]["command"]
    for _, server in servers():
        words += " ".join(server["args"]).rpartition("exec ")[2].split()
    flags = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert {"--surface", "--data-parallel-size", "--generator-executor-backend"} <= flags
    assert not [flag for flag in flags if not re.search(rf"{flag}\b", known)]


def test_images_ask_for_health_and_are_of_a_tested_vllm() -> None:
    for name in ("Dockerfile", "Dockerfile.cpu"):
        check = (ROOT / name).read_text().partition("HEALTHCHECK")[2]
        assert any(f":8000{path}'" in check for path in PATHS)
    compared = re.findall(r"^COMPAT \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert f"ARG VLLM=v{compared[0].split()[-1]}" in (ROOT / "Dockerfile").read_text()
