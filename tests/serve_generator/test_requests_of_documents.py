"""Requests of other programs' documents, as their ``curl`` lines send them, at a small size."""

from __future__ import annotations

import json
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from generators import finished
from limits import HANG
from lines import Line, of
from media_files import clip, picture, png
from servers import Server

SMALL = {"size": "64x64", "num_frames": "5", "num_inference_steps": "1"}
POSTED = [line for line in of("curl") if "POST" in line.command]  # chat is sent without it


def fields(line: Line) -> tuple[str, dict[str, Any]]:
    """The path of a ``curl`` command and the fields of its body."""
    words = shlex.split(line.command)
    path = next(word for word in words if word.startswith("http")).split("8000")[1]
    body: dict[str, Any] = {}
    for flag, value in pairwise(words):
        if flag == "--form-string":
            name, _, text = value.partition("=")
            body[name] = text
        elif flag == "-d":
            body |= json.loads(value)
    return path, body


@pytest.mark.parametrize("line", POSTED, ids=lambda line: line.places[0])
def test_a_request(line: Line, generator_server: Server) -> None:
    path, body = fields(line)
    form = path.startswith("/v1/videos")
    body |= SMALL if form else {"size": "64x64", "num_inference_steps": 1}
    sent: dict[str, Any] = {"data": body} if form else {"json": body}
    answer = httpx.post(f"{generator_server.url}{path}", timeout=HANG, **sent)
    nested = body.get("extra_args") or json.loads(body.get("extra_params", "{}"))
    if nested.get("guardrails"):
        assert answer.status_code == 409
        error = answer.json()["error"]
        assert error["code"] == "guardrails_unavailable"
        assert "pip install 'cosmos-guardrail>=0.3.2,<0.4'" in error["message"]
        nested.pop("guardrails")
        name = "extra_params" if form else "extra_args"
        body[name] = json.dumps(nested) if form else nested
        answer = httpx.post(f"{generator_server.url}{path}", timeout=HANG, **sent)
    assert answer.status_code == 200, answer.text
    if form:
        assert answer.headers["content-type"] == "video/mp4"
    else:
        assert answer.json()["data"][0]["b64_json"]


@pytest.mark.parametrize("reference", ["picture", "clip"])
def test_forward_dynamics_with_a_size_and_the_number_of_a_view(
    reference: str, generator_server: Server, tmp_path: Path
) -> None:
    """The extra_params of the wiki, p. 11; the first frame may come from a clip."""
    extra = {
        "action_mode": "forward_dynamics",
        "domain_name": "av",
        "action_chunk_size": 4,
        "image_size": [64, 96],
        "view_point": 0,
        "action": np.zeros((4, 9)).tolist(),
        "guardrails": False,
    }
    file = tmp_path / "clip.mp4"
    clip(file, frames=9)
    sent = ("a.png", png(picture()), "image/png") if reference == "picture" else ("a.mp4", file.read_bytes(), "video/mp4")  # fmt: skip
    body = {"prompt": "drive", "extra_params": json.dumps(extra), "num_inference_steps": "1"}
    url = f"{generator_server.url}/v1/videos"
    answer = httpx.post(url, data=body, files={"input_reference": sent}, timeout=HANG)
    assert answer.status_code == 200, answer.text
    job = finished(generator_server, answer.json())
    assert job["status"] == "completed", job
    effective = job["cosmos3"]["effective"]
    assert (effective["size"], effective["view_point"]) == ("96x64", "ego_view")
