"""The JSON files of the published causal simulators, as far as they differ from those of Nano.

Of both exports of Sim-Bimanual: that for cameras alone, and the unified one for whole bodies.
"""

from __future__ import annotations

import hashlib
import json
import struct
from typing import Any

from vllm_cosmos3.checkpoint.simulators import BLOCK, CAMERA, RAW, UNIFIED, UNIFIED_WIDTH

Json = dict[str, Any]
ROWS_PER_FRAME, ACTION_DIM, DOMAINS = 4, 64, 32
_FIELDS = {  # of a unified row
    "ego_pose": 9, "right_wrist_pose": 9, "right_fingertips": 15, "right_gripper": 1,
    "left_wrist_pose": 9, "left_fingertips": 15, "left_gripper": 1,
}  # fmt: skip
_DOMAINS = {"agibotworld": 15, "agibot_gear_gripper": 15, CAMERA: 2, "hand_pose": 3}


def simulator(files: dict[str, Json], kind: str) -> dict[str, Json]:
    """The files of a base checkpoint without sound, as those of a simulator of this ``kind``."""
    camera = kind == "sim-bimanual-camera"
    sigmas = [1.0, 0.9375, 0.8333333333333334, 0.625] if camera else [1.0, 0.8333333333333334]
    sampler = {"sample_type": "sde", "t_list": sigmas}
    transformer = {**files["transformer/config.json"], "sound_gen": False}
    block = {
        "schema_version": 1,
        "checkpoint_id": "random",
        "checkpoint_iteration": 1,
        "checkpoint_hash": hashlib.sha256(kind.encode()).hexdigest(),
        "chunk_size": 4 if camera else 2,
        "window_frames": 96 if camera else None,
        "sink_frames": 0,
        "text_cache_max_len": 512,
        "attention_mode": "three_way",
        "video_temporal_causal": True,
        "latent_patch_size": transformer["latent_patch_size"],
        "vae_spatial_compression_factor": 16,
        "temporal_compression_factor": 4,
        "fixed_step_sampler_config": {**sampler, "num_train_timesteps": 1000},
        "temporal_modality_margin": transformer["unified_3d_mrope_temporal_modality_margin"],
        "unified_3d_mrope_reset_spatial_ids": True,
        "base_fps": transformer["base_fps"],
        "enable_fps_modulation": True,
        "conditioning": _raw_contract() if camera else _unified_contract(),
    }
    index = {
        **files["model_index.json"],
        "_class_name": "Cosmos3NanoSimBimanualPipeline",
        "default_use_system_prompt": False,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }
    return files | {
        "model_index.json": index,
        "transformer/config.json": {
            **transformer,
            "joint_attn_implementation": "three_way",
            "video_temporal_causal": True,
            BLOCK: block,
        },
        "scheduler/scheduler_config.json": {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "_diffusers_version": "0.40.0.dev0",
            "fixed_step_requires_explicit_sigmas": True,
            "fixed_step_sampler_config": sampler,
            "num_train_timesteps": 1000,
            "shift": 1.0,
            "stochastic_sampling": True,
            "use_karras_sigmas": False,
        },
    }


def _raw_contract() -> Json:
    """Rows of cameras in their own units: translations of a tenth are one of the model's."""
    transform = {
        "type": "affine",
        "offset": [0.0] * 9,
        "scale": [_float32(0.1)] * 3 + [1.0] * 6,
        "forward_clamp": False,
    }
    derivation = {"translation_scale": 10.0, "rotation_scale": 1.0}
    normalizer = {
        "schema_version": 1,
        "method": "pose_scale",
        "transform": transform,
        "derivation": derivation,
    }
    digest = _digest(normalizer)
    layout = {"id": CAMERA, "fields": [{"name": "pose", "offset": 0, "size": 9}]}
    body = {"domain_id": _DOMAINS[CAMERA], "raw_action_dim": 9, "layout": layout}
    contract = {
        "schema_version": RAW,
        **_common(CAMERA),
        "padding": {"stage": "after_normalization", "value": 0.0},
    }
    hashed = {**contract, "embodiments": {CAMERA: {**body, "normalizer_sha256": digest}}}
    written = {CAMERA: {**body, "normalizer": {**normalizer, "transform_sha256": digest}}}
    return {
        "mode": "action",
        **contract,
        "embodiments": written,
        "contract_sha256": _digest(hashed),
    }


def _unified_contract() -> Json:
    """Rows of every body in one layout, normalised by whoever sends them."""
    offsets = [sum(list(_FIELDS.values())[:place]) for place in range(len(_FIELDS))]
    statistics = hashlib.sha256(b"statistics").hexdigest()
    file = f"cosmos3_nano_sim_bimanual_action_sources/{statistics}.json"
    contract = {
        "schema_version": UNIFIED,
        **_common("agibotworld"),
        "embodiments": {
            name: {"domain_id": domain, "input_action_dim": UNIFIED_WIDTH}
            for name, domain in _DOMAINS.items()
        },
        "padding": {"stage": "after_normalization_and_validity_mask", "value": 0.0},
        "input_contract": {
            "action_space": "normalized_unified_v1",
            "action_dim": UNIFIED_WIDTH,
            "domain_routing": "scalar_or_per_action_row",
            "validity": "masked_to_zero_after_normalization_by_source",
            "runtime_normalization": False,
            "model_mode": "forward_dynamics",
        },
        "layout": {
            "id": "unified_v1",
            "pose_convention": "backward_chunk_anchored_16f",
            "rotation_representation": "rot6d_columns",
            "fields": [
                {"name": name, "offset": offset, "size": size}
                for offset, (name, size) in zip(offsets, _FIELDS.items(), strict=True)
            ],
        },
        "normalizer": {
            "method": "global_asinh_unified_v1",
            "runtime_application": False,
            "source": {"artifact_path": file, "sha256": statistics},
        },
        "training_config_excerpt": {},
    }
    return {"mode": "action", **contract, "contract_sha256": _digest(contract)}


def _common(default: str) -> Json:
    return {
        "action_tokens_per_frame": ROWS_PER_FRAME,
        "model_action_dim": ACTION_DIM,
        "num_embodiment_domains": DOMAINS,
        "default_embodiment": default,
    }


def _digest(values: Json) -> str:
    """SHA-256 of a contract: of compact JSON with sorted keys, and numbers of float32."""
    text = json.dumps(
        _rounded(values), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return _float32(value) if isinstance(value, float) else value


def _float32(value: float) -> float:
    (rounded,) = struct.unpack("!f", struct.pack("!f", value))
    return float(rounded)
