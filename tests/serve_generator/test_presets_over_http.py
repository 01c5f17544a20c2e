"""Presets and the step cache over HTTP: what the job says it was made with."""

from __future__ import annotations

import httpx
from generators import create, finished
from servers import Server

SMALL = {"size": "64x64", "num_frames": 5, "num_inference_steps": 6, "seed": 1}


def test_a_fast_video_says_how_it_was_made(generator_server: Server) -> None:
    fields = {**SMALL, "preset": "fast", "step_cache_threshold": 2.0}
    job = finished(generator_server, create(generator_server, **fields))
    block = job["cosmos3"]
    assert (block["effective"]["preset"], block["effective"]["step_cache"]) == ("fast", "sea")
    assert (block["reused_steps"], block["step"], block["num_steps"]) == (3, 6, 6)
    assert block["sources"]["preset"] == "request"
    assert block["sources"]["step_cache"] == "default"


def test_the_quality_of_openai_changes_nothing(generator_server: Server) -> None:
    made = [
        finished(generator_server, create(generator_server, **SMALL, **more))["cosmos3"]
        for more in ({}, {"quality": "hd"})
    ]
    assert made[0]["effective"] == made[1]["effective"]
    assert made[0]["effective"]["preset"] == "exact"
    assert made[0]["reused_steps"] == 0


def test_what_the_operator_forbids_is_refused(guarded_server: Server) -> None:
    answer = httpx.post(
        f"{guarded_server.url}/v1/images/generations",
        json={"prompt": "a boat", "preset": "fast"},
        headers={"Authorization": "Bearer secret"},
    )
    assert answer.status_code == 403, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("permission_denied", "preset")
    assert "must be exact, which the operator allows" in error["message"]


def test_models_say_what_is_loaded(generator_server: Server) -> None:
    (model,) = httpx.get(f"{generator_server.url}/v1/cosmos3/models").json()["data"]
    assert model["cosmos3"]["quantization"] is None
    assert model["cosmos3"]["presets"] == ["exact", "high", "fast"]
