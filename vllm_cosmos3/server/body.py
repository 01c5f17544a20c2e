"""The body of a request: read under a byte limit and a limit on silence, files to disk at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from vllm_cosmos3.server.errors import ApiError
from vllm_cosmos3.server.options import Options
from vllm_cosmos3.server.protocol import FormText, nested, parse_json, parse_urlencoded

KINDS = ("application/json", "application/x-www-form-urlencoded", "multipart/form-data")


async def read_body(
    request: Request, options: Options, kinds: tuple[str, ...] = KINDS
) -> dict[str, Any]:
    """The fields of a body of any of these content types, files as uploads on disk.

    Raises:
        ApiError: another content type, too many bytes, too slow, or malformed.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind not in kinds:
        shown = repr(kind) if kind else "missing"
        message = f"Content-Type is {shown}, must be {' or '.join(kinds)}"
        raise ApiError("unsupported_media_type", message, headers={"Accept-Post": ", ".join(kinds)})
    stream = limited(request, options)
    if kind == "multipart/form-data":
        return await _multipart(request, stream, options)
    data = b"".join([chunk async for chunk in stream])
    parse = parse_json if kind == "application/json" else parse_urlencoded
    return await asyncio.to_thread(parse, data)


async def limited(request: Request, options: Options) -> AsyncGenerator[bytes, None]:
    """The chunks of a body, until they are too many or too slow."""
    too_large = ApiError(
        "payload_too_large",
        f"the body has more than {options.max_upload} bytes, the limit of this server",
        headers={"Connection": "close"},
    )
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > options.max_upload:
        raise too_large
    received = 0
    chunks = request.stream()
    while True:
        try:
            chunk = await asyncio.wait_for(anext(chunks), options.upload_idle)
        except StopAsyncIteration:
            return
        except asyncio.TimeoutError:
            message = f"no byte of the body came for {options.upload_idle:g} seconds"
            raise ApiError("request_timeout", message, headers={"Connection": "close"}) from None
        received += len(chunk)
        if received > options.max_upload:
            raise too_large
        yield chunk


async def _multipart(
    request: Request, stream: AsyncGenerator[bytes, None], options: Options
) -> dict[str, Any]:
    parser = MultiPartParser(
        request.headers, stream, max_files=8, max_fields=1000, max_part_size=options.max_upload
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise ApiError("invalid_value", f"the form cannot be read: {error.message}") from None
    except KeyError:
        raise ApiError("invalid_value", "the Content-Type of the form has no boundary") from None
    return nested(
        [
            (name, value if isinstance(value, UploadFile) else FormText(value))
            for name, value in form.multi_items()
        ]
    )
