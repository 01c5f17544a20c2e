"""Pictures, clips and sounds that a request brings along: uploads, data URLs, URLs and files of the server.

Each becomes a file in a folder that lives as long as the request is planned. URLs are fetched here
and not by vLLM's media connector, which holds a whole file in memory and follows redirects to any
address; its rules of allowed domains and local paths hold here too.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import errno
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from starlette.datastructures import UploadFile

from vllm_cosmos3 import media
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.fetching import FetchError, FetchRule, fetch
from vllm_cosmos3.request.controls import CONTROLS
from vllm_cosmos3.server.http.api_errors import ApiError
from vllm_cosmos3.server.http.request_fields import SOUND, ClientRequest
from vllm_cosmos3.server.options import Options

URLS = ("image_url", "video_url", "audio_url", "url")  # of a reference that is an object
SHOWN = 100  # characters of a name or a URL in messages and records
FILE_FIELDS = {"action_path", "action_stats_path"}  # of the validator, which opens them by name
SCHEMES = "an uploaded file, or a URL of http, https, data or (where allowed) file"


@asynccontextmanager
async def media_files(
    request: ClientRequest, options: Options, inputs: Path
) -> AsyncIterator[tuple[dict[str, Path], dict[str, str]]]:
    """The references of a request as files, and as what they were given, by image, video, sound_path and control.

    The files live in a folder below ``inputs`` until the block ends.

    Raises:
        InvalidRequest: not a file or URL, several of a kind, or not to be had.
        ApiError: an address or path that is not allowed, or too many bytes.
    """
    if not request.references:  # making and removing a folder would hold up the event loop
        yield {}, {}
        return
    with TemporaryDirectory(dir=inputs) as folder:
        files: dict[str, Path] = {}
        names: dict[str, str] = {}
        for index, (name, value) in enumerate(request.references.items()):
            file = Path(folder) / str(index)
            if name in CONTROLS:  # a clip, whatever is in it
                path = request.paths.get(f"{name}.control", f"{name}.control")
                await _store(path, _only(path, value), file, options, bare=True)
                files[name] = file
                continue
            path = request.paths.get(name, name)
            if name == SOUND:  # which is read when it is planned
                await _store(path, _only(path, value), file, options, bare=True)
                files[name] = file
                continue
            await _store(path, _only(path, value), file, options)
            kind = await asyncio.to_thread(_kind, path, called(value), file)
            if kind in files:
                raise InvalidRequest(path, "a second one", f"the only {kind}", "unsupported")
            files[kind], names[kind] = file, name
        yield files, names


def _only(name: str, value: Any) -> Any:
    """The upload or URL of a reference in any of its shapes."""
    if isinstance(value, list):
        if len(value) != 1:
            raise InvalidRequest(name, f"{len(value)} files", "one file", "unsupported")
        return _only(name, value[0])
    if not isinstance(value, Mapping):
        return value
    for key in URLS:
        if key in value:
            return _only(f"{name}.{key}", value[key])
    if "file_id" in value:
        possible = "left out: upload the file, or give its URL"
        raise InvalidRequest(f"{name}.file_id", value["file_id"], possible, "unsupported")
    raise InvalidRequest(name, list(value), "an object with image_url or video_url", "invalid_type")


def called(reference: Any) -> str:
    """What the user calls a file: the name of an upload, or the beginning of a URL."""
    if isinstance(reference, list):
        return called(reference[0])
    if isinstance(reference, Mapping):
        return called(next(reference[name] for name in URLS if name in reference))
    name = (
        reference.filename or "the upload" if isinstance(reference, UploadFile) else str(reference)
    )
    return name if len(name) <= SHOWN else f"{name[: SHOWN - 3]}..."


async def _store(
    name: str, source: Any, file: Path, options: Options, *, bare: bool = False
) -> None:
    """Write an upload, or what a URL leads to, to ``file``. A ``bare`` source may be a path alone."""
    if isinstance(source, UploadFile):
        await source.seek(0)
        with file.open("wb") as target:
            await asyncio.to_thread(shutil.copyfileobj, source.file, target)
        return
    if not isinstance(source, str):
        raise InvalidRequest(name, source, SCHEMES, "invalid_type")
    scheme = source.partition(":")[0].lower()
    if bare and "://" not in source and scheme != "data":
        scheme = "file"
    if scheme == "data":
        await asyncio.to_thread(lambda: file.write_bytes(_data(name, source)))
    elif scheme == "file":
        await asyncio.to_thread(_copy, name, source, allowed_path(name, source, options), file)
    elif scheme in ("http", "https"):
        await _fetch(name, source, file, options)
    else:
        raise InvalidRequest(name, source, SCHEMES)


def _copy(name: str, url: str, path: Path, file: Path) -> None:
    try:
        shutil.copyfile(path, file)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # of the storage
            raise
        raise _unreadable(name, url) from None


def _data(name: str, url: str) -> bytes:
    """The bytes of a data URL, read as browsers do: base64 may have line breaks and no padding."""
    header, comma, payload = url.partition(",")
    try:
        if not comma:
            raise ValueError("it has no comma")
        data = unquote_to_bytes(payload)
        if header.rstrip().lower().endswith(";base64"):
            data = b"".join(data.split()).rstrip(b"=")
            return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
        return data
    except (ValueError, binascii.Error) as error:
        raise InvalidRequest(name, url, f"a complete data URL ({error})", "invalid_media") from None


def local_files(request: ClientRequest, options: Options) -> ClientRequest:
    """The same request with its JSON files as absolute paths that this server may read.

    Raises:
        ApiError: one of them is not there.
    """
    paths = {
        name: str(allowed_path(request.paths.get(name, name), request.fields[name], options))
        for name in FILE_FIELDS & request.fields.keys()
        if isinstance(request.fields[name], str)
    }
    return replace(request, fields={**request.fields, **paths})


def allowed_path(name: str, url: str, options: Options) -> Path:
    """The file of a file:// URL or a path, inside the folder that the operator allowed.

    Raises:
        ApiError: it is not there.
    """
    if not options.allowed_local_media_path:
        message = (
            "this server reads no local files: it was started without --allowed-local-media-path"
        )
        raise ApiError("unsupported", f"{name}: {message}", param=name)
    allowed = Path(options.allowed_local_media_path).resolve()
    try:
        path = (allowed / _path_in(url)).resolve()
    except (ValueError, RuntimeError):  # a zero byte, half a bracket, or links in a circle
        raise InvalidRequest(name, url, "a path", "invalid_media") from None
    if not path.is_relative_to(allowed):
        raise ApiError("path_not_allowed", f"{name} is outside the allowed folder", param=name)
    try:
        exists = path.is_file()
    except OSError:  # its name is too long, or its folder somebody else's
        raise _unreadable(name, url) from None
    if not exists:
        raise InvalidRequest(name, url, "a file that exists", "invalid_media")
    return path


def _path_in(url: str) -> str:
    """The path of a file: URL; a text that is none is a path as it is."""
    return unquote(urlsplit(url).path) if url[:5].lower() == "file:" else url


def _unreadable(name: str, url: str) -> InvalidRequest:
    return InvalidRequest(name, url, "a file that can be read", "invalid_media")


async def _fetch(name: str, url: str, file: Path, options: Options) -> None:
    """Download a URL, with errors of the field ``name``."""
    domains = [domain.strip() for domain in options.allowed_media_domains.split(",") if domain]
    rule = FetchRule(domains=tuple(domains), private=options.allow_private_media)
    try:
        with file.open("wb") as target:
            await fetch(
                url,
                rule,
                target.write,
                seconds=options.fetch_seconds,
                max_bytes=options.max_upload,
            )
    except FetchError as error:
        if error.code == "fetch_failed":
            raise InvalidRequest(name, url, f"reachable ({error})", error.code) from None
        raise ApiError(error.code, f"{name} cannot be fetched: {error}", param=name) from None


def _kind(name: str, shown: str, file: Path) -> str:
    """Whether a file is a picture or a clip, by what is in it."""
    if file.stat().st_size == 0:
        raise InvalidRequest(name, "empty", "a picture or a video", "invalid_media")
    try:
        return "video" if media.is_clip(file, field=name) else "image"
    except InvalidRequest as error:
        raise InvalidRequest(name, shown, error.possible, error.code) from None
