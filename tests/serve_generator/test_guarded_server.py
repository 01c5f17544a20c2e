"""Guardrails that allow, block and break; API keys; a distilled checkpoint without free steps."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from generators import WAIT, eventually
from limits import HANG
from servers import Server

from vllm_cosmos3.checkpoint.synthetic import write_checkpoint
from vllm_cosmos3.cli import main
from vllm_cosmos3.media import encode_image, read_video
from vllm_cosmos3.request.prompts import encode, load_tokenizer

pytestmark = pytest.mark.serve
PICTURE = f"data:image/png;base64,{b64encode(encode_image(np.zeros((64, 64, 3), np.uint8), 'png')).decode()}"
TEXT = {"prompt": "a boat", "size": "64x64", "num_frames": 5, "seed": 1}
SMALL = TEXT | {"input_reference": PICTURE}
PATHS = [
    ("POST", "/v1/images/generations"), ("POST", "/v1/videos"), ("GET", "/v1/videos"),
    ("POST", "/v1/videos/sync"), ("GET", "/v1/videos/x"), ("DELETE", "/v1/videos/x"),
    ("GET", "/v1/videos/x/content"), ("GET", "/v1/videos/x/events"), ("POST", "/v1/videos/x/remix"),
    ("GET", "/v1/models"), ("GET", "/v1/cosmos3/models"), ("POST", "/v1/images/edits"), ("GET", "/v1/nothing"),
    ("POST", "/v1/cosmos3/sleep"), ("POST", "/v1/cosmos3/wake_up"),
    ("POST", "/v1/cosmos3/start_weight_update"), ("POST", "/v1/cosmos3/update_weights"),
]  # fmt: skip


@pytest.fixture(scope="module")
def client(guarded_server: Server) -> Iterator[httpx.Client]:
    headers = {"Authorization": "Bearer secret"}
    with httpx.Client(base_url=guarded_server.url, headers=headers, timeout=HANG) as client:
        yield client


def post(client: httpx.Client, **fields: Any) -> httpx.Response:
    body = {name: value for name, value in (SMALL | fields).items() if value is not None}
    return client.post("/v1/videos", json=body, headers=WAIT)


@pytest.mark.parametrize(("method", "path"), PATHS)
@pytest.mark.parametrize("token", [None, "Bearer wrong", "Basic secret"])
def test_no_route_without_a_key(
    method: str, path: str, token: str | None, guarded_server: Server
) -> None:
    headers = {} if token is None else {"Authorization": token}
    headers["Origin"] = "http://a.example"
    answer = httpx.request(method, f"{guarded_server.url}{path}", headers=headers)
    assert answer.status_code == 401
    assert answer.headers["x-request-id"]
    assert answer.headers["access-control-allow-origin"] == "http://a.example"
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("authentication_error", "authentication")


def test_health_needs_no_key(guarded_server: Server) -> None:
    for path in ("/health", "/health/live", "/health/ready", "/metrics"):
        assert httpx.get(f"{guarded_server.url}{path}").status_code == 200


def test_no_playground(guarded_server: Server) -> None:
    html = {"Accept": "text/html"}
    answer = httpx.get(guarded_server.url, headers=html)
    assert answer.json()["key_needed"] is True
    for path in ("playground/app.js", "playground/index.html"):
        answer = httpx.get(f"{guarded_server.url}/{path}", headers=html)
        assert answer.status_code == 404
        assert "--no-playground" in answer.json()["error"]["message"]
    assert httpx.get(f"{guarded_server.url}/docs").is_success


def test_no_preview_of_frames_that_are_to_be_checked(client: httpx.Client) -> None:
    job = post(client, preview=True).json()
    assert job["status"] == "completed"
    assert (
        "preview has no effect: the guardrails check finished videos" in job["cosmos3"]["warnings"]
    )
    (model,) = client.get("/v1/models").json()["data"]
    assert model["cosmos3"]["preview"] is False


def test_allowed_prompts_are_recorded_as_checked(client: httpx.Client) -> None:
    job = post(client, guardrails=True).json()
    assert job["status"] == "completed"
    assert job["cosmos3"]["sources"]["num_inference_steps"] == "checkpoint"
    assert job["cosmos3"]["sources"]["image"] == "request"
    assert job["cosmos3"]["guardrails"] == {
        "requested": True, "effective": "active", "text": "pass", "video": "pass", "faces_blurred": 0
    }  # fmt: skip
    assert client.get("/health").json()["guardrails"] == "active"
    assert client.get("/v1/models").json()["data"][0]["cosmos3"]["guardrails"] == "active"


def test_a_blocked_prompt_is_refused_without_the_word(client: httpx.Client) -> None:
    answer = post(client, prompt="a forbidden boat")
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (
        400,
        "guardrail_blocked",
        "prompt",
    )
    assert "violence" in error["message"]
    assert "forbidden" not in error["message"]


def test_the_process_that_answers_has_not_imported_vllm(client: httpx.Client) -> None:
    """After whatever it has answered before; the checker, which lives in it, looks."""
    assert post(client).json()["status"] == "completed"
    answer = post(client, prompt="list vllm")
    assert "(vllm: False)" in answer.json()["error"]["message"]


def test_token_ids_are_judged_by_their_text(
    client: httpx.Client, distilled_checkpoint: Path
) -> None:
    tokenizer = load_tokenizer(distilled_checkpoint)
    for prompt, code in (("a forbidden boat", "guardrail_blocked"), ("a boat", None)):
        ids, _ = encode(prompt, tokenizer, system=None, limit=4096)
        answer = post(client, prompt=None, extra_params={"prompt_token_ids": ids})
        if code is None:
            assert answer.json()["cosmos3"]["guardrails"]["text"] == "pass"
        else:
            error = answer.json()["error"]
            assert (error["code"], error["param"]) == (code, "extra_params.prompt_token_ids")


def test_a_checker_that_breaks_lets_nothing_through(client: httpx.Client) -> None:
    answer = post(client, prompt="a broken boat")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "guardrail_error")


def test_blocked_frames_fail_the_job(client: httpx.Client) -> None:
    answer = post(client, size="128x64")
    assert answer.status_code == 200
    job = answer.json()
    assert (job["status"], job["error"]["code"]) == ("failed", "guardrail_blocked")
    again = client.get(f"/v1/videos/{job['id']}")
    assert (again.status_code, again.json()["status"]) == (200, "failed")
    answer = client.get(f"/v1/videos/{job['id']}/content")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "job_failed")


def test_guardrails_cannot_be_switched_off(client: httpx.Client) -> None:
    answer = post(client, guardrails=False)
    assert (answer.status_code, answer.json()["error"]["type"]) == (403, "permission_error")


@pytest.mark.parametrize(("field", "value"), [("num_inference_steps", 35), ("guidance_scale", 6.0)])
def test_row_24_a_distilled_checkpoint(field: str, value: float, client: httpx.Client) -> None:
    answer = post(client, **{field: value})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (
        400,
        "unsupported_parameter",
        field,
    )


def test_row_75_a_mode_that_the_checkpoint_was_not_made_for(client: httpx.Client) -> None:
    answers = [
        client.post("/v1/videos", json=TEXT),
        client.post("/v1/images/generations", json={"prompt": "a boat", "size": "64x64"}),
        client.post("/v1/videos", json=TEXT | {"seg": PICTURE}),
    ]
    served = "image2video (an image), as the kind of this checkpoint is distilled-i2v"
    messages = [
        "input_reference is missing, must be given, as the kind of this checkpoint is distilled-i2v",
        *(f"mode is '{mode}', must be {served}" for mode in ("text2image", "transfer")),
    ]
    for answer, message in zip(answers, messages, strict=True):
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, "unsupported_by_model")
        assert error["message"] == message
    block = client.get("/v1/cosmos3/models").json()["data"][0]["cosmos3"]
    assert (block["checkpoint_kind"], block["modes"]) == ("distilled-i2v", ["image2video"])
    assert list(block["defaults"]) == ["image2video"]


def test_the_log_of_requests_can_be_switched_off(
    client: httpx.Client, guarded_server: Server
) -> None:
    job = post(client).json()
    eventually(lambda: f"{job['id']} completed after" in guarded_server.log.read_text())
    assert "HTTP/1.1" not in guarded_server.log.read_text()


def test_the_kind_is_told_at_start(guarded_server: Server) -> None:
    assert "vllm-cosmos3 serve: checkpoint: distilled-i2v" in guarded_server.log.read_text()


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("generate_sound", {"generate_sound": True}),
        ("extra_params.sound_gen", {"extra_params": {"sound_gen": True}}),
    ],
)
def test_row_54_sound(field: str, fields: dict[str, Any], client: httpx.Client) -> None:
    answer = post(client, **fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "unsupported_by_model")
    assert error["param"] == field


def test_it_does_not_start_without_required_guardrails(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["serve", str(tiny_checkpoint), "--surface", "generator"]
    command += ["--port", "0", "--storage-path", str(tmp_path), "--guardrails", "required"]
    assert main(command) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("vllm-cosmos3 serve: --guardrails required, but ")
    assert last.endswith("with its models, or start with --guardrails auto or off")


def test_an_adapter_is_said_wherever_somebody_may_ask(client: httpx.Client) -> None:
    (model,) = client.get("/v1/cosmos3/models").json()["data"]
    (known,) = model["cosmos3"]["adapters"]
    assert (known["name"], known["scale"], known["matrices"]) == ("snow", 0.5, 2)
    assert client.get("/health").json()["adapters"] == ["snow:0.5"]
    job = post(client).json()
    assert job["status"] == "completed", job
    assert job["cosmos3"]["effective"]["adapters"] == [known]


def test_new_weights_and_the_old_ones_again(
    client: httpx.Client, distilled_checkpoint: Path, tmp_path: Path
) -> None:
    """The same request is made anew each time: of other weights, which its texts have been read with."""
    write_checkpoint(tmp_path / "other", kind="distilled-i2v", seed=1)

    def call(method: str, **body: Any) -> httpx.Response:
        return client.post(f"/v1/cosmos3/{method}", json=body or None)

    def frame() -> np.ndarray:  # the last one: the first is given
        answer = client.post("/v1/videos/sync", json=SMALL)
        assert answer.status_code == 200, answer.text
        last: np.ndarray = read_video(answer.content, frames=5)[-1].astype(float)
        return last

    frames = [frame()]
    assert client.get("/health").json()["weight_version"] is None
    for version, folder in (("other", tmp_path / "other"), ("old", distilled_checkpoint)):
        assert call("init_weight_transfer_engine", init_info={}).status_code == 200
        assert call("start_weight_update").json() == {"message": "start_weight_update is done"}
        health = client.get("/health")
        assert (health.status_code, health.json()["surfaces"]["generator"]) == (503, "updating")
        update = call("update_weights", update_info={"path": str(folder / "transformer")})
        assert update.status_code == 200
        assert call("finish_weight_update", weight_version=version).status_code == 200
        assert client.get("/health").json()["weight_version"] == version
        frames.append(frame())
    before, other, again = frames
    assert np.abs(other - before).mean() > 2
    assert np.abs(again - before).mean() < 0.5  # x264 does not always make the same of the same


def test_an_update_that_fails_leaves_the_weights(client: httpx.Client, tmp_path: Path) -> None:
    assert client.post("/v1/cosmos3/start_weight_update").status_code == 200
    body = {"update_info": {"path": str(tmp_path / "absent")}}
    refused = client.post("/v1/cosmos3/update_weights", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "update_info.path")
    assert client.get("/health").json()["surfaces"]["generator"] == "ready"
    for method in ("start_weight_update", "abort_weight_update"):  # as always
        assert client.post(f"/v1/cosmos3/{method}").status_code == 200
    for method, body, param in (
        ("finish_weight_update", {}, "finish_weight_update"),
        ("update_weights", {}, "update_info"),
        ("init_weight_transfer_engine", {"init_info": 1}, "init_info"),
    ):
        refused = client.post(f"/v1/cosmos3/{method}", json=body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param), method
    headers = {"Content-Type": "application/json"}
    for data, said in (
        (b'{"update_info": ', "not JSON at character 16"),
        (b"[" * 2**20, "nested too deeply"),
        (b"\xff", "not JSON in UTF-8"),
    ):
        refused = client.post("/v1/cosmos3/update_weights", content=data, headers=headers)
        assert refused.status_code == 400, refused.text
        assert said in refused.json()["error"]["message"]
