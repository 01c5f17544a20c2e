"""Video frames for the reasoner: all of them when the operator asks for all, within a cap.

``--media-io-kwargs '{"video": {"num_frames": -1}}'`` is documented to hand every frame to the
processor, which then samples at the request's ``fps``. vLLM's Qwen3-VL loader keeps two frames a
second whatever it is told. This one is chosen for our architecture only. Frames that nobody samples
are never decoded, where our processor samples them.
"""

from __future__ import annotations

import math
from io import BytesIO
from typing import Any

from PIL import Image
from vllm import envs
from vllm.multimodal.video import (
    VIDEO_LOADER_REGISTRY,
    Qwen3VLVideoBackend,
    VideoSourceMetadata,
    VideoTargetMetadata,
)

from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.media import DAMAGED
from vllm_cosmos3.reasoner.media.limits import max_video_frames, uses_reference
from vllm_cosmos3.reasoner.media.video_reader import (
    RECENT_SAMPLES,
    LazyFrames,
    VideoReader,
    unreadable,
)

NAME = "cosmos3"
FIELD = "media_io_kwargs.video"
ALL = -1  # number of frames, or rate, that stands for "every frame"
_EVENLY = -2  # rate that stands for "as many frames as asked for, evenly spaced"


@VIDEO_LOADER_REGISTRY.register(NAME)
class Cosmos3VideoBackend(Qwen3VLVideoBackend):
    """Decodes all frames for ``num_frames == -1`` without ``fps``, else as Qwen3-VL does.

    A clip with more frames than the cap is thinned evenly, and described to the processor as a
    clip of that many frames at the lower rate, so that every later rule holds without exception.
    """

    @classmethod
    def load_bytes(
        cls,
        data: bytes,
        num_frames: int = ALL,
        fps: float | None = None,
        *,
        evenly: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """Frames [T, H, W, 3] as uint8 and the metadata of transformers' video processors.

        ``evenly`` says that ``num_frames`` are wanted; vLLM has a number for those who want none.
        """
        cap = max_video_frames()
        kwargs.setdefault("max_frames", cap)
        for name, value in (("num_frames", num_frames), ("max_frames", kwargs["max_frames"])):
            if not _is_count(value) and (name, value) != ("num_frames", ALL):
                raise InvalidRequest(f"{FIELD}.{name}", value, "a whole number of at least 1")
        if fps is not None and not (_is_number(fps) and fps > 0):
            raise InvalidRequest(f"{FIELD}.fps", fps, "a number above 0")
        _refuse_still_image(data)
        kwargs["max_frames"] = min(kwargs["max_frames"], cap)
        take_all = fps is None and num_frames == ALL
        rate = ALL if take_all else _EVENLY if evenly else (2 if fps is None else fps)
        # An operator who names vLLM's decoder, or ours not at all, gets vLLM's way of reading.
        if kwargs.keys() & {"backend", "frame_recovery"}:
            frames, metadata = cls._read(data, num_frames, rate, **kwargs)
        else:
            reader = VideoReader(data, most_pixels=envs.VLLM_MAX_IMAGE_PIXELS)
            frames, metadata = cls._pick(reader, num_frames, rate, **kwargs)
            if uses_reference():
                frames, metadata = cls._reference(frames, metadata, num_frames, rate, **kwargs)
        if len(frames) == 0:
            raise unreadable(data, "no frame can be decoded")
        if take_all:
            metadata = _as_whole_clip(metadata, len(frames))
            _decode_ahead(frames, metadata)
        return frames, metadata

    @classmethod
    def _read(cls, data: bytes, num_frames: int, rate: float, **kwargs: Any) -> tuple[Any, Any]:
        """What ``load_bytes`` returns, read by vLLM."""
        try:
            frames, metadata = super().load_bytes(data, num_frames=num_frames, fps=rate, **kwargs)
        except ImportError as error:
            possible = f"the name of a decoder that is installed here ({error})"
            raise InvalidRequest(f"{FIELD}.backend", kwargs.get("backend"), possible) from None
        except ValueError as error:
            reason = str(error)
            if "backend" in reason:
                backend = kwargs.get("backend", "opencv")
                possible = f"one that there is and that takes the other options ({reason[:200]})"
                raise InvalidRequest(f"{FIELD}.backend", backend, possible) from None
            if reason.startswith("max() "):  # of no frames
                reason = "no frame can be decoded"
            raise unreadable(data, reason) from None
        return frames, metadata

    @classmethod
    def _reference(
        cls, ours: LazyFrames, metadata: dict[str, Any], num_frames: int, rate: float, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """The clip as vLLM reads it, but where frames or times are lost on the way."""
        frames, theirs = cls._read(ours.source.data, num_frames, rate, **kwargs)
        if len(frames) == len(ours) and math.isclose(theirs["fps"], metadata["fps"], rel_tol=1e-3):
            return frames, theirs
        return ours.pixels(), metadata

    @classmethod
    def _pick(
        cls, reader: VideoReader, num_frames: int, rate: float, **kwargs: Any
    ) -> tuple[Any, Any]:
        """What ``load_bytes`` returns, of a clip whose frames can be decoded one by one."""
        max_duration = kwargs.pop("max_duration", 300)  # not used by vLLM's rule for Qwen3-VL
        source = VideoSourceMetadata(len(reader), reader.fps, len(reader) / reader.fps)
        target = VideoTargetMetadata(num_frames, rate, max_duration)
        numbers = cls.compute_frames_index_to_sample(source, target, **kwargs)
        if rate != ALL:
            reader.decode_ahead(numbers)
        return LazyFrames.of(reader, numbers), cls.create_hf_metadata(source, numbers, "pyav")

    @classmethod
    def compute_frames_index_to_sample(cls, source: Any, target: Any, **kwargs: Any) -> list[int]:
        """Indices of the frames to decode, ascending."""
        if target.fps not in (ALL, _EVENLY):
            return list(super().compute_frames_index_to_sample(source, target, **kwargs))
        total = source.total_frames_num
        count = min(total, kwargs["max_frames"])
        if target.fps == _EVENLY:
            count = min(count, target.num_frames)
        return [round(i * (total - 1) / max(count - 1, 1)) for i in range(count)]


def _decode_ahead(frames: Any, metadata: dict[str, Any]) -> None:
    """Decode what will probably be sampled here, on one of many threads, not where others wait."""
    if isinstance(frames, LazyFrames):
        places = RECENT_SAMPLES.numbers(len(frames), metadata["fps"])
        frames.source.decode_ahead([frames.numbers[place] for place in places])


def _as_whole_clip(metadata: dict[str, Any], count: int) -> dict[str, Any]:
    """Metadata in which the decoded frames are the whole clip."""
    total = metadata["total_num_frames"]
    return metadata | {
        "total_num_frames": count,
        "fps": metadata["fps"] * count / total if total else metadata["fps"],
        "frames_indices": list(range(count)),
        "do_sample_frames": True,
    }


def _refuse_still_image(data: bytes) -> None:
    """OpenCV opens a picture as a video of one broken frame."""
    try:
        with Image.open(BytesIO(data)) as image:
            name, frames = image.format, getattr(image, "n_frames", 1)
    except Image.DecompressionBombError:
        name, frames = "large", 1
    except DAMAGED:
        return
    if frames == 1:
        raise InvalidRequest(
            "video_url", f"a {name} image", "a video; send images as content of type image_url"
        )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
