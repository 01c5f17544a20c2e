"""The reasoner: vLLM's Qwen3-VL with the tensor names of a Cosmos 3 checkpoint, or Edge's model.

The understanding tower lies in ``transformer/`` beside the generator, the vision encoder in
``vision_encoder/``. Layers, attention, parallelism and image processing are vLLM's. One name in vLLM's
registry stands for both: the checkpoint chooses.
"""

from __future__ import annotations

import re
from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
)
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_cosmos3.compat import name_text_architecture, normalises_on_device
from vllm_cosmos3.reasoner.checked_weights import CheckedWeights
from vllm_cosmos3.reasoner.media.limits import uses_reference
from vllm_cosmos3.reasoner.media.normalisation import normalise_pixels
from vllm_cosmos3.reasoner.media.processing import ReasonerProcessingInfo
from vllm_cosmos3.reasoner.required_tensors import GENERATOR
from vllm_cosmos3.reasoner.root_config import EDGE_MODEL_TYPE
from vllm_cosmos3.reasoner.unquantized_vision import UnquantizedVision
from vllm_cosmos3.reasoner.vision_attention import rotate_in_place


def _info(context: Any) -> Any:
    """What vLLM asks about the media of a checkpoint."""
    if context.get_hf_config().model_type == EDGE_MODEL_TYPE:
        from vllm_cosmos3.reasoner.edge import EdgeProcessingInfo

        return EdgeProcessingInfo(context)
    return ReasonerProcessingInfo(context)


def _processor(info: Any, *args: Any, **kwargs: Any) -> Any:
    return info.processor(info, *args, **kwargs)


@MULTIMODAL_REGISTRY.register_processor(
    _processor, info=_info, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class Cosmos3ReasonerForConditionalGeneration(
    CheckedWeights, UnquantizedVision, Qwen3VLForConditionalGeneration
):
    """Text, images and video in, text out."""

    # transformer/ and vision_encoder/, but not vae/ or sound_tokenizer/. A pattern that lists the
    # two would do on new vLLM only: up to 0.28 the first pattern that matches ends the search.
    allow_patterns_overrides = ["[tv]*er/*.safetensors"]  # noqa: RUF012  # vLLM's interface

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_regex={
            GENERATOR: None,
            re.compile(r"^(layers|embed_tokens|norm)\."): r"language_model.model.\1.",
            re.compile(r"^lm_head\."): "language_model.lm_head.",
            re.compile(
                r"^(blocks|merger|patch_embed|pos_embed|deepstack_merger_list)\."
            ): r"visual.\1.",
            # Adapters that were trained on the model of transformers have its names.
            re.compile(r"^model\.(language_model)\."): r"\1.model.",
            re.compile(r"^model\.(visual)\."): r"\1.",
        },
        orig_to_new_substr={
            ".to_q.": ".q_proj.",
            ".to_k.": ".k_proj.",
            ".to_v.": ".v_proj.",
            ".to_out.": ".o_proj.",
            ".norm_q.": ".q_norm.",
            ".norm_k.": ".k_norm.",
        },
    )

    def __new__(cls, *, vllm_config: VllmConfig, prefix: str = "model") -> Any:
        """The class for the checkpoint's backbone."""
        if vllm_config.model_config.hf_config.model_type == EDGE_MODEL_TYPE:
            from vllm_cosmos3.reasoner.edge import EdgeReasoner

            return EdgeReasoner(vllm_config=vllm_config, prefix=prefix)
        return super().__new__(cls)

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "model") -> None:
        config = vllm_config.model_config.hf_config
        name_text_architecture(config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        model = vllm_config.model_config
        if hasattr(self.visual, "patch_embed"):  # not where the operator left the encoder out
            rotate_in_place(self.visual)
            if not uses_reference() and not normalises_on_device(model):
                normalise_pixels(self.visual.patch_embed, model.model, model.revision)
        self.expect(config)
