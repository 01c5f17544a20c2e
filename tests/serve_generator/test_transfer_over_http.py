"""Transfers over HTTP: the same clip in every way that it can be sent, and the example."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import httpx
import pytest
from generators import finished
from limits import HANG
from media_files import clip, data_url
from servers import Server

pytestmark = pytest.mark.serve
SHORT = {"size": "64x64", "num_inference_steps": 1, "seed": 3, "num_video_frames_per_chunk": 5}
EXAMPLE = Path(__file__).parents[2] / "examples" / "generator" / "transfer.py"


def send(server: Server, **request: Any) -> tuple[dict[str, Any], bytes]:
    """The finished job of a request, and its frames as one picture.

    x264 does not always write the same file for the same frames.
    """
    answer = httpx.post(f"{server.url}/v1/videos", timeout=HANG, **request)
    assert answer.status_code == 200, answer.text
    job = finished(server, answer.json())
    assert job["status"] == "completed", job
    return job, content(server, job, "spritesheet")


def content(server: Server, job: dict[str, Any], variant: str) -> bytes:
    url = f"{server.url}/v1/videos/{job['id']}/content"
    return httpx.get(url, params={"variant": variant}).content


def test_one_clip_in_many_ways(
    generator_server: Server, media_folder: Path, tmp_path: Path
) -> None:
    (media_folder / "clips").mkdir()
    file = clip(media_folder / "clips" / "depth #1.mp4", frames=7, fps=12)
    data = file.read_bytes()
    source = data_url(data, "video/mp4")
    text = {"prompt": "a boat", **{name: str(value) for name, value in SHORT.items()}}
    ways: list[dict[str, Any]] = [
        {"json": text | SHORT | {"depth": source}},
        {"json": {"prompt": "a boat", "extra_params": SHORT | {"depth": {"control_path": str(file)}}}},
        {"data": text | {"depth[control]": source, "depth[control_weight]": "2"}},
        {"data": text | {"extra_args": json.dumps({"depth": file.as_uri()})}},
        {"json": text | SHORT | {"depth": "clips/depth #1.mp4"}},
        {"data": text, "files": {"depth": ("depth.mp4", data)}},
        {"data": text | {"control_type": "depth"}, "files": {"control_reference": ("d.mp4", data)}},
    ]  # fmt: skip
    job, first = send(generator_server, **ways[0])
    known = job["cosmos3"]["effective"]
    assert (known["mode"], known["num_frames"], known["fps"]) == ("transfer", 7, 12.0)
    assert known["depth"] == {"control_weight": 1.0}
    assert (known["control_guidance"], known["num_video_frames_per_chunk"]) == (1.5, 5)
    (tmp_path / "made.mp4").write_bytes(content(generator_server, job, "video"))
    with av.open(str(tmp_path / "made.mp4")) as made:
        assert sum(1 for _ in made.decode(video=0)) == 7
    for way in ways[1:]:
        assert send(generator_server, **way)[1] == first


def test_the_capabilities_name_the_controls(generator_server: Server) -> None:
    block = httpx.get(f"{generator_server.url}/v1/cosmos3/models").json()["data"][0]["cosmos3"]
    assert "transfer" in block["modes"]
    assert block["control_guidance"] == {"edge": 1.5, "blur": 1.5, "depth": 1.5, "seg": 2.0, "wsm": 3.0}  # fmt: skip
    schema = httpx.get(f"{generator_server.url}/openapi.json").json()
    content = schema["paths"]["/v1/videos"]["post"]["requestBody"]["content"]
    body, form = (
        content[kind]["schema"]["properties"].keys()
        for kind in ("application/json", "multipart/form-data")
    )
    assert {"edge", "control_attention"} <= body
    assert {"control_reference", "control_type"} <= form


def test_the_example(generator_server: Server, tmp_path: Path) -> None:
    clip(tmp_path / "in.mp4", frames=5)
    command = [sys.executable, "-W", "ignore", str(EXAMPLE), generator_server.url, "oil on canvas"]
    command += ["in.mp4", json.dumps(SHORT | {"blur": True})]
    done = subprocess.run(
        command, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=HANG
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with av.open(str(tmp_path / "repainted.mp4")) as made:
        assert sum(1 for _ in made.decode(video=0)) == 5
