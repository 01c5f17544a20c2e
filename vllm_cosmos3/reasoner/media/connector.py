"""Media connector: fetches what the URLs of a request name, by the rules of this server.

vLLM's own fetches from any address, lets a request choose a way around the caps on video, and
answers what cannot be had with several statuses. It is chosen at the start for our architecture
(`VLLM_MEDIA_CONNECTOR=cosmos3`), unless the operator names another.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from vllm import envs
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector
from vllm.multimodal.media.connector import global_thread_pool

from vllm_cosmos3.compat import media_cache
from vllm_cosmos3.errors import Cosmos3Error, InvalidRequest
from vllm_cosmos3.fetching import (
    REDIRECTS,
    FetchError,
    FetchRule,
    fetch_bytes,
    private_media_allowed,
)
from vllm_cosmos3.media_budget import media_budget
from vllm_cosmos3.reasoner.media.limits import CONNECTOR
from vllm_cosmos3.reasoner.media.media_io import (
    IMAGE,
    VIDEO,
    ClipIO,
    PictureIO,
    RequestMedia,
    check_media_options,
)
from vllm_cosmos3.reasoner.media.replies import reply_of

# A parameter of the type may hold a comma, as in "data:video/mp4;codecs=avc1,mp4a;base64,".
_BASE64 = re.compile(r"data:([^,;]*)(?:;.*?)?;base64,", re.IGNORECASE)
AUDIO = "audio_url"
LONGEST_TYPE = 1000  # characters before the content of a data URL
_SCHEMES = "a URL of http, https, data or (where allowed) file"


@MEDIA_CONNECTOR_REGISTRY.register(CONNECTOR)
class Cosmos3Connector(MediaConnector):
    """Fetches and decodes the pictures and clips of one request."""

    def __init__(
        self, media_io_kwargs: dict[str, dict[str, Any]] | None = None, **options: Any
    ) -> None:
        check_media_options(media_io_kwargs or {})
        super().__init__(media_io_kwargs, **options)
        self._request = RequestMedia()
        self._rule = FetchRule(
            domains=tuple(self.allowed_media_domains),
            private=private_media_allowed(),
            redirects=REDIRECTS if envs.VLLM_MEDIA_URL_ALLOW_REDIRECTS else 0,
        )

    def fetch_image(self, image_url: str, **_: Any) -> Any:
        return self._load(IMAGE, image_url, self._pictures(), envs.VLLM_IMAGE_FETCH_TIMEOUT)

    async def fetch_image_async(self, image_url: str, **_: Any) -> Any:
        seconds = envs.VLLM_IMAGE_FETCH_TIMEOUT
        return await self._load_async(IMAGE, image_url, self._pictures(), seconds)

    def fetch_video(self, video_url: str, **_: Any) -> Any:
        return self._load(VIDEO, video_url, self._clips(), envs.VLLM_VIDEO_FETCH_TIMEOUT)

    async def fetch_video_async(self, video_url: str, **_: Any) -> Any:
        seconds = envs.VLLM_VIDEO_FETCH_TIMEOUT
        return await self._load_async(VIDEO, video_url, self._clips(), seconds)

    # What vLLM's other ways come to, such as sounds: no model here hears them, but they are fetched.

    def load_from_url(self, url: str, media_io: Any, *, fetch_timeout: int | None = None) -> Any:
        return self._load(AUDIO, url, media_io, fetch_timeout or envs.VLLM_AUDIO_FETCH_TIMEOUT)

    async def load_from_url_async(
        self, url: str, media_io: Any, *, fetch_timeout: int | None = None
    ) -> Any:
        seconds = fetch_timeout or envs.VLLM_AUDIO_FETCH_TIMEOUT
        return await self._load_async(AUDIO, url, media_io, seconds)

    def _pictures(self) -> PictureIO:
        return PictureIO(self._request, **self.media_io_kwargs.get("image", {}))

    def _clips(self) -> ClipIO:
        return ClipIO(self._pictures(), self._request, **self.media_io_kwargs.get("video", {}))

    def _load(self, field: str, url: str, media_io: Any, seconds: float) -> Any:
        with _refusing(field, url):
            if not _is_remote(url):
                return self._read(field, url, media_io)
            with ThreadPoolExecutor(1) as thread:  # the caller may run an event loop of its own
                data = thread.submit(asyncio.run, self._download(url, seconds)).result()
            return media_io.load_bytes(data)

    async def _load_async(self, field: str, url: str, media_io: Any, seconds: float) -> Any:
        loop = asyncio.get_running_loop()
        with _refusing(field, url):
            if not _is_remote(url):
                reading = partial(self._read, field, url, media_io)
                return await loop.run_in_executor(global_thread_pool, reading)
            data = await self._download(url, seconds)
            return await loop.run_in_executor(global_thread_pool, media_io.load_bytes, data)

    async def _download(self, url: str, seconds: float) -> bytes:
        """The content of a URL of http or https, out of vLLM's cache where the operator has one."""
        self._rule.check(url)
        cache = media_cache(self)
        data = await asyncio.to_thread(cache.get, url)
        if data is None:
            most = media_budget().per_request
            data = await fetch_bytes(url, self._rule, seconds=seconds, max_bytes=most)
            await asyncio.to_thread(cache.put, url, data)
        return data

    def _read(self, field: str, url: str, media_io: Any) -> Any:
        """What a data URL or a file of this server holds."""
        if url[:5].lower() == "data:":
            if found := _BASE64.match(url, 0, LONGEST_TYPE):
                return media_io.load_base64(found[1], url[found.end() :])
            _, comma, content = url.partition(",")
            if not comma:
                raise InvalidRequest(field, url, "a data URL with a comma before its content")
            return media_io.load_bytes(unquote_to_bytes(content))
        return media_io.load_bytes(self._allowed_file(field, url).read_bytes())

    def _allowed_file(self, field: str, url: str) -> Path:
        parts = urlsplit(url)
        if parts.scheme.lower() != "file":
            raise InvalidRequest(field, url, _SCHEMES)
        allowed = self.allowed_local_media_path
        if allowed is None:
            possible = "left out: this server was started without --allowed-local-media-path"
            raise InvalidRequest(field, url, possible)
        path = Path(unquote(parts.netloc + parts.path)).resolve()
        if allowed not in path.parents:
            raise InvalidRequest(field, url, "in the folder of --allowed-local-media-path")
        if not path.is_file():
            raise InvalidRequest(field, url, "a file that exists")
        return path


def _is_remote(url: str) -> bool:
    return url[:5].lower() not in ("data:", "file:") and url[:4].lower() == "http"


@contextmanager
def _refusing(field: str, url: str) -> Iterator[None]:
    """Whatever goes wrong with a URL is the client's mistake, but for a server that is too busy."""
    try:
        yield
    except FetchError as error:
        possible = f"a URL that this server can and may fetch ({error})"
        raise reply_of(InvalidRequest(field, url, possible, error.code)) from None
    except Cosmos3Error as error:
        raise reply_of(error) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise InvalidRequest(field, url, f"{_SCHEMES} that can be read ({reason})") from None
