"""What is set and checked once, in the front end, before vLLM starts its engine.

vLLM calls these two hooks for the architectures in its table. A broken checkpoint stops here, with
one sentence at the end of the output, instead of a traceback out of a worker.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from vllm_cosmos3.compat import has_edge_reasoner, has_serve_flag, missing_for_edge
from vllm_cosmos3.errors import InvalidRequest, Unsupported
from vllm_cosmos3.media_budget import media_budget
from vllm_cosmos3.reasoner.media.limits import (
    CONNECTOR,
    max_video_fps,
    max_video_frames,
    uses_reference,
)
from vllm_cosmos3.reasoner.required_tensors import TEXT, VISION, check_folder, expected_tensors
from vllm_cosmos3.reasoner.root_config import EDGE_MODEL_TYPE

logger = logging.getLogger("vllm.cosmos3")  # which vLLM shows

TRUST = "--trust-request-mm-kwargs"
VIDEO_LOADER = REASONING_PARSER = "cosmos3"
# Formats that read the safetensors files as they lie in the folder.
_PLAIN_FORMATS = {"auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer"}


def missing_flag(argv: Sequence[str]) -> str | None:
    """What to add to a stock ``vllm serve`` so that requests may choose how a video is sampled.

    None where nothing is missing, or where this vLLM has no such flag.
    """
    words = [word.split("=")[0].replace("_", "-") for word in argv]
    serves = Path(argv[0]).name == "vllm" and words[1:2] == ["serve"]
    if not serves or TRUST in words or not has_serve_flag(TRUST.removeprefix("--")):
        return None
    return (
        f"without {TRUST} requests that choose their own fps or num_frames in mm_processor_kwargs are "
        "answered with 400; add that flag, or start with vllm-cosmos3 serve, which does"
    )


class ReasonerStartup(VerifyAndUpdateConfig):
    """The hooks of our architecture."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Choose our connector and video loader for this model unless the operator named others."""
        if model_config.hf_config.model_type == EDGE_MODEL_TYPE:
            _fit_edge(model_config.multimodal_config)
        max_video_frames()  # a wrong limit should stop the start, not the first request
        max_video_fps()
        media_budget()
        uses_reference()
        if (advice := missing_flag(sys.argv)) is not None:
            logger.warning(advice)
        if (multimodal := model_config.multimodal_config) is not None:
            video = multimodal.media_io_kwargs.setdefault("video", {})
            if video.setdefault("video_backend", VIDEO_LOADER) == VIDEO_LOADER:
                os.environ.setdefault("VLLM_MEDIA_CONNECTOR", CONNECTOR)

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Check a local checkpoint; make a schema hold from the first token of an answer."""
        structured = vllm_config.structured_outputs_config
        if structured.reasoning_parser == REASONING_PARSER:
            # Whether an answer starts with <think> is not known before its first token, and a
            # schema that starts later would not hold.
            structured.enable_in_reasoning = True
        model = vllm_config.model_config
        folder = Path(model.model)
        stored_quantized = hasattr(model.hf_config, "quantization_config")
        if (
            vllm_config.load_config.load_format in _PLAIN_FORMATS
            and folder.is_dir()
            and not stored_quantized
        ):
            needed = _folders(model.multimodal_config)
            expected = expected_tensors(model.hf_config.to_dict())
            check_folder(folder, {n: e for n, e in expected.items() if e.folder in needed})


def _fit_edge(multimodal: Any) -> None:
    """Take back what vLLM has concluded from our class, which is Qwen3-VL's: Edge's model cannot do it."""
    if not has_edge_reasoner():
        raise Unsupported(
            "this vLLM has no model of Edge's reasoner, which 0.26 was the first to have; update it, or "
            "serve --surface generator"
        )
    if (missing := missing_for_edge()) is not None:
        raise Unsupported(
            f"vLLM {version('vllm')} cannot read media for Edge with transformers "
            f"{version('transformers')} ({missing}): take vLLM 0.28 or newer, or transformers 5.14.1 or "
            "older with 0.26, or serve --surface generator"
        )
    if getattr(multimodal, "video_pruning_rate", None):
        possible = "left out: Edge sees every frame whole"
        raise InvalidRequest("--video-pruning-rate", multimodal.video_pruning_rate, possible)
    if hasattr(multimodal, "mm_device_do_normalize"):
        multimodal.mm_device_do_normalize = False


def _folders(multimodal: Any) -> set[str]:
    """Folders that are read: the operator can leave out the vision encoder or the language model."""
    if multimodal is None:
        return {TEXT}
    if multimodal.mm_encoder_only:
        return {VISION}
    sees = any(multimodal.get_limit_per_prompt(kind) for kind in ("image", "video"))
    return {TEXT, VISION} if sees else {TEXT}
