"""The reasoner of Cosmos3-Edge: vLLM's own model of it, with every tensor checked and our rules for media.

Patches are made by vLLM's processor. In which order they reach the encoder is an agreement of those two,
by rows up to 0.32 and by squares of two in transformers, so a front end of ours would have to follow
each version. Which frames of a clip are decoded, and what a request may ask, is as for other checkpoints.
"""

from __future__ import annotations

from copy import copy
from functools import cache
from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.models.cosmos3_edge import (
    Cosmos3EdgeForConditionalGeneration,
    Cosmos3EdgeMultiModalProcessor,
    Cosmos3EdgeProcessingInfo,
)

from vllm_cosmos3.reasoner.checked_weights import CheckedWeights
from vllm_cosmos3.reasoner.media.limits import uses_reference
from vllm_cosmos3.reasoner.media.processing import ReasonerProcessor
from vllm_cosmos3.reasoner.media.video_reader import LazyFrames
from vllm_cosmos3.reasoner.unquantized_vision import UnquantizedVision


class EdgeReasoner(CheckedWeights, UnquantizedVision, Cosmos3EdgeForConditionalGeneration):
    """Text, images and video in, text out."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "model") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.expect(vllm_config.model_config.hf_config)


class EdgeProcessor(ReasonerProcessor, Cosmos3EdgeMultiModalProcessor):
    """vLLM's, with the input checked first."""


class EdgeProcessingInfo(Cosmos3EdgeProcessingInfo):
    """vLLM's, with clips whose frames are decoded when it is known which."""

    processor = EdgeProcessor

    def get_hf_processor(self, **kwargs: object) -> Any:
        found = super().get_hf_processor(**kwargs)
        if uses_reference():
            return found
        processor = copy(found)
        processor.video_processor = copy(found.video_processor)
        kind: Any = type(found.video_processor)
        processor.video_processor.__class__ = _decoding(kind)
        return processor


class _Decoding:
    """A mix-in of video processors: of the frames that were sampled, the pixels."""

    def _prepare_input_videos(self, videos: Any, *args: Any, **kwargs: Any) -> Any:
        pixels = [video.pixels() if isinstance(video, LazyFrames) else video for video in videos]
        prepare: Any = super()._prepare_input_videos  # type: ignore[misc]
        return prepare(pixels, *args, **kwargs)


@cache
def _decoding(processor: type) -> type:
    return type(processor.__name__, (_Decoding, processor), {})
