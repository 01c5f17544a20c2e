"""The body of a request: read under limits on bytes, text and slowness, files to disk at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Iterator
from email.message import Message
from typing import Any

from fastapi import Request
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from vllm_cosmos3.errors import cut
from vllm_cosmos3.server.http.api_errors import ApiError
from vllm_cosmos3.server.http.request_fields import (
    FormText,
    is_media,
    nested,
    parse_json,
    parse_urlencoded,
)
from vllm_cosmos3.server.options import Options

JSON, URLENCODED, MULTIPART = KINDS = (
    "application/json",
    "application/x-www-form-urlencoded",
    "multipart/form-data",
)
FILE_TYPES = (b"image/", b"video/", b"audio/", b"application/octet-stream")
MAX_TEXT = 4 * 2**20  # bytes that are no media: to read them holds all other requests up
MAX_COMMAS = 2**19  # in them, as long lists take longer than texts
LEAST_RATE = 1000  # bytes per second, on average after the first --upload-idle seconds
PIECE = 2**20  # bytes that are looked at in one go
TURNS = 5  # of the event loop, in which it reads what has come


async def read_body(
    request: Request, options: Options, kinds: tuple[str, ...] = KINDS
) -> dict[str, Any]:
    """The fields of a body of any of these content types, files as uploads on disk.

    Raises:
        ApiError: another content type, too many bytes, too much text, too slow, or malformed.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind not in kinds:
        shown = cut(repr(kind)) if kind else "missing"
        message = f"Content-Type is {shown}, must be {' or '.join(kinds)}"
        raise ApiError("unsupported_media_type", message, headers={"Accept-Post": ", ".join(kinds)})
    stream = limited(request, options)
    if kind == MULTIPART:
        return await _multipart(request, stream, options)
    text, chunks = Text(media=kind == JSON), []
    async for chunk in stream:
        text.add(chunk)
        chunks.append(chunk)
    return await asyncio.to_thread(
        parse_json if kind == JSON else parse_urlencoded, b"".join(chunks)
    )


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
    received, start = 0, time.monotonic()
    chunks = request.stream()
    while True:
        idle = options.upload_idle
        average = start + idle + received / LEAST_RATE - time.monotonic()
        chunk = await _within(min(idle, average), anext(chunks, b""))
        if chunk is None and average < idle:
            seconds = time.monotonic() - start
            raise _too_slow(f"{received} bytes of the body came in {seconds:.0f} seconds")
        if chunk is None:
            raise _too_slow(f"no byte of the body came for {idle:g} seconds")
        if not chunk:
            return
        received += len(chunk)
        if received > options.max_upload:
            raise too_large
        yield chunk


async def _within(seconds: float, coming: Awaitable[bytes]) -> bytes | None:
    """What comes within these seconds, None if nothing does.

    What has come meanwhile counts, though this process was too busy to read it: a client is not slow
    because the server is.
    """
    task = asyncio.ensure_future(coming)
    try:
        await asyncio.wait({task}, timeout=seconds)
        for _ in range(TURNS):
            if not task.done():
                await asyncio.sleep(0)
        return task.result() if task.done() else None
    finally:
        task.cancel()


def _too_slow(message: str) -> ApiError:
    return ApiError("request_timeout", message, headers={"Connection": "close"})


class Text:
    """Counts the bytes of a body that are no media: all but what data URLs in JSON hold.

    A data URL ends at the next quotation mark. Each backslash in it counts: it takes time to read.
    """

    OPENING = b'"data:'

    def __init__(self, *, media: bool = True) -> None:
        self._media = media
        self.size = self.commas = 0
        self._inside = False
        self._end = b""  # of the last chunk, where an opening may have begun

    def add(self, chunk: bytes) -> None:
        """Count the next bytes.

        Raises:
            ApiError: they are too many.
        """
        if self._media:
            self._count(chunk)
        else:
            self.size, self.commas = self.size + len(chunk), self.commas + chunk.count(b",")
        if self.size > MAX_TEXT or self.commas > MAX_COMMAS:
            message = (
                f"the body has more than {MAX_TEXT} bytes of text or {MAX_COMMAS} commas; send media "
                "as files of a multipart form, or as data URLs in JSON"
            )
            raise ApiError("payload_too_large", message, headers={"Connection": "close"})

    def _count(self, chunk: bytes) -> None:
        data = self._end + chunk
        self.size -= len(self._end)  # counted before
        self.commas -= self._end.count(b",")
        at = since = 0
        while at < len(data):
            mark = b'"' if self._inside else self.OPENING
            found = data.find(mark, at)
            stop = len(data) if found < 0 else found + len(mark)
            if self._inside:
                self.size += data.count(b"\\", at, stop)
            else:
                self.size += stop - at
                self.commas += data.count(b",", at, stop)
            if found >= 0:
                self._inside, since = not self._inside, stop
            at = stop
        self._end = b"" if self._inside else data[max(at - len(self.OPENING) + 1, since) :]


class _Parser(MultiPartParser):
    """Knows whether it has seen the end, which a broken connection or a proxy may cut off.

    A part of a media type is a file, also where its sender gives it no file name.
    """

    complete = False

    def on_headers_finished(self) -> None:
        part = self._current_part
        kind = dict(part.item_headers).get(b"content-type", b"").strip().lower()
        place = part.content_disposition or b""
        if kind.startswith(FILE_TYPES) and b"filename" not in place:
            part.content_disposition = place + b'; filename=""'
        super().on_headers_finished()

    def on_end(self) -> None:
        self.complete = True


async def _multipart(
    request: Request, stream: AsyncGenerator[bytes, None], options: Options
) -> dict[str, Any]:
    head = Message()
    head["content-type"] = request.headers["content-type"]
    charset, boundary = head.get_content_charset("utf-8"), head.get_boundary()
    if charset not in ("utf-8", "utf8", "us-ascii"):
        message = f"the charset of the form is {cut(repr(charset))}, must be utf-8"
        raise ApiError("invalid_value", message)
    if not boundary:
        raise ApiError("invalid_value", "the Content-Type of the form has no boundary")
    # As latin-1 every byte is a character: what they mean is decided below.
    headers = Headers({"content-type": f'{MULTIPART}; boundary="{boundary}"; charset=latin-1'})

    async def whole() -> AsyncGenerator[bytes, None]:
        async for chunk in stream:
            yield chunk
        if not parser.complete:
            raise MultiPartException("it is incomplete, as its last boundary is missing")

    parser = _Parser(
        headers, whole(), max_files=8, max_fields=1000, max_part_size=options.max_upload
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise ApiError("invalid_value", f"the form cannot be read: {error.message}") from None
    try:
        return await asyncio.to_thread(_fields, form.multi_items())
    except ApiError:
        await form.close()
        raise


def _fields(items: list[tuple[str, UploadFile | str]]) -> dict[str, Any]:
    """The fields of a form that was read as latin-1."""
    text = Text()
    pairs: list[tuple[str, Any]] = []
    for name, value in items:
        text.add(name.encode("latin-1"))
        shown = _utf8(name, "the name of a field")
        if isinstance(value, UploadFile):
            if not value.filename and not value.size:
                value.file.close()
                continue  # a browser's, where nobody chose a file
            if is_media(shown):
                value.filename = (value.filename or "").encode("latin-1").decode(errors="replace")
                pairs.append((shown, value))
                continue
            # Text and JSON that came as a file part, as browsers send a Blob.
            value.file.seek(0)
            data = value.file.read(MAX_TEXT + 1)
            value.file.close()
        else:
            data = value.encode("latin-1")
        for piece in _pieces(b'"%s"' % data):
            text.add(piece)
        pairs.append((shown, FormText(_utf8(data.decode("latin-1"), cut(shown)))))
    return nested(pairs)


def _pieces(data: bytes) -> Iterator[bytes]:
    return (data[at : at + PIECE] for at in range(0, len(data), PIECE))


def _utf8(text: str, what: str) -> str:
    try:
        return text.encode("latin-1").decode()
    except UnicodeDecodeError as error:
        message = f"{what} is not UTF-8 at byte {error.start}; a file has a name or a media type"
        raise ApiError("invalid_value", message) from None
