"""Chat bodies with flat media URLs."""

from __future__ import annotations

import json

import pytest

from vllm_cosmos3.server.flat_urls import in_objects


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
