"""Pictures and clips that a request brings along: uploads, data URLs, URLs and files of the server.

Each becomes a file in a folder that lives as long as the request is planned. URLs are fetched here
and not by vLLM's media connector, which holds a whole file in memory and follows redirects to any
address; its rules of allowed domains and local paths hold here too.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import ipaddress
import shutil
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import unquote_to_bytes, urljoin, urlsplit

import aiohttp
from PIL import Image
from starlette.datastructures import UploadFile
from yarl import URL

from vllm_cosmos3 import media
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.media import IMAGE_FORMATS
from vllm_cosmos3.request.controls import HINTS
from vllm_cosmos3.server.http.errors import ApiError
from vllm_cosmos3.server.http.request_fields import Asked
from vllm_cosmos3.server.options import Options

REDIRECTS = 4
URLS = ("image_url", "video_url", "url")  # of a reference that is an object
SHOWN = 100  # letters of a name or a URL in messages and records
FILE_FIELDS = {"action_path", "action_stats_path"}  # of the validator, which opens them by name
# Mapped, compatible and translated (NAT64) addresses.
ENDING_IN_IPV4 = [ipaddress.IPv6Network(n) for n in ("::ffff:0:0/96", "::/96", "64:ff9b::/96")]
SCHEMES = "an uploaded file, or a URL of http, https, data or (where allowed) file"


@asynccontextmanager
async def media_files(
    asked: Asked, options: Options
) -> AsyncIterator[tuple[dict[str, Path], dict[str, str]]]:
    """The references of a request as files, and as what they were given, by image, video and hint.

    Raises:
        InvalidRequest: not a file or URL, several of a kind, or not to be had.
        ApiError: an address or path that is not allowed, or too many bytes.
    """
    with TemporaryDirectory(prefix="cosmos3-input-") as folder:
        files: dict[str, Path] = {}
        names: dict[str, str] = {}
        for index, (name, value) in enumerate(asked.references.items()):
            file = Path(folder) / str(index)
            if name in HINTS:  # a clip, whatever is in it
                path = asked.paths.get(f"{name}.control", f"{name}.control")
                await _store(path, _as_url(_only(path, value)), file, options)
                files[name] = file
                continue
            path = asked.paths.get(name, name)
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


def _as_url(source: Any) -> Any:
    """A control may be named by its path alone."""
    bare = isinstance(source, str) and "://" not in source and source[:5].lower() != "data:"
    return f"file://{source}" if bare else source


async def _store(name: str, source: Any, file: Path, options: Options) -> None:
    if isinstance(source, UploadFile):
        await source.seek(0)
        with file.open("wb") as target:
            await asyncio.to_thread(shutil.copyfileobj, source.file, target)
        return
    if not isinstance(source, str):
        raise InvalidRequest(name, source, SCHEMES, "invalid_type")
    scheme = source.partition(":")[0].lower()
    if scheme == "data":
        await asyncio.to_thread(lambda: file.write_bytes(_data(name, source)))
    elif scheme == "file":
        await asyncio.to_thread(shutil.copyfile, allowed_path(name, source, options), file)
    elif scheme in ("http", "https"):
        await _fetch(name, source, file, options)
    else:
        raise InvalidRequest(name, source, SCHEMES)


def _data(name: str, url: str) -> bytes:
    header, comma, payload = url.partition(",")
    try:
        if not comma:
            raise ValueError("it has no comma")
        if header.endswith(";base64"):
            return base64.b64decode(payload, validate=True)
        return unquote_to_bytes(payload)
    except (ValueError, binascii.Error) as error:
        raise InvalidRequest(name, url, f"a complete data URL ({error})", "invalid_media") from None


def local_files(asked: Asked, options: Options) -> Asked:
    """The same request with its JSON files as absolute paths that this server may read.

    Raises:
        ApiError: one of them is not there.
    """
    paths = {
        name: str(allowed_path(asked.paths.get(name, name), asked.fields[name], options))
        for name in FILE_FIELDS & asked.fields.keys()
        if isinstance(asked.fields[name], str)
    }
    return replace(asked, fields={**asked.fields, **paths})


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
        path = (allowed / unquote_to_bytes(urlsplit(url).path).decode(errors="replace")).resolve()
    except ValueError:  # a zero byte, or half a bracket
        raise InvalidRequest(name, url, "a path", "invalid_media") from None
    if not path.is_relative_to(allowed):
        raise ApiError("path_not_allowed", f"{name} is outside the allowed folder", param=name)
    if not path.is_file():
        raise InvalidRequest(name, url, "a file that exists", "invalid_media")
    return path


async def _fetch(name: str, url: str, file: Path, options: Options) -> None:
    """Download ``url``, asking at every redirect whether its host is allowed."""
    timeout = aiohttp.ClientTimeout(total=options.fetch_seconds)
    connector = aiohttp.TCPConnector(resolver=_Resolver(options), force_close=True)
    try:
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            for _ in range(REDIRECTS + 1):
                _check_host(name, url, options)
                async with session.get(url, allow_redirects=False) as response:
                    if response.status in (301, 302, 303, 307, 308):
                        url = urljoin(url, response.headers.get("Location", ""))
                        continue
                    if response.status != 200:
                        reason = f"it answered {response.status}"
                        raise InvalidRequest(name, url, f"reachable ({reason})", "fetch_failed")
                    await _write(name, response, file, options)
                    return
        raise InvalidRequest(name, url, f"reachable in {REDIRECTS} redirects", "fetch_failed")
    except TimeoutError:
        possible = f"reachable in {options.fetch_seconds:g} seconds"
        raise InvalidRequest(name, url, possible, "fetch_failed") from None
    except NotPublic as error:
        raise _refused(name, str(error)) from None
    except (aiohttp.ClientError, OSError, ValueError) as error:
        if isinstance(error.__cause__, NotPublic):
            raise _refused(name, str(error.__cause__)) from None
        if isinstance(error, InvalidRequest):
            raise
        reason = type(error).__name__
        raise InvalidRequest(name, url, f"reachable ({reason})", "fetch_failed") from None


async def _write(name: str, response: aiohttp.ClientResponse, file: Path, options: Options) -> None:
    received = 0
    with file.open("wb") as target:
        async for chunk in response.content.iter_chunked(2**16):
            received += len(chunk)
            if received > options.max_upload:
                message = (
                    f"{name} has more than {options.max_upload} bytes, the limit of this server"
                )
                raise ApiError("payload_too_large", message, param=name)
            target.write(chunk)


class NotPublic(OSError):
    """A host is not on the internet. Says which."""


class _Resolver(aiohttp.ThreadedResolver):
    """Resolves names to public addresses only, at the moment of connecting."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self._private = options.allow_private_media

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[Any]:
        found: list[Any] = await super().resolve(host, port, family)
        for entry in found:
            if not self._private and not is_public(entry["host"]):
                raise NotPublic(f"{host} is not a public address")
        return found


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet, also when written inside an IPv6 address."""
    ip = ipaddress.ip_address(address.split("%")[0])
    addresses = [ip, *(_inside(ip) if ip.version == 6 else ())]
    return all(each.is_global and not each.is_multicast for each in addresses)


def _inside(ip: ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    """The IPv4 addresses that packets to ``ip`` may reach instead."""
    of_tunnels = [ip.sixtofour, *(ip.teredo or ())]
    found = [each for each in of_tunnels if each is not None]
    if any(ip in network for network in ENDING_IN_IPV4):
        found.append(ipaddress.IPv4Address(int(ip) & 0xFFFF_FFFF))
    return found


def _check_host(name: str, url: str, options: Options) -> None:
    """Refuse what the resolver does not see: other schemes, other domains, literal addresses.

    The URL is taken apart as the client does it, for which digits of any script are digits.
    """
    parts = URL(url)
    host = parts.host
    if parts.scheme not in ("http", "https") or not host:
        raise _refused(name, f"{parts.scheme}:// is not followed")
    domains = [domain.strip() for domain in options.allowed_media_domains.split(",") if domain]
    if domains and host not in domains:
        raise _refused(name, f"{host} is not one of {', '.join(domains)}")
    try:
        public = is_public(host)
    except ValueError:
        return  # a name
    if not public and not options.allow_private_media:
        raise _refused(name, f"{host} is not a public address")


def _refused(name: str, reason: str) -> ApiError:
    return ApiError("url_not_allowed", f"{name} may not be fetched: {reason}", param=name)


def _kind(name: str, shown: str, file: Path) -> str:
    """Whether a file is a picture or a clip, by what is in it."""
    if file.stat().st_size == 0:
        raise InvalidRequest(name, "empty", "a picture or a video", "invalid_media")
    try:
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            return "video" if _moves(image) else "image"
    except Image.DecompressionBombError:
        return "image"  # which the validator refuses with the limit
    except (OSError, ValueError, SyntaxError):
        pass
    try:
        next(media.frames_of(file, limit=1, field=name))
    except InvalidRequest as error:
        raise InvalidRequest(name, shown, error.possible, error.code) from None
    return "video"


def _moves(image: Image.Image) -> bool:
    """Whether there is a second frame. Counting all takes as long as there are many."""
    try:
        image.seek(1)
    except EOFError:
        return False
    return True
