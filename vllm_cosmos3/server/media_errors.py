"""Media that a request names and nobody can read are the client's mistake, not the server's.

vLLM answers an unreachable host or a missing file with status 500. This middleware is inside of the
place where that is decided: ``--middleware vllm_cosmos3.server.media_errors.MediaErrors``. Some
errors vLLM has made a reply of by then; those are known by their words.
"""

from __future__ import annotations

import json
import re
from typing import Any

import aiohttp
from fastapi.responses import JSONResponse
from PIL import Image
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_cosmos3.server.flat_urls import FlatUrls
from vllm_cosmos3.server.http.keys import path_of

PATHS = ("/v1/chat", "/v1/responses", "/v1/messages", "/tokenize")  # whose requests carry media
UNREADABLE = (
    aiohttp.ClientError,
    TimeoutError,
    FileNotFoundError,
    IsADirectoryError,
    PermissionError,
    Image.DecompressionBombError,
)
_URL = "a media URL of the request cannot be read"
_SAID = (  # what the errors of libraries say, and what is wrong then
    (r"Only base64 data URLs", _URL),
    (r"Extension class .* not found", "media_io_kwargs.video.video_backend must be a video loader"),
    (r"No module named 'torchcodec'", "media_io_kwargs.video.backend must be installed here"),
    (r"could be decompression bomb", _URL),
    (r"\[Errno \d+\] (No such file|Is a directory|Permission denied)", _URL),
    (r"Cannot load local files|must be a subpath of the allowed local media path", _URL),
    (r"Cannot connect to host|^\d{3}, message=", _URL),
)


class MediaErrors:
    """ASGI middleware of vLLM's app: 400, in vLLM's shape, where fetching media has failed.

    `FlatUrls` is part of it: vLLM warns of two middlewares.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = FlatUrls(app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not path_of(scope).startswith(PATHS):
            await self._app(scope, receive, send)
            return
        started = False
        failed: list[Message] = []  # a reply of status 500 or 501, until it is complete

        async def relay(message: Message) -> None:
            nonlocal started
            started = True
            if not failed and message.get("status") not in (500, 501):
                await send(message)
                return
            failed.append(message)
            if message["type"] != "http.response.body" or message.get("more_body"):
                return
            corrected = _corrected(b"".join(part.get("body", b"") for part in failed))
            if corrected is not None:
                await corrected(scope, receive, send)
                return
            for part in failed:
                await send(part)

        try:
            await self._app(scope, receive, relay)
        except Exception as error:
            wrong = _URL if isinstance(error, UNREADABLE) else _wrong(str(error))
            if started or wrong is None:
                raise
            message = f"{wrong}: {error if str(error) else 'it took too long'}"
            body = {"message": message, "type": "BadRequestError", "param": None, "code": 400}
            await JSONResponse({"error": body}, 400)(scope, receive, send)


def _wrong(said: str) -> str | None:
    """What is wrong with the request when an error says this, None if that is not known."""
    return next((wrong for pattern, wrong in _SAID if re.search(pattern, said)), None)


def _corrected(body: bytes) -> JSONResponse | None:
    """The same reply as the client's mistake, None if it is the server's."""
    try:
        reply: Any = json.loads(body)
        error = reply["error"]
        said = str(error["message"])
    except (ValueError, KeyError, TypeError):
        return None
    wrong = _wrong(said)
    if wrong is None:
        return None
    error |= {"message": f"{wrong}: {said}", "type": "BadRequestError"}
    if "code" in error:
        error["code"] = 400
    return JSONResponse(reply, 400)
