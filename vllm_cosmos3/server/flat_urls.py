"""Media URLs of chat as flat strings, as the README of Cosmos writes them, in OpenAI's shape.

``{"type": "video_url", "video_url": "https://..."}`` is refused by vLLM, which wants an object with
the URL. This middleware makes one; `MediaErrors` has it inside.
"""

from __future__ import annotations

import json
import re
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

PATHS = ("/v1/chat/completions", "/tokenize")
PARTS = ("video_url", "image_url", "audio_url")
_FLAT = re.compile(rb'"(?:video|image|audio)_url"\s*:\s*"(?!video_url|image_url|audio_url)')


class FlatUrls:
    """ASGI middleware of vLLM's app. A body without flat URLs passes through as it is."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].endswith(PATHS):
            await self._app(scope, receive, send)
            return
        # The length is that of the body as it came.
        headers = [pair for pair in scope["headers"] if pair[0] != b"content-length"]
        read = False

        async def whole() -> Message:
            nonlocal read
            if read:
                return await receive()
            read = True
            return await _rewritten(receive)

        await self._app({**scope, "headers": headers}, whole, send)


async def _rewritten(receive: Receive) -> Message:
    """The body in one message, read when it is asked for: whoever asks for keys is behind this."""
    chunks: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] != "http.request":  # the client has gone
            return message
        chunks.append(message.get("body", b""))
        if not message.get("more_body"):
            body = in_objects(b"".join(chunks))
            return {"type": "http.request", "body": body, "more_body": False}


def in_objects(body: bytes) -> bytes:
    """The JSON of a chat request with an object for each flat URL; anything else as it is."""
    if not _FLAT.search(body):
        return body
    try:
        request: Any = json.loads(body)
        parts = [
            part
            for message in request["messages"]
            if isinstance(message["content"], list)
            for part in message["content"]
            if isinstance(part, dict)
        ]
    except (ValueError, TypeError, KeyError, RecursionError):
        return body  # for vLLM to refuse
    for part in parts:
        for name in PARTS:
            if isinstance(part.get(name), str):
                part[name] = {"url": part[name]}
    return json.dumps(request).encode()
