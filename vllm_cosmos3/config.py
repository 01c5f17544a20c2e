"""What a checkpoint says of itself: every number of the model, read from the folder's JSON files.

Nothing here has a default that the published files carry: a missing key is an error that names it.
Loads no torch and no weights.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_cosmos3.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerConfig:
    """``transformer/config.json``. Both towers share these dimensions."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_axes_dim: tuple[int, int, int]  # rotary frequencies for time, height and width
    latent_channel: int
    latent_patch_size: int
    timestep_scale: float
    base_fps: float
    enable_fps_modulation: bool
    temporal_margin: int  # gap in position ids between the text and the first latent frame
    action_gen: bool
    action_dim: int
    num_embodiment_domains: int
    sound_gen: bool
    sound_dim: int
    sound_latent_fps: float

    @property
    def patch_latent_dim(self) -> int:
        """Values of one vision token: channels x patch x patch."""
        return self.latent_channel * self.latent_patch_size**2


@dataclass(frozen=True, slots=True, kw_only=True)
class VAEConfig:
    """``vae/config.json``: the Wan 2.2 video autoencoder."""

    base_dim: int
    decoder_base_dim: int
    z_dim: int
    dim_mult: tuple[int, ...]
    num_res_blocks: int
    temporal_downsample: tuple[bool, ...]
    in_channels: int
    out_channels: int
    patch_size: int
    scale_factor_temporal: int
    scale_factor_spatial: int
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SoundConfig:
    """``sound_tokenizer/config.json``: the AVAE sound autoencoder."""

    sampling_rate: int
    stereo: bool
    hop_size: int
    vocoder_input_dim: int
    dec_dim: int
    dec_c_mults: tuple[int, ...]
    dec_strides: tuple[int, ...]
    dec_out_channels: int
    enc_dim: int
    enc_num_blocks: int
    enc_n_fft: int
    enc_hop_length: int
    enc_latent_dim: int
    enc_c_mults: tuple[int, ...]
    enc_strides: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """``scheduler/scheduler_config.json``. ``t_list`` is set for distilled checkpoints only."""

    class_name: str
    num_train_timesteps: int
    use_karras_sigmas: bool
    sigma_min: float | None
    sigma_max: float | None
    flow_shift: float
    t_list: tuple[float, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A whole checkpoint folder. ``sound`` is None where the checkpoint makes no sound."""

    path: Path
    transformer: TransformerConfig
    vae: VAEConfig
    scheduler: SchedulerConfig
    sound: SoundConfig | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """Degrees of the mesh. Their product is the number of ranks; tensor parallel varies fastest."""

    tensor_parallel_size: int = 1
    cfg_parallel_size: int = 1
    ulysses_degree: int = 1
    vae_parallel: str = "halo"  # "halo", "tile" or "off"

    @property
    def world_size(self) -> int:
        return self.tensor_parallel_size * self.cfg_parallel_size * self.ulysses_degree


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything a rank needs to build its part of the generator. Picklable."""

    model: Path
    dtype: str = "bfloat16"  # of weights and activations; solver state is always float32
    device: str = "cpu"
    load_format: str = "auto"  # "auto" or "dummy"
    attention_backend: str = "auto"
    parallel: ParallelConfig = ParallelConfig()
    und_residency: str = "auto"  # where the understanding tower rests: "gpu", "host" or "auto"
    layerwise_offload: bool = False


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from ``path``; CheckpointError if it is absent or not an object."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path.name} is missing in {path.parent}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, must be a JSON object")
    return value
