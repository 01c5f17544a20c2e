"""The JSON files of a published Cosmos3 checkpoint, as data, for a given size and kind.

The numbers of Nano and Super are those of the released models; tiny has the same shape in every
respect but scale. Nothing is written here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from vllm_cosmos3.checkpoint.backbone import NEMOTRON
from vllm_cosmos3.checkpoint.kinds import KINDS
from vllm_cosmos3.checkpoint.layout.edge_files import edge_files
from vllm_cosmos3.checkpoint.layout.simulators import simulator
from vllm_cosmos3.checkpoint.layout.sizes import Json, Size

_IMAGE2VIDEO_FPS = 16  # at which positions count seconds in a distilled image-to-video checkpoint
_DISTILLED_SIGMAS = [1.0, 0.9375, 0.8333333333333334, 0.625]


def published_files(
    size: Size, kind: str, vocab_size: int, ids: dict[str, int], dtype: str
) -> dict[str, Json]:
    """Path in the checkpoint -> contents, without weights, indices and tokenizer files.

    ``ids`` maps the markup tokens to their ids, ``dtype`` is that of the transformer's tensors.
    """
    shared = {
        "model_index.json": _model_index(),
        "transformer/config.json": _transformer(size, vocab_size),
        "vae/config.json": _vae(size),
        "scheduler/scheduler_config.json": _scheduler(),
    }
    if KINDS[kind].backbone is NEMOTRON:
        files = edge_files(size, vocab_size, ids, dtype, shared)
    else:
        files = _qwen_files(size, vocab_size, ids, dtype, shared)
    return of_kind(files, kind)


def of_kind(files: dict[str, Json], kind: str) -> dict[str, Json]:
    """The files of a checkpoint that has the most modes, as those of one of another ``kind``."""
    return _CHANGED[kind](files) if kind in _CHANGED else files


def _qwen_files(
    size: Size, vocab_size: int, ids: dict[str, int], dtype: str, shared: dict[str, Json]
) -> dict[str, Json]:
    vision = _vision(size)
    return shared | {
        "config.json": _root(size, vocab_size, ids, dtype, vision),
        "generation_config.json": _generation(ids),
        "preprocessor_config.json": _preprocessor(size),
        "video_preprocessor_config.json": _video_preprocessor(size),
        "vision_encoder/config.json": {**vision, "dtype": dtype, "model_type": "qwen3_vl_vision"},
        "sound_tokenizer/config.json": _sound(size),
    }


def with_fp8(files: dict[str, Json], kind: str) -> dict[str, Json]:
    """The files of an FP8 revision: the quantization, and for video checkpoints its step policy."""
    dynamic = {"dynamic": False, "num_bits": 8, "type": "float"}
    groups = {"targets": ["Linear"], "weights": dynamic, "input_activations": dynamic}
    root: Json = {
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "quant_type": "FP8_FP8",
        "weight_only": False,
        "producer": {"name": "modelopt", "version": "0.43.0"},
        "config_groups": {"group_0": groups},
        "ignore": _UNQUANTIZED,
    }
    steps = {"count": 3, "mode": "a16"}
    policy = {
        "schema_version": 1,
        "type": "first_last_n",
        "index_space": "denoising_loop_iteration",
        "scope": ["transformer"],
        "default_mode": "native",
        "first_steps": steps,
        "last_steps": steps,
        "overlap": "a16",
        "reasoner": "a16",
    }
    runtime = {} if KINDS[kind].distilled else {"runtime": {"diffusion_step_policy": policy}}
    transformer = files["transformer/config.json"]
    return files | {
        "hf_quant_config.json": root,
        "transformer/config.json": {**transformer, "quantization_config": root | runtime},
    }


_UNQUANTIZED = [
    "proj_in", "proj_out", "time_embedder*", "audio_proj_in", "audio_proj_out", "action_proj_in",
    "action_proj_out", "lm_head", "model.visual*", "visual*",
]  # fmt: skip


def _policy(files: dict[str, Json]) -> dict[str, Json]:
    """A policy has the files of a base checkpoint and is told by its name. It makes no sound."""
    return _named("Cosmos3-Policy-DROID", _without_sound(files)) | {
        "transformer/config.json": {**files["transformer/config.json"], "sound_gen": False},
    }


def _named(name: str, files: dict[str, Json]) -> dict[str, Json]:
    """The files of a repository of this name."""
    return files | {"config.json": {**files["config.json"], "_name_or_path": name}}


def _sim_unified(files: dict[str, Json]) -> dict[str, Json]:
    return simulator(_without_sound(files), "sim-bimanual")


def _sim_camera(files: dict[str, Json]) -> dict[str, Json]:
    return simulator(_without_sound(files), "sim-bimanual-camera")


def _without_sound(files: dict[str, Json]) -> dict[str, Json]:
    kept = {name: json for name, json in files.items() if not name.startswith("sound_tokenizer/")}
    return kept | {
        "model_index.json": {**files["model_index.json"], "sound_tokenizer": [None, None]}
    }


def _distilled(files: dict[str, Json]) -> dict[str, Json]:
    """What a task checkpoint of four steps has instead. It makes neither sound nor actions."""
    adapters = {"action_gen": False, "sound_gen": False}
    files = _without_sound(files)
    root, pipeline = files["config.json"], files["model_index.json"]
    pipeline = {**pipeline, "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    # The modular index says where each component lies: for a local copy, in its own folder.
    components = {
        name: [*pipeline[name], {"subfolder": name, "type_hint": pipeline[name]}]
        for name in ("scheduler", "text_tokenizer", "transformer", "vae")
    }
    changed = {
        "config.json": {
            **root,
            "model": {**root["model"], "config": {**root["model"]["config"], **adapters}},
        },
        "transformer/config.json": {**files["transformer/config.json"], **adapters},
        "model_index.json": pipeline,
        "modular_model_index.json": {
            "_blocks_class_name": "Cosmos3DistilledBlocks",
            "_class_name": "Cosmos3DistilledModularPipeline",
            "_diffusers_version": "0.40.0.dev0",
            "distilled_sigmas": _DISTILLED_SIGMAS,
            "is_distilled": True,
            **components,
        },
        "scheduler/scheduler_config.json": {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "_diffusers_version": "0.40.0.dev0",
            "fixed_step_requires_explicit_sigmas": True,
            "fixed_step_sampler_config": {"sample_type": "sde", "t_list": _DISTILLED_SIGMAS},
            "num_train_timesteps": 1000,
            "shift": 1.0,
            "stochastic_sampling": True,
            "use_karras_sigmas": False,
        },
    }
    return files | changed


def _image2video(files: dict[str, Json]) -> dict[str, Json]:
    files = _distilled(files)
    transformer = {**files["transformer/config.json"], "base_fps": _IMAGE2VIDEO_FPS}
    return files | {"transformer/config.json": transformer}


_CHANGED: dict[str, Callable[[dict[str, Json]], dict[str, Json]]] = {
    "distilled-t2i": _distilled,
    "distilled-i2v": _image2video,
    "policy-droid": _policy,
    "text2image": partial(_named, "Cosmos3-Super-Text2Image"),
    "edge-policy-droid": partial(_named, "Cosmos3-Edge-Policy-DROID"),
    "sim-bimanual": _sim_unified,
    "sim-bimanual-camera": _sim_camera,
}


def _root(size: Size, vocab_size: int, ids: dict[str, int], dtype: str, vision: Json) -> Json:
    """The reasoner's configuration, which vLLM and transformers read."""
    text = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "dtype": dtype,
        "eos_token_id": ids["<|im_end|>"],
        "head_dim": size.head_dim,
        "hidden_act": "silu",
        "hidden_size": size.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": size.intermediate_size,
        "max_position_embeddings": 262144,
        "model_type": "qwen3_vl_text",
        "num_attention_heads": size.heads,
        "num_hidden_layers": size.layers,
        "num_key_value_heads": size.kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_scaling": _rope_scaling(size),
        "rope_theta": 5000000,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": vocab_size,
    }
    return {
        "allow_patterns_overrides": ["*/*.safetensors"],
        "architectures": ["Cosmos3ForConditionalGeneration"],
        "dtype": dtype,
        "image_token_id": ids["<|image_pad|>"],
        "model": {
            "_target": "omni_mot_model",
            "config": {"_type": "omni_mot_model_config", "action_gen": True, "sound_gen": True},
        },
        "model_type": "cosmos3_omni",
        "text_config": text,
        "tie_word_embeddings": False,
        "transformers_version": "4.57.1",
        "video_token_id": ids["<|video_pad|>"],
        "vision_config": {**vision, "model_type": "qwen3_vl"},
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
    }


def _rope_scaling(size: Size) -> Json:
    return {
        "mrope_interleaved": True,
        "mrope_section": list(size.rope_axes),
        "rope_type": "default",
    }


def _vision(size: Size) -> Json:
    return {
        "deepstack_visual_indexes": list(size.vision_deepstack),
        "depth": size.vision_depth,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": size.vision_hidden,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": size.vision_intermediate,
        "num_heads": size.vision_heads,
        "num_position_embeddings": size.vision_positions,
        "out_hidden_size": size.hidden_size,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }


def _generation(ids: dict[str, int]) -> Json:
    return {
        "bos_token_id": ids["<|endoftext|>"],
        "do_sample": True,
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
        "pad_token_id": ids["<|endoftext|>"],
        "repetition_penalty": 1.0,
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
        "transformers_version": "4.57.1",
    }


_PATCHES = {
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "merge_size": 2,
    "patch_size": 16,
    "processor_class": "Qwen3VLProcessor",
    "temporal_patch_size": 2,
}


def _preprocessor(size: Size) -> Json:
    smallest, largest = size.image_pixels
    return {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "size": {"longest_edge": largest, "shortest_edge": smallest},
        **_PATCHES,
    }


def _video_preprocessor(size: Size) -> Json:
    smallest, largest = size.video_pixels
    return {
        "size": {"longest_edge": largest, "shortest_edge": smallest},
        "video_processor_type": "Qwen3VLVideoProcessor",
        **_PATCHES,
    }


def _model_index() -> Json:
    """diffusers' table of components. With the checker on it demands a guardrail package."""
    return {
        "_class_name": "Cosmos3OmniPipeline",
        "_diffusers_version": "0.40.0.dev0",
        "default_use_system_prompt": True,
        "enable_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "sound_tokenizer": ["diffusers", "Cosmos3AVAEAudioTokenizer"],
        "text_tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "Cosmos3OmniTransformer"],
        "use_native_flow_schedule": False,
        "vae": ["diffusers", "AutoencoderKLWan"],
    }


def _transformer(size: Size, vocab_size: int) -> Json:
    return {
        "_class_name": "Cosmos3OmniTransformer",
        "_diffusers_version": "0.40.0.dev0",
        "action_dim": 64,
        "action_gen": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "base_fps": 24,
        "enable_fps_modulation": True,
        "head_dim": size.head_dim,
        "hidden_act": "silu",
        "hidden_size": size.hidden_size,
        "intermediate_size": size.intermediate_size,
        "latent_channel": 48,
        "latent_patch_size": 2,
        "num_attention_heads": size.heads,
        "num_embodiment_domains": 32,
        "num_hidden_layers": size.layers,
        "num_key_value_heads": size.kv_heads,
        "patch_latent_dim": 192,
        "qk_norm_for_text": True,
        "rms_norm_eps": 1e-6,
        "rope_axes_dim": list(size.rope_axes),
        "rope_scaling": _rope_scaling(size),
        "rope_theta": 5000000,
        "sound_dim": 64,
        "sound_gen": True,
        "sound_latent_fps": 25,
        "timestep_scale": 0.001,
        "unified_3d_mrope_reset_spatial_ids": True,
        "unified_3d_mrope_temporal_modality_margin": 15000,
        "use_und_k_norm_for_gen": False,
        "vocab_size": vocab_size,
    }


# Statistics of the 48 latent channels of the Wan 2.2 autoencoder.
# fmt: off
_LATENTS_MEAN = [
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
    -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
    -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
    -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
    0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
]
_LATENTS_STD = [
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
    0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
    0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
    0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
    0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
]
# fmt: on


def _vae(size: Size) -> Json:
    return {
        "_class_name": "AutoencoderKLWan",
        "_diffusers_version": "0.40.0.dev0",
        "attn_scales": [],
        "base_dim": size.vae_base,
        "decoder_base_dim": size.vae_decoder_base,
        "dim_mult": [1, 2, 4, 4],
        "dropout": 0.0,
        "in_channels": 12,
        "is_residual": True,
        "latents_mean": _LATENTS_MEAN,
        "latents_std": _LATENTS_STD,
        "num_res_blocks": 2,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
        "scale_factor_temporal": 4,
        "temperal_downsample": [False, True, True],  # as published
        "z_dim": 48,
    }


def _sound(size: Size) -> Json:
    return {
        "_class_name": "Cosmos3AVAEAudioTokenizer",
        "_diffusers_version": "0.40.0.dev0",
        "activation": "snakebeta",
        "anti_aliasing": False,
        "bottleneck_type": "vae",
        "causal": False,
        "dec_anti_aliasing": False,
        "dec_c_mults": [1, 2, 4, 8, 16],
        "dec_dim": size.sound_decoder_dim,
        "dec_final_tanh": False,
        "dec_out_channels": 2,
        "dec_strides": [2, 4, 5, 6, 8],
        "dec_type": "oobleck",
        "dec_use_nearest_upsample": False,
        "dec_use_snake": True,
        "dec_use_tanh_at_final": False,
        "enc_c_mults": [1, 2, 4],
        "enc_dim": size.sound_encoder_dim,
        "enc_hop_length": 16,
        "enc_identity_init": False,
        "enc_intermediate_dim": 4 * size.sound_encoder_dim,
        "enc_latent_dim": 128,
        "enc_n_fft": 64,
        "enc_num_blocks": 2,
        "enc_num_layers": 12,
        "enc_strides": [4, 5, 6],
        "enc_type": "spec_convnext",
        "enc_use_snake": True,
        "encoder_enabled": True,
        "hop_size": 1920,
        "input_channels": 1,
        "latent_mean": None,
        "latent_std": None,
        "model_type": "autoencoder_v2",
        "normalize_volume": True,
        "padding_mode": "zeros",
        "sampling_rate": 48000,
        "snake_logscale": True,
        "stereo": True,
        "use_cuda_kernel": False,
        "use_wav_as_input": True,
        "vocoder_input_dim": 64,
    }


def _scheduler() -> Json:
    """As published: a Karras schedule, which the native schedule of a request replaces."""
    return {
        "_class_name": "UniPCMultistepScheduler",
        "_diffusers_version": "0.40.0.dev0",
        "disable_corrector": [],
        "final_sigmas_type": "zero",
        "flow_shift": 1.0,
        "lower_order_final": True,
        "num_train_timesteps": 1000,
        "predict_x0": True,
        "prediction_type": "flow_prediction",
        "sigma_max": 200.0,
        "sigma_min": 0.147,
        "solver_order": 2,
        "solver_type": "bh2",
        "thresholding": False,
        "use_flow_sigmas": True,
        "use_karras_sigmas": True,
    }
