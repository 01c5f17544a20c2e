"""Media that a chat request names and nobody can read are the client's mistake, not the server's.

vLLM answers an unreachable host or a missing file with status 500. This middleware is inside of the
place where that is decided: ``--middleware vllm_cosmos3.server.media_errors.MediaErrors``.
"""

from __future__ import annotations

import aiohttp
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PATHS = ("/v1/chat", "/v1/responses", "/v1/messages")  # whose requests carry media
UNREADABLE = (aiohttp.ClientError, TimeoutError, FileNotFoundError, IsADirectoryError, PermissionError)  # fmt: skip


class MediaErrors:
    """ASGI middleware of vLLM's app: 400, in vLLM's shape, where fetching media has failed."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(PATHS):
            await self._app(scope, receive, send)
            return
        started = False

        async def relay(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, relay)
        except UNREADABLE as error:
            if started:
                raise
            await _refusal(error)(scope, receive, send)


def _refusal(error: Exception) -> JSONResponse:
    cause = str(error) or "it took too long"
    message = f"a media URL of the request cannot be read: {cause}"
    body = {"message": message, "type": "BadRequestError", "param": None, "code": 400}
    return JSONResponse({"error": body}, 400)
