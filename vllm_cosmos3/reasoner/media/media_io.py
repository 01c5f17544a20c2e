"""Pictures and clips of a request out of the bytes of their files, within the media budget.

vLLM's own classes, but that every decoder's error becomes the client's, that grey of 16 bits is
scaled and not cut off, and that the memory is asked for before anything is decoded.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from io import BytesIO
from typing import Any
from urllib.parse import unquote

import numpy as np
import pybase64
from PIL import Image, ImageOps, UnidentifiedImageError
from vllm import envs
from vllm.multimodal.media import ImageMediaIO, MediaWithBytes, VideoMediaIO

from vllm_cosmos3.compat import clips_keep_files, image_formats
from vllm_cosmos3.errors import Cosmos3Error, InvalidRequest
from vllm_cosmos3.media_budget import Lease, media_budget
from vllm_cosmos3.reasoner.media.limits import max_video_frames
from vllm_cosmos3.reasoner.media.video_loader import ALL
from vllm_cosmos3.reasoner.media.video_loader import NAME as LOADER

IMAGE, VIDEO = "image_url", "video_url"  # the parts of a message
AN_IMAGE = "a complete image, such as PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF or HEIC"
HEIF = "HEIF"  # Pillow's name for HEIC, which vLLM does not read
JPEG_FRAMES = "video/jpeg"  # vLLM's way to send frames: JPEG files with commas between
KEPT, WORKING = 4, 12  # bytes a pixel, of Pillow's RGB and of what is made on the way to it
RAW_FRAMES = 8  # bytes a pixel of frames as pictures: both as such and stacked

_KEYS = {
    "image": ("image_mode", "rgba_background_color"),
    "video": (
        *("num_frames", "fps", "max_frames", "min_frames", "max_duration", "video_backend"),
        *("backend", "frame_recovery", "num_ffmpeg_threads", "seek_mode", "device"),
        *("hw_decoders", "pool_size", "timeout_sec"),
        *("frames_indices", "total_num_frames", "duration", "do_sample_frames"),
    ),
    "audio": (),
}


class RequestMedia:
    """The memory of all pictures of one request, reserved until the last of them is gone."""

    def __init__(self) -> None:
        self.lease: Lease = media_budget().lease()
        weakref.finalize(self, self.lease.release)


class PictureIO(ImageMediaIO):
    """A picture, RGB, upright, transparency laid over the background colour."""

    def __init__(self, request: RequestMedia, **options: Any) -> None:
        super().__init__(**options)
        self._request = request

    def load_bytes(self, data: bytes) -> Any:
        """The picture and its file.

        Raises:
            InvalidRequest: it is damaged, of no known format or too large.
            Busy: other requests hold the memory that it takes.
        """
        try:
            with Image.open(BytesIO(data), formats=_formats()) as image:
                pixels = image.width * image.height
                self._check(image.width, image.height)
                self._request.lease.reserve(pixels * KEPT, IMAGE)
                with self._request.lease.during(pixels * WORKING, IMAGE):
                    loaded = self._loaded(image, data) or super().load_bytes(data)
        except (Cosmos3Error, MemoryError):
            raise
        except Exception as error:  # noqa: BLE001  # whatever a decoder raises
            raise _damaged(IMAGE, data, AN_IMAGE, error) from None
        loaded.media.info["cosmos3"] = self._request  # reserved as long as it lives
        return loaded

    def load_base64(self, media_type: str, data: str) -> Any:
        return self.load_bytes(decoded_base64(IMAGE, data))

    @staticmethod
    def _check(width: int, height: int) -> None:
        most = envs.VLLM_MAX_IMAGE_PIXELS
        if 0 < most < width * height:
            raise InvalidRequest(IMAGE, f"a picture of {width}x{height}", f"at most {most} pixels")

    def _loaded(self, image: Image.Image, data: bytes) -> Any:
        """HEIC, and grey of more than 8 bits, which Pillow would cut off at 255; None for others."""
        if image.format == HEIF:
            image.load()
            return MediaWithBytes(self._convert_image_mode(image), data)
        if image.mode == "F":
            raise InvalidRequest(
                IMAGE,
                "a picture of floating-point levels",
                "one of 8 or 16 bits, whose range is known",
            )
        if not image.mode.startswith("I"):
            return None
        levels = np.asarray(ImageOps.exif_transpose(image)).astype(np.float32) / 257
        grey = Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
        return MediaWithBytes(grey.convert("RGB"), data)


def _formats() -> tuple[str, ...] | None:
    """Pillow's formats that are read; None where vLLM does not choose."""
    formats = image_formats()
    return None if formats is None else (*formats, HEIF)


class ClipIO(VideoMediaIO):
    """A clip, read by our loader, or its frames as JPEG files."""

    def __init__(self, pictures: PictureIO, request: RequestMedia, **options: Any) -> None:
        self._evenly = options.get("num_frames", ALL) != ALL and options.get("fps") is None
        super().__init__(pictures, **{**options, "video_backend": LOADER})
        self._request = request

    def load_bytes(self, data: bytes) -> Any:
        """The frames with their metadata, and the file.

        Raises:
            InvalidRequest: it is damaged, no video or too large.
            Busy: other requests hold the memory that it takes.
        """
        options = {**self.kwargs, "evenly": True} if self._evenly else self.kwargs
        try:
            found = self.video_loader.load_bytes(data, num_frames=self.num_frames, **options)
        except (Cosmos3Error, MemoryError):
            raise
        except Exception as error:  # noqa: BLE001  # whatever a decoder raises
            raise _damaged(VIDEO, data, "a video", error) from None
        return MediaWithBytes(found, data) if clips_keep_files() else found

    def load_base64(self, media_type: str, data: str) -> Any:
        if media_type.lower() != JPEG_FRAMES:
            return self.load_bytes(decoded_base64(VIDEO, data))
        count, most = data.count(",") + 1, max_video_frames()
        if count > most:
            raise InvalidRequest(VIDEO, f"{count} pictures", f"at most {most}")
        try:
            first = Image.open(BytesIO(pybase64.b64decode(data.partition(",")[0])))
            size = count * first.width * first.height * RAW_FRAMES
            self._request.lease.reserve(size, VIDEO)
            frames = super().load_base64(media_type, data)
        except InvalidRequest as error:
            raise InvalidRequest(VIDEO, error.value, error.possible, error.code) from None
        except Exception as error:  # noqa: BLE001  # whatever a decoder raises
            raise _damaged(VIDEO, data.encode(), "JPEG pictures of one size", error) from None
        pixels, metadata = frames.media if clips_keep_files() else frames
        kept = pixels.view(_Frames)
        kept.request = self._request
        found = kept, metadata
        return MediaWithBytes(found, frames.original_bytes) if clips_keep_files() else found


class _Frames(np.ndarray[Any, Any]):
    """An array that keeps its request's memory reserved."""

    request: RequestMedia


def check_media_options(options: Mapping[str, Any]) -> None:
    """InvalidRequest unless every key of ``media_io_kwargs`` is one that is followed."""
    for modality, values in options.items():
        field = f"media_io_kwargs.{modality}"
        if modality not in _KEYS:
            raise InvalidRequest("a key of media_io_kwargs", modality, "image or video")
        if not isinstance(values, Mapping):
            raise InvalidRequest(field, values, "an object")
        for name in values:
            if name not in _KEYS[modality]:
                possible = f"one of {', '.join(_KEYS[modality][:6])}"
                raise InvalidRequest(f"a key of {field}", name, possible)
    image, video = options.get("image", {}), options.get("video", {})
    if image.get("image_mode", "RGB") != "RGB":
        raise InvalidRequest("media_io_kwargs.image.image_mode", image["image_mode"], "'RGB'")
    named = video.get("video_backend", LOADER)
    if named != LOADER:
        possible = f"left out: this server reads videos with the loader {LOADER!r} alone"
        field = "media_io_kwargs.video.video_backend"
        raise InvalidRequest(field, "null" if named is None else named, possible)


def decoded_base64(field: str, text: str) -> bytes:
    """The bytes of a data URL's base64, line breaks and percent signs included."""
    try:
        try:
            return pybase64.b64decode(text, validate=True)
        except ValueError:
            joined = "".join(unquote(text).split())
            return pybase64.b64decode(joined + "=" * (-len(joined) % 4), validate=True)
    except ValueError as error:
        raise InvalidRequest(field, f"{len(text)} characters", f"base64 ({error})") from None


def _damaged(field: str, data: bytes, possible: str, error: BaseException) -> InvalidRequest:
    if isinstance(error, UnidentifiedImageError):
        reason = "it is of no such format"
    else:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:150]
    return InvalidRequest(field, f"a file of {len(data)} bytes", f"{possible} ({reason})")
