"""Images and video of a request, checked before a processor of Qwen3-VL sees them.

Stock vLLM answers a bad value with kilobytes of pixels, or does not notice it. Here every value is
checked once, and the answer names the field, the value and what is possible. The pixels then go
through ``patches``, or through transformers' own processor where the operator wants that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vllm.model_executor.models.qwen3_vl import Qwen3VLMultiModalProcessor, Qwen3VLProcessingInfo
from vllm.multimodal.parse import ImageProcessorItems

from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.models.limits import max_video_fps, max_video_frames, uses_reference
from vllm_cosmos3.models.patches import PatchingProcessor

_FIELD = "mm_processor_kwargs"
_SCOPES = ("images_kwargs", "videos_kwargs", "text_kwargs")
_COMMON = "fps, num_frames, do_sample_frames, min_pixels, max_pixels or size"
# These say what the vision encoder of the checkpoint is built for; another value ends the engine.
_BUILT_IN = {"patch_size", "temporal_patch_size", "merge_size"}
_MAX_ASPECT = 200  # of transformers' smart_resize
_MOST_ENLARGED = 2**24  # pixels; the published processors reduce what is larger


class ReasonerProcessingInfo(Qwen3VLProcessingInfo):
    """Qwen3-VL's, for whatever class the configuration of this checkpoint has."""

    def get_hf_config(self) -> Any:
        return self.ctx.get_hf_config()

    def get_hf_processor(self, **kwargs: object) -> Any:
        if uses_reference():
            return super().get_hf_processor(**kwargs)
        return self.ctx.get_hf_processor(PatchingProcessor, **kwargs)

    def known_kwargs(self) -> set[str]:
        """Names that the processors of this checkpoint take."""
        processor = self.get_hf_processor()
        parts = (processor.image_processor, processor.video_processor)
        names = (part.valid_kwargs.__annotations__ for part in parts)
        return set().union(*names, {"min_pixels", "max_pixels", "truncation", *_SCOPES}) - _BUILT_IN


class ReasonerProcessor(Qwen3VLMultiModalProcessor):
    """Qwen3-VL's, with the input checked first."""

    def apply(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Process one request; ValueError (HTTP 400) is one short sentence."""
        options = inputs.hf_processor_mm_kwargs
        if options:
            check_options(options, self.info.known_kwargs())
        items = inputs.mm_data_items
        for index in range(items.get_count("image", strict=False)):
            images = items["image"]
            # They may also come as embeddings, or as the name under which vLLM still has them.
            if isinstance(images, ImageProcessorItems) and images.get(index) is not None:
                size = images.get_image_size(index)
                check_aspect("image_url", size.width, size.height)
        for index in range(items.get_count("video", strict=False)):
            check_video(items["video"].get(index), options)
        try:
            return super().apply(inputs, *args, **kwargs)
        except ValueError as error:
            # vLLM's own message here is a dump of the pixels; its cause says what was wrong.
            if error.__cause__ is None or not str(error).startswith("Failed to apply"):
                raise
            reason = " ".join(str(error.__cause__).split())[:200]
            raise ValueError(f"The image or video cannot be processed: {reason}") from None


def check_options(options: Mapping[str, Any], known: set[str]) -> None:
    """InvalidRequest unless every option is known and its value possible."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        if name not in known:
            raise InvalidRequest(f"a key of {_FIELD}", name, f"one of {_COMMON}")
        if name in _SCOPES:
            if not isinstance(value, Mapping):
                raise InvalidRequest(f"{_FIELD}.{name}", value, "an object")
            check_options(value, known)
            flat |= value
        else:
            flat[name] = value
            if name in _RULES:
                _check_rule(f"{_FIELD}.{name}", value, *_RULES[name])
    if flat.get("fps") is not None and flat.get("num_frames") is not None:
        raise InvalidRequest(
            f"{_FIELD}.num_frames", flat["num_frames"], "left out where fps is set"
        )


def check_aspect(field: str, width: int, height: int) -> None:
    """InvalidRequest for pictures that are too narrow to be cut into patches."""
    if max(width, height) > _MAX_ASPECT * min(width, height):
        raise InvalidRequest(
            f"{field} size", f"{width}x{height}", f"at most {_MAX_ASPECT} times as long as wide"
        )


def check_video(video: Any, options: Mapping[str, Any]) -> None:
    """InvalidRequest where frames are asked for that the server has not decoded."""
    if not isinstance(video, tuple):  # frames without metadata, or embeddings: offline use
        return
    frames, metadata = video
    height, width = frames.shape[1:3]
    check_aspect("video_url size", width, height)
    options = {**options, **options.get("videos_kwargs", {})}
    wanted = {key: options.get(key) for key in ("fps", "num_frames", "do_sample_frames")}
    decoded, total = len(frames), metadata.get("total_num_frames", len(frames))
    if decoded < total and any(wanted.values()):
        name = next(key for key, value in wanted.items() if value)
        raise InvalidRequest(
            f"{_FIELD}.{name}",
            wanted[name],
            f"left out, because the server decoded {decoded} of {total} frames; it decodes all "
            """when started with --media-io-kwargs '{"video": {"num_frames": -1}}'""",
        )


def _check_rule(
    field: str, value: Any, accepts: Callable[[Any], bool], possible: Callable[[], str]
) -> None:
    several = value if isinstance(value, list) and value else [value]  # one for each video
    for item in several:
        if item is not None and not accepts(item):
            raise InvalidRequest(field, item, possible())


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _enlarged(value: Any) -> bool:
    return _count(value) and value <= _MOST_ENLARGED


def _size(value: Any) -> bool:
    """In spite of their names, transformers' numbers of pixels of a whole picture."""
    edges = {"shortest_edge", "longest_edge", "height", "width"}
    if not isinstance(value, Mapping) or not value.keys() <= edges:
        return False
    return all(map(_count, value.values())) and _enlarged(value.get("shortest_edge", 1))


_RULES: dict[str, tuple[Callable[[Any], bool], Callable[[], str]]] = {
    "fps": (
        lambda value: _number(value) and 0 < value <= max_video_fps(),
        lambda: f"a number above 0 and at most {max_video_fps():g}",
    ),
    "num_frames": (
        lambda value: _count(value) and value <= max_video_frames(),
        lambda: f"a whole number from 1 to {max_video_frames()}",
    ),
    "do_sample_frames": (lambda value: isinstance(value, bool), lambda: "true or false"),
    "min_pixels": (_enlarged, lambda: f"a whole number from 1 to {_MOST_ENLARGED}"),
    "max_pixels": (_count, lambda: "a whole number of at least 1"),
    "size": (
        _size,
        lambda: (
            "an object with shortest_edge and longest_edge in pixels, the first at most "
            f"{_MOST_ENLARGED}"
        ),
    ),
}
