"""Media that nobody can read get status 400, whoever noticed; other failures stay what they are."""

from __future__ import annotations

import asyncio
import struct
import zlib
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from media_files import clip, data_url, picture, png
from vllm.entrypoints.anthropic.api_router import translate_error_response
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.multimodal.media import MediaConnector

from vllm_cosmos3.server.media_errors import MediaErrors


async def fetch(body: dict[str, Any]) -> str:
    connector = MediaConnector(body.get("media_io_kwargs"), allowed_local_media_path="/tmp")
    await getattr(connector, f"fetch_{body['kind']}_async")(body["url"])
    return "read"


def make_app() -> FastAPI:
    """vLLM's own fetching and its own ways to make replies of errors."""
    app = FastAPI()
    app.state.args = SimpleNamespace(log_error_stack=False)
    init_exception_handler(app)
    app.add_middleware(MediaErrors)

    @app.post("/v1/chat/completions")
    @app.post("/tokenize")
    async def chat(request: Request) -> str:
        return await fetch(await request.json())

    @app.post("/v1/messages")
    async def messages(request: Request) -> Any:
        try:
            return await fetch(await request.json())
        except Exception as error:  # noqa: BLE001  # as vLLM does
            return translate_error_response(create_error_response(error))

    @app.post("/v1/responses")
    async def streamed() -> StreamingResponse:
        return StreamingResponse(iter([b"one ", b"two"]), 500)

    return app


def post(path: str, root: str = "", **body: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(make_app(), raise_app_exceptions=False, root_path=root)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.post(f"{root}{path}", json=body)

    return asyncio.run(send())


def huge_png() -> bytes:
    """A picture whose header says 20000 x 20000, in a few bytes."""
    data = png(picture(8, 8))
    header = b"IHDR" + struct.pack(">II", 20000, 20000) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


BROKEN: dict[str, dict[str, Any]] = {
    "a huge header": {"kind": "image", "url": data_url(huge_png(), "image/png")},
    "not base64": {"kind": "video", "url": "data:video/mp4,abc"},
    "a missing file": {"kind": "image", "url": "file:///tmp/no-such-file.png"},
}


@pytest.mark.parametrize("root", ["", "/studio"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize", "/v1/messages"])
@pytest.mark.parametrize("name", BROKEN)
def test_unreadable_media_are_the_clients_mistake(path: str, name: str, root: str) -> None:
    reply = post(path, root, **BROKEN[name])
    assert reply.status_code == HTTPStatus.BAD_REQUEST
    error = reply.json()["error"]
    assert error["type"] == "BadRequestError"
    assert error.get("code", 400) == HTTPStatus.BAD_REQUEST
    assert error["message"].startswith("a media URL of the request cannot be read: ")


@pytest.mark.parametrize("name", ["nope", 7])
def test_loaders_that_are_not_there_are_named(name: object, tmp_path: Any) -> None:
    url = data_url(clip(tmp_path / "a.mp4", frames=2).read_bytes(), "video/mp4")
    body = {"kind": "video", "url": url, "media_io_kwargs": {"video": {"video_backend": name}}}
    reply = post("/v1/chat/completions", **body)
    assert reply.status_code == HTTPStatus.BAD_REQUEST
    message = reply.json()["error"]["message"]
    assert message.startswith("media_io_kwargs.video.video_backend must be a video loader: ")
    assert str(name) in message


def test_other_failures_stay_the_servers() -> None:
    for path in ("/v1/chat/completions", "/v1/messages"):
        reply = post(path, kind="no such kind", url="")
        assert reply.status_code == HTTPStatus.INTERNAL_SERVER_ERROR
        assert "fetch_no such kind" in reply.json()["error"]["message"]
    reply = post("/v1/responses")
    assert (reply.status_code, reply.text) == (HTTPStatus.INTERNAL_SERVER_ERROR, "one two")
