"""Chat, pictures and videos on one port: the stock server with our routes in it."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from generators import PICTURE, SMALL
from robots import PATH, robot
from servers import BIN, Server, running
from servers import SMALL as SMALL_ENGINE
from websockets.exceptions import ConnectionClosed, InvalidStatus

pytestmark = [pytest.mark.serve, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture(scope="module")
def server(
    tiny_checkpoint_fp32: Path, vllm_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("both")
    command = [str(BIN / "vllm-cosmos3"), "serve", str(tiny_checkpoint_fp32), "--max-queue", "5"]
    command += ["--storage-path", str(folder / "storage"), "--served-model-name", "tiny"]
    command += ["--api-key", "EMPTY", *SMALL_ENGINE]
    with running(command, folder, vllm_cache) as server:
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


def test_pictures(server: Server) -> None:
    picture = server.client().images.generate(prompt="a boat", extra_body=PICTURE)
    assert base64.b64decode(picture.data[0].b64_json or "").startswith(b"\x89PNG")


def test_health_and_models_tell_of_both(server: Server) -> None:
    report = httpx.get(f"{server.url}/health").json()
    assert report["surfaces"] == {"generator": "ready", "reasoner": "ready"}
    assert report["queue"]["limit"] == 5
    for path in ("/health/ready", "/health/live"):
        assert httpx.get(f"{server.url}{path}").status_code == 200
    headers = {"Authorization": "Bearer EMPTY"}
    for path in ("/v1/models", "/v1/cosmos3/models"):
        (model,) = httpx.get(f"{server.url}{path}", headers=headers).json()["data"]
        assert model["id"] == "tiny"
        assert model["cosmos3"]["modes"]


def test_keys_metrics_and_errors_are_the_same(server: Server) -> None:
    assert httpx.get(f"{server.url}/v1/videos").status_code == 401
    assert httpx.post(f"{server.url}/v1/videos", json={"prompt": "x"}).status_code == 401
    page = httpx.get(f"{server.url}/metrics").text
    assert "cosmos3:queue_limit 5.0" in page
    assert "vllm:num_requests_running" in page
    headers = {"Authorization": "Bearer EMPTY"}
    answer = httpx.post(f"{server.url}/v1/videos", json={"promt": "x"}, headers=headers)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (
        400,
        "unknown_parameter",
        "promt",
    )


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


def test_start_up_prints_the_stock_command(server: Server) -> None:
    log = server.log.read_text()
    assert "VLLM_PLUGINS=cosmos3" in log
    assert '--additional-config \'{"cosmos3": {' in log
