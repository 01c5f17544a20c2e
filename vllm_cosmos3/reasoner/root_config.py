"""The root ``config.json`` of a checkpoint folder that has none, put together from its parts.

A diffusers-style folder describes the same model in ``transformer/config.json``,
``vision_encoder/config.json`` and ``text_tokenizer/``. Imports no torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm_cosmos3.checkpoint.backbone import NEMOTRON, backbone_of
from vllm_cosmos3.checkpoint.config import read_json
from vllm_cosmos3.errors import CheckpointError

MODEL_TYPE, EDGE_MODEL_TYPE = "cosmos3_omni", "cosmos3_edge"
ARCHITECTURE = "Cosmos3ReasonerForConditionalGeneration"  # of the reasoner, in vLLM's registry
_SPECIAL = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
_TEXT_KEYS = (
    "attention_bias",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
)


def assemble(folder: Path) -> dict[str, Any]:
    """What the root ``config.json`` of the published checkpoints says, from the parts."""
    transformer = read_json(folder / "transformer" / "config.json")
    if backbone_of(transformer) is NEMOTRON:
        raise CheckpointError(
            f"config.json, which describes Edge's reasoner, is missing in {folder}"
        )
    vision = read_json(folder / "vision_encoder" / "config.json")
    absent = [key for key in _TEXT_KEYS if key not in transformer]
    if absent:
        raise CheckpointError(f"transformer/config.json in {folder} lacks the key '{absent[0]}'")
    ids = _token_ids(folder / "text_tokenizer" / "tokenizer.json")
    text = {key: transformer[key] for key in _TEXT_KEYS} | {
        "model_type": "qwen3_vl_text",
        "hidden_act": transformer.get("hidden_act", "silu"),  # older exports leave it out
        "max_position_embeddings": 262144,  # of Qwen3-VL; the folder does not say it
    }
    return {
        "model_type": MODEL_TYPE,
        "text_config": text,
        "vision_config": vision | {"model_type": "qwen3_vl_vision"},
        "tie_word_embeddings": False,
        "dtype": transformer.get("dtype", "bfloat16"),
        **{key: ids[token] for key, token in _SPECIAL.items()},
    }


def _token_ids(tokenizer: Path) -> dict[str, int]:
    """Ids of the added tokens of a fast tokenizer."""
    try:
        added = json.loads(tokenizer.read_text())["added_tokens"]
    except (OSError, ValueError, KeyError):
        raise CheckpointError(f"{tokenizer} is missing or unreadable") from None
    ids = {entry["content"]: entry["id"] for entry in added}
    absent = [token for token in _SPECIAL.values() if token not in ids]
    if absent:
        raise CheckpointError(f"{tokenizer} lacks the token {absent[0]}")
    return ids
