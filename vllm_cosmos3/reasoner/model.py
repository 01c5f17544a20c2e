"""The reasoner: vLLM's Qwen3-VL with the tensor names of a Cosmos 3 checkpoint.

The understanding tower lies in ``transformer/`` beside the generator, the vision encoder in
``vision_encoder/``. Layers, attention, parallelism and image processing are vLLM's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
)
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_cosmos3.compat import name_text_architecture, normalises_on_device
from vllm_cosmos3.reasoner.media.limits import uses_reference
from vllm_cosmos3.reasoner.media.normalisation import normalise_pixels
from vllm_cosmos3.reasoner.media.processing import ReasonerProcessingInfo, ReasonerProcessor
from vllm_cosmos3.reasoner.required_tensors import (
    GENERATOR,
    TEXT,
    VISION,
    expected_tensors,
    is_generator,
    only_expected,
)

logger = init_logger(f"vllm.{__name__}")


@MULTIMODAL_REGISTRY.register_processor(
    ReasonerProcessor, info=ReasonerProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class Cosmos3ReasonerForConditionalGeneration(Qwen3VLForConditionalGeneration):
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

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "model") -> None:
        config = vllm_config.model_config.hf_config
        name_text_architecture(config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        model = vllm_config.model_config
        sees = hasattr(self.visual, "patch_embed")  # not where the operator left the encoder out
        if sees and not uses_reference() and not normalises_on_device(model):
            normalise_pixels(self.visual.patch_embed, model.model, model.revision)
        # A checkpoint that is stored quantized has tensors of other names and shapes, which
        # vLLM's quantization method checks itself.
        self._stored_quantized = hasattr(config, "quantization_config")
        self._expected = expected_tensors(config.to_dict())

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the reasoner's tensors; CheckpointError names one that is missing or misshapen."""
        if self._stored_quantized:
            reasoner = (item for item in weights if not is_generator(item[0]))
            loaded: set[str] = super().load_weights(reasoner)
            return loaded
        parts = {TEXT: self.language_model, VISION: self.visual}  # the operator can leave one out
        built = {folder for folder, part in parts.items() if any(True for _ in part.parameters())}
        expected = {name: e for name, e in self._expected.items() if e.folder in built}
        unknown: list[str] = []
        loaded = super().load_weights(only_expected(weights, expected, unknown))
        unknown = [name for name in unknown if name not in self._expected]
        if unknown:
            logger.warning(
                "Ignored %d tensors that are not part of a Cosmos 3 reasoner: %s",
                len(unknown),
                ", ".join(unknown[:8]) + (", ..." if len(unknown) > 8 else ""),
            )
        return loaded
