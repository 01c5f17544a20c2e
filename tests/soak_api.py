"""Requests made of the OpenAPI page, and against it, at a served generator. ``make soak`` runs it.

    python tests/soak_api.py CKPT [--examples 100]

Of each operation so many requests that its schema allows, and as many that it does not. No answer may
have status 500, and each must be one that the page describes: its status, its type and its schema. What
is accepted is small, and deleted. Afterwards the server must still make a video. Status 1 otherwise.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))
from local_server import local_server, program

CHECKED = ("status_code_conformance", "content_type_conformance", "response_schema_conformance")
SMALL = {"size": "64x64", "num_frames": 5, "num_inference_steps": 1}
LARGE = ("width", "height", "seconds", "image_size", "num_chunks", "n", "resolution")  # or longer
FLAGS = [
    "--surface",
    "generator",
    "--guardrails",
    "off",
    "--max-queue",
    "4",
    "--sync-deadline",
    "5",
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--examples", type=int, default=100)
    args = parser.parse_args()
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # of headers that are no HTTP
    with tempfile.TemporaryDirectory() as folder:
        command = [program(), "serve", args.checkpoint, *FLAGS, "--storage-path", f"{folder}/jobs"]
        with local_server(command, log=Path(folder) / "server.log") as server:
            wrong, sent = soak(server.url, args.examples)
            wrong += afterwards(server.url)
    for text, count in wrong.most_common(30):
        print(f"{count} x {text}")
    print(f"{sent} requests, {wrong.total()} problems")
    return int(bool(wrong))


def soak(url: str, examples: int) -> tuple[Counter[str], int]:
    """What was answered that should not have been, counted, and how many requests there were."""
    load_all_checks()
    checks = CHECKS.get_by_names([*CHECKED])
    wrong: Counter[str] = Counter()
    sent = 0

    def answer(case: Any) -> None:
        nonlocal sent
        sent += 1
        shorten(case)
        response = case.call(timeout=120)
        where = f"{case.method} {case.operation.path}: {response.status_code}"
        if response.status_code == 500:
            wrong[f"{where} {response.text[:300]}"] += 1
        try:
            case.validate_response(response, checks=checks)
        except Exception as error:  # noqa: BLE001 - a group of all that is not as described
            wrong[f"{where} {' '.join(str(error).split())[:300]}"] += 1
        delete(url, response)
        if case.operation.path.endswith("/sleep"):
            httpx.post(f"{url}/v1/cosmos3/wake_up", timeout=120)

    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    for found in schema.get_all_operations():
        operation = found.ok()
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            before = sent
            with suppress(Unsatisfiable):  # there is nothing that its schema would refuse
                _given(operation.as_strategy(generation_mode=mode), examples, answer)
            print(f"{operation.label}, {mode.value}: {sent - before} requests", flush=True)
    return wrong, sent


def _given(strategy: Any, examples: int, answer: Any) -> None:
    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=strategy)
    def each(case: Any) -> None:
        answer(case)

    each()


def shorten(case: Any) -> None:
    """Make of a request that may be accepted one that takes no time."""
    if isinstance(case.body, dict) and case.method == "POST":
        for name in LARGE:
            case.body.pop(name, None)
        small = SMALL if "/videos" in case.operation.path else {**SMALL, "num_frames": 1}
        case.body.update(small)


def delete(url: str, response: Any) -> None:
    if (
        response.status_code == 200
        and response.headers.get("content-type", [""])[0] == "application/json"
    ):
        job = response.json()
        if isinstance(job, dict) and str(job.get("id", "")).startswith("video_"):
            httpx.delete(f"{url}/v1/videos/{job['id']}", timeout=120)


def afterwards(url: str) -> Counter[str]:
    body = {"prompt": "a boat", **SMALL, "deadline_seconds": 120}
    headers = {"Prefer": "wait=120"}
    job = httpx.post(f"{url}/v1/videos", json=body, headers=headers, timeout=180)
    ok = job.status_code == 200 and job.json()["status"] == "completed"
    return Counter() if ok else Counter([f"afterwards: {job.status_code} {job.text[:300]}"])


if __name__ == "__main__":
    sys.exit(main())
