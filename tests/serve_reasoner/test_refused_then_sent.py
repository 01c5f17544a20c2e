"""Media of a refused request can be sent again at once: the engine is not taken to have them."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import pytest
from generators import eventually
from limits import HANG
from media_files import data_url, encoded, picture, png
from servers import Server

pytestmark = pytest.mark.serve

SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nonsense"}}}
REFUSED: dict[str, dict[str, Any]] = {
    "a temperature": {"temperature": 5},
    "a schema": {"response_format": SCHEMA},
    "two greedy answers": {"n": 2, "temperature": 0},
    "a top_p": {"top_p": 7},
    "a stream": {"stream": True, "temperature": 5},
    "log-probabilities": {"logprobs": True, "top_logprobs": 10**6},
    "a token to prefer": {"logit_bias": {"99999999": 1}},
    "an answer that is too long": {"max_tokens": 10**6},
}


def parts(seed: int) -> dict[str, dict[str, Any]]:
    """A picture, and a clip, that nobody has sent before."""
    still = data_url(png(picture(seed=seed)), "image/png")
    clip = data_url(encoded(frames=12, title=f"clip {seed}"), "video/mp4")
    return {
        "image": {"type": "image_url", "image_url": {"url": still}},
        "video": {"type": "video_url", "video_url": {"url": clip}},
    }


def send(server: Server, path: str, part: dict[str, Any], **settings: Any) -> httpx.Response:
    content = [part, {"type": "text", "text": "what is shown?"}]
    body = {"model": server.model, "messages": [{"role": "user", "content": content}]}
    return httpx.post(f"{server.url}{path}", json=body | settings, timeout=HANG)


@pytest.mark.parametrize("modality", ["image", "video"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_request_spoils_nothing(
    reasoner_server: Server, name: str, modality: str
) -> None:
    part = parts(1000 + list(REFUSED).index(name))[modality]
    refused = send(reasoner_server, "/v1/chat/completions", part, **REFUSED[name])
    assert refused.status_code == 400, refused.text
    for _ in range(2):  # the second time out of the cache
        reply = send(reasoner_server, "/v1/chat/completions", part, max_tokens=4)
        assert reply.status_code == 200, reply.text


@pytest.mark.parametrize("modality", ["image", "video"])
def test_counting_tokens_spoils_nothing(reasoner_server: Server, modality: str) -> None:
    part = parts(2000)[modality]
    assert send(reasoner_server, "/tokenize", part).status_code == 200
    assert send(reasoner_server, "/v1/chat/completions", part, max_tokens=4).status_code == 200


@pytest.mark.parametrize("seconds", [0.0, 0.02, 0.05, 0.1, 0.2])
def test_a_client_that_goes_away_spoils_nothing(reasoner_server: Server, seconds: float) -> None:
    """However far its request has come, and even if it was answered meanwhile."""
    part = parts(2010 + round(100 * seconds))["video"]
    content = [part, {"type": "text", "text": "what is shown?"}]
    body = {"model": reasoner_server.model, "messages": [{"role": "user", "content": content}]}
    with reasoner_server.connection() as connection:
        connection.request(
            "POST",
            "/v1/chat/completions",
            json.dumps(body | {"max_tokens": 500, "ignore_eos": True}),
            {"Content-Type": "application/json"},
        )
        time.sleep(seconds)
    reply = send(reasoner_server, "/v1/chat/completions", part, max_tokens=4)
    assert reply.status_code == 200, reply.text


def test_what_was_sent_is_not_made_again(reasoner_server: Server) -> None:
    part = parts(2002)["image"]
    assert send(reasoner_server, "/v1/chat/completions", part, max_tokens=1).status_code == 200
    hits = cache_hits(reasoner_server)
    assert send(reasoner_server, "/v1/chat/completions", part, max_tokens=1).status_code == 200
    eventually(lambda: cache_hits(reasoner_server) > hits)


def cache_hits(server: Server) -> float:
    text = httpx.get(f"{server.url}/metrics").text
    lines = [line for line in text.splitlines() if line.startswith("vllm:mm_cache_hits_total{")]
    return float(lines[0].rpartition(" ")[2])
