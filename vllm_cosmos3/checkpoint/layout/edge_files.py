"""The JSON files of Cosmos3-Edge: Nemotron's language model, and SigLIP 2 with a projector.

The vision encoder has no file of its own: the root configuration describes it.
"""

from __future__ import annotations

from vllm_cosmos3.checkpoint.layout.sizes import Json, Size

SCHEDULER = "Cosmos3EdgeUniPCMultistepScheduler"  # a name that no release of diffusers has
_ROPE_THETA, _EPS = 100_000_000, 1e-5


def edge_files(
    size: Size, vocab_size: int, ids: dict[str, int], dtype: str, shared: dict[str, Json]
) -> dict[str, Json]:
    """Path in the checkpoint -> contents, as `files.published_files`; ``shared`` are those of Nano."""
    return {
        "config.json": _root(size, vocab_size, ids, dtype),
        "generation_config.json": _generation(ids),
        "preprocessor_config.json": _images(size),
        "video_preprocessor_config.json": _videos(size),
        "processor_config.json": {
            "image_processor": _images(size),
            "processor_class": "Cosmos3EdgeProcessor",
            "video_processor": _videos(size),
        },
        "model_index.json": _model_index(shared["model_index.json"]),
        "transformer/config.json": _transformer(size, shared["transformer/config.json"]),
        "vae/config.json": shared["vae/config.json"],
        "scheduler/scheduler_config.json": {
            **shared["scheduler/scheduler_config.json"],
            "_class_name": SCHEDULER,
            "flow_shift": 3.0,
            "use_karras_sigmas": False,
        },
    }


def _root(size: Size, vocab_size: int, ids: dict[str, int], dtype: str) -> Json:
    """The reasoner's configuration, vision encoder and projector included."""
    vision = {
        "attention_dropout": 0.0,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": size.vision_hidden,
        "intermediate_size": size.vision_intermediate,
        "layer_norm_eps": 1e-6,
        "model_type": "cosmos3_edge_vision",
        "num_attention_heads": size.vision_heads,
        "num_channels": 3,
        "num_hidden_layers": size.vision_depth,
        "num_patches": size.vision_positions,
        "patch_size": 16,
        "spatial_merge_size": 2,
    }
    text = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": ids["<s>"],
        "dtype": dtype,
        "eos_token_id": ids["<|im_end|>"],
        "head_dim": size.head_dim,
        "hidden_act": "relu2",
        "hidden_size": size.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": size.intermediate_size,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "cosmos3_edge_text",
        "num_attention_heads": size.heads,
        "num_hidden_layers": size.layers,
        "num_key_value_heads": size.kv_heads,
        "pad_token_id": ids["<unk>"],
        "rms_norm_eps": _EPS,
        "rope_parameters": {
            "mrope_section": list(size.rope_axes),
            "rope_theta": _ROPE_THETA,
            "rope_type": "default",
        },
        "use_cache": True,
        "vocab_size": vocab_size,
    }
    return {
        "allow_patterns_overrides": ["*/*.safetensors"],
        "architectures": ["Cosmos3EdgeForConditionalGeneration"],
        "dtype": dtype,
        "image_token_id": ids["<|image_pad|>"],
        "model_type": "cosmos3_edge",
        "projector_config": {
            "input_hidden_size": size.vision_hidden,
            "merger_intermediate_size": size.projector_hidden,
            "model_type": "cosmos3_edge_projector",
            "out_hidden_size": size.hidden_size,
            "spatial_merge_size": 2,
            "use_postshuffle_norm": False,
        },
        "projector_hidden_size": size.projector_hidden,
        "text_config": text,
        "tie_word_embeddings": False,
        "transformers_version": "5.0.0",
        "video_token_id": ids["<|video_pad|>"],
        "vision_config": vision,
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
    }


def _generation(ids: dict[str, int]) -> Json:
    return {
        "bos_token_id": ids["<s>"],
        "do_sample": True,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<unk>"],
        "temperature": 0.7,
        "top_p": 0.8,
        "transformers_version": "5.0.0",
    }


_PATCHES = {
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "merge_size": 2,
    "patch_size": 16,
    "processor_class": "Cosmos3EdgeProcessor",
}


def _images(size: Size) -> Json:
    smallest, largest = size.image_pixels
    return {
        "do_resize": True,
        "image_processor_type": "Cosmos3EdgeImageProcessor",
        "size": {"longest_edge": largest, "shortest_edge": smallest},
        **_PATCHES,
    }


def _videos(size: Size) -> Json:
    """Every frame is a picture of its own."""
    smallest, largest = size.video_pixels
    return {
        "return_metadata": True,
        "size": {"longest_edge": largest, "shortest_edge": smallest},
        "temporal_patch_size": 1,
        "video_processor_type": "Cosmos3EdgeVideoProcessor",
        **_PATCHES,
    }


def _model_index(usual: Json) -> Json:
    silent = {name: part for name, part in usual.items() if name != "sound_tokenizer"}
    return {
        **silent,
        "default_use_system_prompt": False,
        "native_flow_shift": 3.0,
        "scheduler": ["diffusers", SCHEDULER],
        "text_tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "use_native_flow_schedule": True,
    }


def _transformer(size: Size, usual: Json) -> Json:
    return {
        **usual,
        "backbone_type": "cosmos3_edge_nemotron_dense",
        "hidden_act": "relu2",
        "qk_norm_for_text": False,
        "rms_norm_eps": _EPS,
        "rope_scaling": {"mrope_section": list(size.rope_axes)},
        "rope_theta": _ROPE_THETA,
        "sound_dim": None,
        "sound_gen": False,
        "temporal_compression_factor": 4,
        "use_und_k_norm_for_gen": True,
    }
