"""Fetches the media of requests as vLLM does, and lets no request choose a way around the caps.

Where vLLM trusts requests with ``media_io_kwargs``, one may name any of vLLM's video loaders, which
decode as many frames as a clip has, or send its frames as pictures, which no loader sees. vLLM uses
this connector where the operator sets ``VLLM_MEDIA_CONNECTOR=cosmos3``.
"""

from __future__ import annotations

from typing import Any

from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector

from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.reasoner.media.limits import CONNECTOR, max_video_frames
from vllm_cosmos3.reasoner.media.video_loader import NAME as LOADER

_FIELD = "media_io_kwargs.video.video_backend"
_PICTURES = "data:video/jpeg"  # vLLM's way to send frames: JPEG files with commas between


@MEDIA_CONNECTOR_REGISTRY.register(CONNECTOR)
class CappedConnector(MediaConnector):
    """vLLM's, but videos are read by our loader and have at most the frames of the cap."""

    def __init__(
        self, media_io_kwargs: dict[str, dict[str, Any]] | None = None, **options: Any
    ) -> None:
        named = (media_io_kwargs or {}).get("video", {}).get("video_backend", LOADER)
        if named != LOADER:
            possible = f"left out: this server reads videos with the loader {LOADER!r} alone"
            raise InvalidRequest(_FIELD, "null" if named is None else named, possible)
        super().__init__(media_io_kwargs, **options)

    def fetch_video(self, video_url: str, **options: Any) -> Any:
        _check_pictures(video_url)
        return super().fetch_video(video_url, **options)

    async def fetch_video_async(self, video_url: str, **options: Any) -> Any:
        _check_pictures(video_url)
        return await super().fetch_video_async(video_url, **options)


def _check_pictures(video_url: str) -> None:
    if video_url[: len(_PICTURES)].lower() != _PICTURES:
        return
    count, most = video_url.count(","), max_video_frames()  # one comma ends the prefix
    if count > most:
        raise InvalidRequest("video_url", f"{count} pictures", f"at most {most}")
