"""Chat, pictures and videos on one port: the stock server with our routes in it."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
import test_catalogue as catalogue
from browsing import READY, browsing, check_accessibility, visiting
from generators import PICTURE, SMALL, eventually, refuses, suspended
from jsonschema import Draft202012Validator
from limits import HANG
from media_files import clip, data_url, picture, png
from playwright.sync_api import expect
from robots import PATH, robot
from servers import BIN, BOTH, Server, running
from servers import SMALL as SMALL_ENGINE
from terse import terse
from websockets.exceptions import ConnectionClosed, InvalidStatus

from vllm_cosmos3.request.prompts import Facts
from vllm_cosmos3.request.upsample import schema_of
from vllm_cosmos3.server.jobs.journal import Journal

pytestmark = [pytest.mark.serve, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
KEY = {"Authorization": "Bearer EMPTY"}


@pytest.fixture(scope="module")
def server(
    tiny_checkpoint_fp32: Path, vllm_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("both")
    checkpoint = terse(tiny_checkpoint_fp32, folder / "terse")
    command = [str(BIN / "vllm-cosmos3"), "serve", str(checkpoint), "--max-queue", "5"]
    command += ["--storage-path", str(folder / "storage"), "--served-model-name", "tiny"]
    command += [
        "--api-key",
        "EMPTY",
        "--allowed-local-media-path",
        str(folder),
        *SMALL_ENGINE,
        "--max-model-len",
        "16384",
    ]
    # A random model would pad JSON with blanks for ever.
    command += ["--structured-outputs-config.disable_any_whitespace=true"]
    command += ["--structured-outputs-config.backend=xgrammar"]
    with running(command, folder, vllm_cache, variables=BOTH) as server:
        yield server


def test_chat_about_a_generated_video(server: Server) -> None:
    client = server.client()
    fields = SMALL | {"num_frames": 9}
    video = client.videos.create_and_poll(prompt="a boat", poll_interval_ms=50, extra_body=fields)
    clip = base64.b64encode(client.videos.download_content(video.id).read()).decode()
    content = [
        {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{clip}"}},
        {"type": "text", "text": "What is shown?"},
    ]
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": content}],  # type: ignore[list-item, misc]
        max_tokens=5,
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0
    assert answer.usage.prompt_tokens > 20  # the video is in it
    eventually(lambda: f"{video.id} completed after" in server.log.read_text())


def test_chat_answers_while_the_generator_sleeps(server: Server) -> None:
    """vLLM's own engine sleeps where it was started for it, which needs a GPU."""
    moved = httpx.post(f"{server.url}/v1/cosmos3/sleep", headers=KEY, timeout=HANG)
    assert moved.json()["surfaces"] == {
        "generator": "sleeping",
        "reasoner": "ready: started without --enable-sleep-mode",
    }
    try:
        refused = httpx.post(f"{server.url}/v1/videos", json={"prompt": "a"}, headers=KEY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "sleeping")
        health = httpx.get(f"{server.url}/health", timeout=HANG)
        surfaces = {"generator": "sleeping", "reasoner": "ready"}
        assert (health.status_code, health.json()["surfaces"]) == (503, surfaces)
        asked = [{"role": "user", "content": "hello"}]
        answer = server.client().chat.completions.create(model="tiny", messages=asked, max_tokens=2)  # type: ignore[arg-type]
        assert answer.usage is not None
        assert answer.usage.completion_tokens > 0
    finally:
        woken = httpx.post(f"{server.url}/v1/cosmos3/wake_up", headers=KEY, timeout=HANG)
    assert woken.json()["surfaces"]["generator"] == "ready"


@pytest.mark.browser
def test_the_playground_asks_about_a_picture(server: Server) -> None:
    with browsing() as browser, visiting(browser) as context:
        page = context.new_page()
        page.goto(f"{server.url}/")
        page.fill("#key", "EMPTY")
        page.locator("#key").press("Enter")
        page.wait_for_selector(READY)
        page.locator("#tab-create").press("ArrowRight")
        expect(page.locator("#tab-ask")).to_be_focused()
        file = {"name": "boat.png", "mimeType": "image/png", "buffer": png(picture(64, 64))}
        page.set_input_files("#ask-file", file)  # type: ignore[arg-type]
        page.fill("#longest", "16")
        page.fill("#question", "What is <b>shown</b>?")
        page.locator("#question").press("Enter")
        expect(page.locator(".transcript .user > p")).to_have_text("What is <b>shown</b>?")
        answer = page.locator(".transcript .assistant[aria-busy=false] > p")
        expect(answer).not_to_be_empty()
        page.fill("#question", "And then?")
        page.click("#send")
        expect(page.locator(".transcript .assistant[aria-busy=false]")).to_have_count(2)
        check_accessibility(page)
        page.fill("#longest", "100000")
        page.fill("#question", "Why?")
        page.click("#send")
        expect(page.locator("#ask-error")).to_contain_text("max_tokens")


def test_pictures(server: Server) -> None:
    picture = server.client().images.generate(prompt="a boat", extra_body=PICTURE)
    assert base64.b64decode(picture.data[0].b64_json or "").startswith(b"\x89PNG")


def test_an_engine_that_stands_still_is_told(server: Server) -> None:
    with standing_still(server):
        eventually(lambda: health(server)["reasoner_last_sign_of_life"] > 2)
    eventually(lambda: health(server)["reasoner_last_sign_of_life"] < 2)


@contextmanager
def standing_still(server: Server) -> Iterator[None]:
    """The reasoner's engine does nothing until the block ends."""
    (engine,) = (
        process
        for process in psutil.Process(server.pid).children(recursive=True)
        if process.name().startswith("VLLM::EngineCor")
    )
    engine.suspend()
    try:
        yield
    finally:
        engine.resume()


def health(server: Server) -> dict[str, float]:
    report: dict[str, float] = httpx.get(f"{server.url}/health/ready", headers=KEY).json()
    return report


def test_the_reasoner_writes_the_prompt(server: Server) -> None:
    body = {"prompt": "a boat", "upsample_prompt": True, **PICTURE}
    answer = httpx.post(f"{server.url}/v1/images/generations", json=body, headers=KEY, timeout=HANG)
    assert answer.status_code == 200, answer.text
    written = answer.json()["cosmos3"]["upsampled_prompt"]
    facts = Facts(num_frames=1, fps=24, height=64, width=64, aspect_ratio=None)
    Draft202012Validator(schema_of(facts)).validate(json.loads(written))
    assert list(json.loads(written)) == list(schema_of(facts)["properties"])
    assert answer.json()["data"][0]["revised_prompt"] == written
    assert answer.json()["cosmos3"]["effective"]["prompt"] == written
    assert answer.json()["cosmos3"]["sources"]["prompt"] == "reasoner"


def test_a_prompt_that_takes_too_long_is_given_up(server: Server, tmp_path: Path) -> None:
    frame = data_url(png(picture(64, 64)), "image/png")
    video = data_url(clip(tmp_path / "clip.mp4", frames=9).read_bytes(), "video/mp4")
    body = {"prompt": "a boat", "upsample_prompt": True, "deadline_seconds": 1, **SMALL}
    transfer = {"input_reference": video, "edge": True}
    taken = transfer | {"num_first_chunk_conditional_frames": 1}
    url = f"{server.url}/v1/videos"
    with standing_still(server):
        for more in ({}, {"input_reference": frame}, transfer, taken):  # it sees what is known
            answer = httpx.post(url, json=body | more, headers=KEY, timeout=HANG)
            assert answer.json()["error"]["code"] == "deadline_exceeded"


@pytest.mark.parametrize("path", ["videos/sync", "images/generations"])
def test_a_prompt_is_given_up_when_its_client_goes_away(path: str, server: Server) -> None:
    fields = SMALL if path == "videos/sync" else PICTURE
    body = {"prompt": "a boat", "upsample_prompt": True, **fields}

    def is_given_up() -> bool:
        """Whether it is not written to its end, to which it comes where the server looks too late."""
        eventually(lambda: in_engine(server) == 0)
        before = vllm_sample(server, "request_success")
        with standing_still(server), server.connection() as connection:
            headers = {**KEY, "Content-Type": "application/json"}
            connection.request("POST", f"/v1/{path}", json.dumps(body), headers)
            time.sleep(1)  # it may as well go away before its prompt has come to the engine
        server.client().chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "what is shown?"}], max_tokens=1
        )
        eventually(lambda: in_engine(server) == 0)
        return vllm_sample(server, "request_success") == before + 1

    assert any(is_given_up() for _ in range(3))


def in_engine(server: Server) -> float:
    """Requests that the reasoner has not ended."""
    return vllm_sample(server, "num_requests_running") + vllm_sample(server, "num_requests_waiting")


def vllm_sample(server: Server, name: str) -> float:
    """A sum of vLLM's metrics."""
    page = httpx.get(f"{server.url}/metrics", timeout=HANG).text
    lines = [line for line in page.splitlines() if re.match(rf"vllm:{name}(_total)?\{{", line)]
    assert lines
    return sum(float(line.split()[-1]) for line in lines)


def test_health_and_models_tell_of_both(server: Server) -> None:
    report = httpx.get(f"{server.url}/health").json()
    assert report["surfaces"] == {"generator": "ready", "reasoner": "ready"}
    assert report["queue"]["limit"] == 5
    for path in ("/health/ready", "/health/live"):
        assert httpx.get(f"{server.url}{path}").status_code == 200
    for path in ("/v1/models", "/v1/cosmos3/models"):
        (model,) = httpx.get(f"{server.url}{path}", headers=KEY).json()["data"]
        assert model["id"] == "tiny"
        assert model["cosmos3"]["modes"]
        assert model["cosmos3"]["prompt_upsampling"] is True


def test_metrics_of_both_are_on_one_page(server: Server) -> None:
    page = httpx.get(f"{server.url}/metrics").text
    assert "cosmos3:queue_limit 5.0" in page
    assert "vllm:num_requests_running" in page


ROWS = [
    row
    for row in catalogue.ROWS
    if row.number in (1, 5, 31, 59, 77, 82, 83, 84, 88, 95, 96, 101, 107)
    and row.path != "/v1/nothing"  # that is vLLM's to answer
]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_errors_are_those_of_the_generator_alone(row: catalogue.Row, server: Server) -> None:
    with httpx.Client(base_url=server.url, headers=KEY, timeout=HANG) as client:
        answer = client.request(row.method, row.path, **row.send)
    assert answer.status_code == row.status, answer.text
    assert answer.headers["x-request-id"]
    catalogue.check(answer, row.code, row.param)
    if row.status == 405:
        assert "POST" in answer.headers["allow"]


@pytest.mark.parametrize("path", ["/v1/videos", "/v1/images/generations", "/v1/cosmos3/models"])
def test_without_a_key(path: str, server: Server) -> None:
    answer = httpx.get(f"{server.url}{path}")
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    catalogue.check(answer, "authentication", None)


def test_other_routes_keep_the_errors_of_vllm(server: Server) -> None:
    assert httpx.get(f"{server.url}/v1/models").json() == {"error": "Unauthorized"}


def test_robots_name_their_key_in_either_way(server: Server) -> None:
    """The checkpoint is no policy, which only those hear who have a key."""
    for authorization in ("Bearer EMPTY", "Api-Key EMPTY"):
        for path in ("/", PATH):
            refused = pytest.raises(ConnectionClosed, match="no robot policy")
            with refused, robot(server.url, path, authorization):
                pass
    for authorization in ("Api-Key wrong", None):
        for path in ("/", PATH):
            with pytest.raises(InvalidStatus, match="401"), robot(server.url, path, authorization):
                pass


@pytest.mark.parametrize("kind", ["image_url", "video_url"])
@pytest.mark.parametrize("place", ["http://127.0.0.1:1/x", "http://no.such.host.invalid/x", "file://{folder}/missing"])  # fmt: skip
def test_media_that_cannot_be_read(kind: str, place: str, server: Server) -> None:
    given = place.format(folder=server.log.parent)
    content = [{"type": kind, kind: {"url": given}}, {"type": "text", "text": "What is shown?"}]
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 3}
    url = f"{server.url}/v1/chat/completions"
    answer = httpx.post(url, json=body, headers=KEY, timeout=HANG)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["code"] == 400
    shown, possible = given, "a URL that this server can"
    if given.startswith("file:"):  # where the server keeps its files is not told
        shown, possible = "file://<path>", "a file that exists"
    assert f"{kind} is '{shown}', must be {possible}" in answer.json()["error"]["message"]


def test_start_up_prints_the_stock_command(server: Server) -> None:
    eventually(lambda: f"ready: {server.url} (chat, images, videos)" in server.log.read_text())
    log = server.log.read_text()
    assert "VLLM_PLUGINS=cosmos3" in log
    assert '--additional-config \'{"cosmos3": {' in log


def test_sigterm_lets_the_generator_finish(server: Server) -> None:
    """The last test of this server: it ends."""
    with httpx.Client(base_url=server.url, headers=KEY, timeout=HANG) as client:
        body = {"prompt": "a boat", **SMALL}
        with suspended(server):
            job = client.post("/v1/videos", json=body).json()
            os.kill(server.pid, signal.SIGTERM)
            eventually(lambda: client.get("/health").status_code == 503)
            assert "stopping" in client.get("/health").json()["reason"]
            answer = client.post("/v1/videos", json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
            assert int(answer.headers["retry-after"]) > 0
            url = f"/v1/videos/{job['id']}"
            eventually(lambda: client.get(url).json()["status"] == "in_progress")
    eventually(lambda: refuses(server))
    with closing(Journal(server.log.parent / "storage")) as journal:
        kept = journal.get(job["id"])
    assert kept is not None
    assert kept.status == "completed"
