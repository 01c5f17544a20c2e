"""Chat bodies with flat media URLs."""

from __future__ import annotations

import asyncio
import json

import pytest
from fastapi.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from vllm_cosmos3.server.flat_urls import FlatUrls, in_objects


def test_flat_urls_become_objects() -> None:
    parts = [
        {"type": "video_url", "video_url": "https://a.b/c.mp4"},
        {"type": "image_url", "image_url": {"url": "https://a.b/c.png", "detail": "low"}},
        {"type": "text", "text": '"video_url": "x"'},
    ]
    body = {"messages": [{"role": "user", "content": parts}, {"role": "user", "content": "a"}]}
    read = json.loads(in_objects(json.dumps(body).encode()))
    first, *rest = read["messages"][0]["content"]
    assert first == {"type": "video_url", "video_url": {"url": "https://a.b/c.mp4"}}
    assert rest == parts[1:]
    assert read["messages"][1] == body["messages"][1]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b'{"messages": "video_url": "x"',
        b'{"messages": [{"content": [{"type": "video_url"}]}]}',
        b'{"messages": {"video_url": "https://a"}}',
        b'["video_url", {"video_url": "x"}]',
    ],
)
def test_other_bodies_stay(body: bytes) -> None:
    assert in_objects(body) == body


@pytest.mark.parametrize("admitted", [True, False])
def test_a_body_is_read_when_the_app_asks_for_it(admitted: bool) -> None:
    """And not before somebody has asked for a key."""
    body = b'{"messages": [{"content": [{"video_url": "https://a"}]}]}'
    coming = [
        {"type": "http.request", "body": body[:40], "more_body": True},
        {"type": "http.request", "body": body[40:], "more_body": False},
        {"type": "http.disconnect"},
    ]
    came: list[Message] = []

    async def receive() -> Message:
        return coming.pop(0)

    async def send(message: Message) -> None:
        pass

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while admitted and not (came and came[-1]["type"] == "http.disconnect"):
            came.append(await receive())
        await PlainTextResponse("", 200 if admitted else 401)(scope, receive, send)

    scope = {"type": "http", "path": "/v1/chat/completions", "headers": []}
    asyncio.run(FlatUrls(app)(scope, receive, send))
    if admitted:
        assert [message["type"] for message in came] == ["http.request", "http.disconnect"]
        assert came[0]["body"] == body.replace(b'"https://a"', b'{"url": "https://a"}')
    else:
        assert len(coming) == 3
