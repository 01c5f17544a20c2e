"""Images and video of a request, checked before a processor of Qwen3-VL sees them.

Stock vLLM answers a bad value with kilobytes of pixels, or does not notice it. Here every value is
checked once, and the answer names the field, the value and what is possible. The pixels then go
through ``patches``, or through transformers' own processor where the operator wants that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import Qwen3VLVideoProcessor
from transformers.image_utils import pil_torch_interpolation_mapping
from transformers.video_utils import VideoMetadata
from vllm.model_executor.models.qwen3_vl import Qwen3VLMultiModalProcessor, Qwen3VLProcessingInfo
from vllm.multimodal.parse import ImageProcessorItems

from vllm_cosmos3.errors import Cosmos3Error, InvalidRequest
from vllm_cosmos3.reasoner.media.limits import max_video_fps, max_video_frames, uses_reference
from vllm_cosmos3.reasoner.media.patches import PatchingProcessor
from vllm_cosmos3.reasoner.media.replies import reply_of
from vllm_cosmos3.reasoner.media.sent_items import SentItemsCache

_FIELD = "mm_processor_kwargs"
_SCOPES = {"image": "images_kwargs", "video": "videos_kwargs"}
_OF_EACH_CLIP = {"fps": float, "num_frames": int}  # may be lists of these: one for each clip
_BOUNDS = ("min_pixels", "max_pixels", "size")
_ENLARGING = ("min_pixels", "max_pixels", "size")
_MAX_ASPECT = 200  # of transformers' smart_resize
_MOST_ENLARGED = 2**24  # pixels; the published processors reduce what is larger


class ReasonerProcessingInfo(Qwen3VLProcessingInfo):
    """Qwen3-VL's, for whatever class the configuration of this checkpoint has."""

    @property
    def processor(self) -> type[ReasonerProcessor]:
        return ReasonerProcessor

    def get_hf_config(self) -> Any:
        return self.ctx.get_hf_config()

    def get_hf_processor(self, **kwargs: object) -> Any:
        if uses_reference():
            return super().get_hf_processor(**kwargs)
        return self.ctx.get_hf_processor(PatchingProcessor, **kwargs)


class ReasonerProcessor(Qwen3VLMultiModalProcessor):
    """Qwen3-VL's, with the input checked first."""

    def apply(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Process one request; ValueError (HTTP 400) is one short sentence."""
        if inputs.hf_processor_mm_kwargs:
            check_options(inputs.hf_processor_mm_kwargs)
            inputs.hf_processor_mm_kwargs = _with_lists(inputs.hf_processor_mm_kwargs)
        self._check_media(inputs.mm_data_items, inputs.hf_processor_mm_kwargs)
        holder = inputs if hasattr(inputs, "cache") else self  # up to vLLM 0.30
        holder.cache = SentItemsCache.around(holder.cache)
        try:
            return super().apply(inputs, *args, **kwargs)
        except Cosmos3Error as error:
            raise reply_of(error) from None
        except ValueError as error:
            if isinstance(error.__cause__, Cosmos3Error):
                raise reply_of(error.__cause__) from None
            # vLLM's own message here is a dump of the pixels; its cause says what was wrong.
            if error.__cause__ is None or not str(error).startswith("Failed to apply"):
                raise
            reason = " ".join(str(error.__cause__).split())[:200]
            raise ValueError(f"The image or video cannot be processed: {reason}") from None

    def _check_media(self, items: Any, mm_kwargs: Mapping[str, Any]) -> None:
        """InvalidRequest where pictures and clips cannot be what is asked, or become too many tokens."""
        merged = self.info.ctx.get_merged_mm_kwargs(mm_kwargs)
        processor = self.info.get_hf_processor()
        tokens = 0
        for index in range(items.get_count("image", strict=False)):
            images = items["image"]
            # They may also come as embeddings, or as the name under which vLLM still has them.
            if isinstance(images, ImageProcessorItems) and images.get(index) is not None:
                size = images.get_image_size(index)
                options = _options_of("image", merged)
                check_size("image_url", size.width, size.height, options, processor.image_processor)
                tokens += self._tokens_if_enlarged(mm_kwargs, options, size.width, size.height)
        clips = items.get_count("video", strict=False)
        for index in range(clips):
            video = items["video"].get(index)
            if not isinstance(video, tuple):  # frames without metadata, or embeddings: offline use
                continue
            options = _options_of("video", merged)
            for name in _OF_EACH_CLIP:
                if isinstance(options.get(name), list):
                    options[name] = _one_of_each(name, options[name], index, clips)
            frames, metadata = video
            height, width = frames.shape[1:3]
            check_size("video_url", width, height, options, processor.video_processor)
            count = check_frames(len(frames), metadata, options, processor.video_processor)
            tokens += self._tokens_if_enlarged(mm_kwargs, options, width, height, count)
        self._check_length(tokens, mm_kwargs)

    def _tokens_if_enlarged(
        self,
        mm_kwargs: Mapping[str, Any],
        options: Mapping[str, Any],
        width: int,
        height: int,
        count: int | None = None,
    ) -> int:
        """Tokens of a picture, or a clip of ``count`` frames, 0 if the request enlarges nothing."""
        if not options.get("do_resize", True):
            return self._tokens_as_they_are(width, height, count)
        if _enlarging_field(mm_kwargs) is None:
            return 0
        # Without their scopes, which older vLLM passes over here.
        bounds = {name: options[name] for name in _BOUNDS if options.get(name) is not None}
        size = {"image_width": width, "image_height": height, "mm_kwargs": bounds}
        processor = self.info.get_hf_processor()
        if count is None:
            return int(
                self.info.get_num_image_tokens(image_processor=processor.image_processor, **size)
            )
        return int(
            self.info.get_num_video_tokens(
                image_processor=processor.video_processor, num_frames=count, **size
            )
        )

    def _tokens_as_they_are(self, width: int, height: int, count: int | None) -> int:
        processor = self.info.get_hf_processor().video_processor
        side = processor.patch_size * processor.merge_size
        times = -(-(count or 1) // processor.temporal_patch_size)
        return int(times * (width // side) * (height // side))

    def _check_length(self, tokens: int, mm_kwargs: Mapping[str, Any]) -> None:
        """InvalidRequest where enlarging makes more tokens than the context holds.

        vLLM says so as well, of any request, but only when it has made all the pixels.
        """
        most = self.info.ctx.model_config.max_model_len
        kept = 1 - (self.info.ctx.get_mm_config().video_pruning_rate or 0)
        enlarging = _enlarging_field(mm_kwargs)
        if enlarging is not None and tokens * kept > most:
            raise InvalidRequest(
                *enlarging,
                f"smaller: the pictures and clips of this request become {tokens} tokens, "
                f"of which the context holds {most}",
            )


def check_options(options: Mapping[str, Any], scope: str | None = None) -> None:
    """InvalidRequest unless every option is known, of a possible value, and followed.

    ``scope`` is one of images_kwargs and videos_kwargs, where the options are those of one.
    """
    field = _FIELD if scope is None else f"{_FIELD}.{scope}"
    known = _RULES.keys() - (_OF_CLIPS if scope == _SCOPES["image"] else set())
    flat: dict[str, Any] = {}
    for name, value in options.items():
        if scope is None and name in _SCOPES.values():
            if not isinstance(value, Mapping):
                raise InvalidRequest(f"{field}.{name}", value, "an object")
            check_options(value, name)
            flat |= value
        elif name in known:
            _check_rule(field, name, value)
            flat[name] = value
        else:
            possible = f"one of {', '.join(option for option in _RULES if option in known)}"
            raise InvalidRequest(f"a key of {field}", name, possible)
    if flat.get("fps") is not None and flat.get("num_frames") is not None:
        raise InvalidRequest(f"{field}.num_frames", flat["num_frames"], "left out where fps is set")
    lowest, highest = flat.get("min_pixels"), flat.get("max_pixels")
    if lowest is not None and highest is not None and lowest > highest:
        raise InvalidRequest(f"{field}.min_pixels", lowest, f"at most max_pixels, {highest}")


def check_size(
    field: str, width: int, height: int, options: Mapping[str, Any], processor: Any
) -> None:
    """InvalidRequest for pictures that cannot be cut into the patches of ``processor``."""
    if max(width, height) > _MAX_ASPECT * min(width, height):
        raise InvalidRequest(
            f"{field} size", f"{width}x{height}", f"at most {_MAX_ASPECT} times as long as wide"
        )
    step = processor.patch_size * processor.merge_size
    if not options.get("do_resize", True) and (width % step or height % step):
        raise InvalidRequest(
            f"{field} size",
            f"{width}x{height}",
            f"multiples of {step} where {_FIELD}.do_resize is false",
        )


def check_frames(
    decoded: int, metadata: Mapping[str, Any], options: Mapping[str, Any], processor: Any
) -> int:
    """How many of the ``decoded`` frames of a clip are processed.

    InvalidRequest where frames are asked for that the server has not decoded or the clip does not
    have, or too few for the vision encoder.
    """
    wanted = {key: options.get(key) for key in ("fps", "num_frames", "do_sample_frames")}
    total, rate = metadata.get("total_num_frames", decoded), metadata.get("fps")
    if rate is not None and not rate > 0:
        raise InvalidRequest("media_io_kwargs.video.fps", rate, "a number above 0")
    if decoded < total and any(wanted.values()):
        name = next(key for key, value in wanted.items() if value)
        raise InvalidRequest(
            f"{_FIELD}.{name}",
            wanted[name],
            f"left out, because the server decoded {decoded} of {total} frames; it decodes all "
            """when started with --media-io-kwargs '{"video": {"num_frames": -1}}'""",
        )
    samples = wanted["do_sample_frames"]
    if not (metadata.get("do_sample_frames", False) if samples is None else samples):
        count = decoded
    elif wanted["num_frames"] is not None:
        count = wanted["num_frames"]
        _check_count(count, total, processor)
    else:
        described = VideoMetadata(total_num_frames=total, fps=rate)
        count = len(Qwen3VLVideoProcessor.sample_frames(processor, described, fps=wanted["fps"]))
    least = processor.temporal_patch_size
    if count < least and options.get("do_resize", True):
        raise InvalidRequest(
            "video_url", f"a clip of {count} frame", f"a clip of at least {least} frames"
        )
    return count


def _check_count(count: int, total: int, processor: Any) -> None:
    """InvalidRequest where vLLM, which clips ``count``, has times for other frames than are sampled.

    Frames go in groups, and only the number of groups matters.
    """
    most, least = min(total, processor.max_frames), min(total, processor.min_frames)
    clipped, group = min(max(count, least), most), processor.temporal_patch_size
    if -(-clipped // group) == -(-count // group):
        return
    if count < clipped:
        possible = f"at least {least} for this clip"
    elif most == total:
        possible = f"at most {most}, the frames of this clip"
    else:
        possible = f"at most {most}, which the checkpoint takes"
    raise InvalidRequest(f"{_FIELD}.num_frames", count, possible)


def _enlarging_field(mm_kwargs: Mapping[str, Any]) -> tuple[str, Any] | None:
    """The option that may make pictures larger, and its value."""
    for scope in (None, *_SCOPES.values()):
        field = _FIELD if scope is None else f"{_FIELD}.{scope}"
        options = mm_kwargs if scope is None else mm_kwargs.get(scope, {})
        for name in _ENLARGING:
            if options.get(name) is not None:
                return f"{field}.{name}", options[name]
        if options.get("do_resize") is False:
            return f"{field}.do_resize", False
    return None


def _options_of(modality: str, merged: Mapping[str, Any]) -> dict[str, Any]:
    """The options that hold for an image or video."""
    return {**merged, **merged.get(_SCOPES[modality], {})}


def _one_of_each(name: str, values: list[Any], index: int, clips: int) -> Any:
    if len(values) < clips:
        raise InvalidRequest(f"{_FIELD}.{name}", values, f"a list of {clips}, one for each clip")
    return values[index]


def _with_lists(options: Mapping[str, Any]) -> dict[str, Any]:
    """With lists of the type by which vLLM knows that they are one value for each clip."""
    changed = dict(options)
    for name, number in _OF_EACH_CLIP.items():
        if isinstance(changed.get(name), list):
            changed[name] = [number(value) for value in changed[name]]
    scope = _SCOPES["video"]
    if scope in changed:
        changed[scope] = _with_lists(changed[scope])
    return changed


def _check_rule(field: str, name: str, value: Any) -> None:
    accepts, possible = _RULES[name]
    several = value if name in _OF_EACH_CLIP and isinstance(value, list) and value else None
    if value is None and name in _MAY_BE_NULL:
        return
    for item in [value] if several is None else several:
        if not accepts(item):
            raise InvalidRequest(f"{field}.{name}", item, possible())


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _enlarged(value: Any) -> bool:
    return _count(value) and value <= _MOST_ENLARGED


def _size(value: Any) -> bool:
    """In spite of their names, transformers' numbers of pixels of a whole picture."""
    edges = {"shortest_edge", "longest_edge"}
    if not isinstance(value, Mapping) or not value.keys() <= edges:
        return False
    if not all(map(_count, value.values())) or not _enlarged(value.get("shortest_edge", 1)):
        return False
    return not value.keys() >= edges or value["shortest_edge"] <= value["longest_edge"]


_MAY_BE_NULL = {"fps", "num_frames", "size"}
_OF_CLIPS = {"fps", "num_frames", "do_sample_frames"}
_FILTERS = {int(number) for number in pil_torch_interpolation_mapping}
_TRUE_OR_FALSE = (lambda value: isinstance(value, bool)), (lambda: "true or false")
_RULES: dict[str, tuple[Callable[[Any], bool], Callable[[], str]]] = {
    "fps": (
        lambda value: _number(value) and 0 < value <= max_video_fps(),
        lambda: f"a number above 0 and at most {max_video_fps():g}",
    ),
    "num_frames": (
        lambda value: _count(value) and 2 <= value <= max_video_frames(),
        lambda: f"a whole number from 2 to {max_video_frames()}",
    ),
    "do_sample_frames": _TRUE_OR_FALSE,
    "min_pixels": (_enlarged, lambda: f"a whole number from 1 to {_MOST_ENLARGED}"),
    "max_pixels": (_count, lambda: "a whole number of at least 1"),
    "size": (
        _size,
        lambda: (
            "an object with shortest_edge and longest_edge in pixels, the first at most "
            f"{_MOST_ENLARGED} and the second"
        ),
    ),
    "do_resize": _TRUE_OR_FALSE,
    "resample": (
        lambda value: _number(value) and value in _FILTERS,
        lambda: f"one of {sorted(_FILTERS)}, Pillow's filters",
    ),
}
