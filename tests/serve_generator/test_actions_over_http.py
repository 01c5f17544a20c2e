"""Actions over HTTP: what a finished job holds, files of the server, and the blocking route."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from generators import create, finished, suspended
from limits import HANG
from media_files import clip, data_url, picture, png
from servers import Server

from vllm_cosmos3.media import read_video

pytestmark = pytest.mark.serve
SHORT = {"size": "64x64", "num_inference_steps": 2, "seed": 3, "action_chunk_size": 4}


def upload(server: Server, data: bytes, path: str = "/v1/videos", **fields: Any) -> httpx.Response:
    """A form as other servers want it: a file, and the rest as JSON in extra_params."""
    form = {"prompt": "drive on", "extra_params": json.dumps(SHORT | fields)}
    files = {"input_reference": ("file", data)}
    return httpx.post(f"{server.url}{path}", data=form, files=files, timeout=HANG)


def test_a_policy_job_holds_its_actions(generator_server: Server) -> None:
    fields = {"action_mode": "policy", "domain_name": "umi", "view_point": "ego_view"}
    with suspended(generator_server):
        answer = upload(generator_server, png(picture(64, 48)), **fields)
    assert answer.json()["action"] is None
    job = finished(generator_server, answer.json())
    action = job["action"]
    assert (action["shape"], action["dtype"], action["units"]) == ([4, 10], "float32", "normalized")
    assert (action["domain_name"], action["domain_id"], action["fps"]) == ("umi", 6, 20.0)
    assert (action["action_mode"], action["raw_action_dim"]) == ("policy", 10)
    rows = np.array(action["data"])
    assert rows.shape == (4, 10)
    assert rows.std() > 0
    content = httpx.get(f"{generator_server.url}/v1/videos/{job['id']}/content")
    assert content.headers["content-type"] == "video/mp4"


def test_so_few_actions_that_the_video_is_one_frame(generator_server: Server) -> None:
    fields = {"action_mode": "policy", "domain_name": "umi", "action_chunk_size": 2}
    answer = upload(generator_server, png(picture(64, 48)), **fields)
    job = finished(generator_server, answer.json())
    assert (job["status"], job["action"]["shape"]) == ("completed", [2, 10])
    content = httpx.get(f"{generator_server.url}/v1/videos/{job['id']}/content")
    assert (content.status_code, content.headers["content-type"]) == (200, "video/mp4")
    assert len(read_video(content.content, frames=9)) == 1
    again = SHORT | fields | {"prompt": "go", "fps": 20, "continue_from": job["id"]}
    answer = httpx.post(f"{generator_server.url}/v1/videos", json=again, timeout=HANG)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "action_chunk_size"


def test_inverse_dynamics_of_an_uploaded_clip(generator_server: Server, tmp_path: Path) -> None:
    file = clip(tmp_path / "drive.mp4", frames=5)
    fields = {"action_mode": "inverse_dynamics", "domain_name": "av", "raw_action_dim": 9}
    job = finished(generator_server, upload(generator_server, file.read_bytes(), **fields).json())
    assert job["action"]["shape"] == [4, 9]


def test_forward_dynamics_from_a_file_of_the_server(
    generator_server: Server, media_folder: Path
) -> None:
    (media_folder / "left.json").write_text(json.dumps([[0.1] * 9] * 3))
    fields = {"action_mode": "forward_dynamics", "domain_name": "av", "action_path": "left.json"}
    job = finished(
        generator_server, upload(generator_server, png(picture(64, 64)), **fields).json()
    )
    assert (job["status"], job["action"]) == ("completed", None)
    assert job["cosmos3"]["effective"]["action"] == [4, 9]
    assert any("3 rows" in warning for warning in job["cosmos3"]["warnings"])
    answer = upload(generator_server, png(picture(64, 64)), "/v1/videos/sync", **fields)
    assert answer.headers["content-type"] == "video/mp4"
    assert len(answer.content) > 500


def test_the_form_of_the_published_notebooks(generator_server: Server) -> None:
    """Their field names and places, with fewer actions and steps."""
    extra = {
        "action_mode": "forward_dynamics",
        "domain_name": "umi",
        "action_chunk_size": 4,
        "image_size": 256,
        "view_point": "ego_view",
        "action": np.full((4, 10), 0.1).tolist(),
        "guardrails": False,
    }
    form = {
        "prompt": "mouse arrangement", "num_frames": "5", "fps": "20", "num_inference_steps": "2",
        "guidance_scale": "1.0", "flow_shift": "10.0", "seed": "0", "extra_params": json.dumps(extra),
    }  # fmt: skip
    files = {"input_reference": ("umi.png", png(picture(100, 75)), "image/png")}
    answer = httpx.post(f"{generator_server.url}/v1/videos", data=form, files=files, timeout=HANG)
    job = finished(generator_server, answer.json())
    assert (job["status"], job["size"], job["action"]) == ("completed", "96x64", None)
    assert job["cosmos3"]["effective"]["size"] == "320x256"  # of the canvas
    assert job["num_frames"] == 5


def test_the_same_request_as_json_and_as_form_fields(generator_server: Server) -> None:

    url = data_url(png(picture(64, 64)), "image/png")
    fields = SHORT | {"prompt": "go", "action_mode": "policy", "domain_name": "av"}
    fields |= {"action_state": [0.5] * 9, "input_reference": url}
    first = finished(generator_server, create(generator_server, **fields))
    form = {k: json.dumps(v) if isinstance(v, list) else str(v) for k, v in fields.items()}
    answer = httpx.post(f"{generator_server.url}/v1/videos", data=form, timeout=HANG)
    second = finished(generator_server, answer.json())
    assert first["action"] == second["action"]


def test_embodiments_are_listed(generator_server: Server) -> None:
    block = httpx.get(f"{generator_server.url}/v1/cosmos3/models").json()["data"][0]["cosmos3"]
    assert {"policy", "forward_dynamics", "inverse_dynamics"} <= set(block["modes"])
    assert block["action_domains"]["av"]["action_chunk_size"] == 60
