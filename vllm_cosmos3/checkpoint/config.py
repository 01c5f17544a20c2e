"""What a checkpoint says of itself: every number of the model, read from the folder's JSON files.

Nothing here has a default that the published files carry: a missing key is an error that names it.
Loads no torch and no weights; of one file it reads the names of the tensors.
"""

from __future__ import annotations

import json
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open

from vllm_cosmos3.checkpoint.adapters.adapter import Adapter
from vllm_cosmos3.checkpoint.backbone import BACKBONES, Backbone, backbone_of
from vllm_cosmos3.checkpoint.kinds import KINDS, check_kind, kind_of
from vllm_cosmos3.checkpoint.quantization import Quantization, read_quantization
from vllm_cosmos3.checkpoint.simulators import UNSERVED, CausalConfig, read_causal
from vllm_cosmos3.errors import CheckpointError, Unsupported

Config = TypeVar("Config")
SAMPLE_RATE = 48_000  # of sound, where no model has another
MAY_BE_ZERO = ("temporal_margin",)  # of the whole numbers, beside what a checkpoint may leave out


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerConfig:
    """``transformer/config.json``. Both towers share these dimensions, and the backbone."""

    backbone: Backbone
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
    encoder_enabled: bool  # false: the file holds the decoder alone, and no sound can be given


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig:
    """``vision_encoder/config.json``: Qwen3-VL's vision transformer. The generator uses none."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    num_position_embeddings: int
    out_hidden_size: int
    deepstack_visual_indexes: tuple[int, ...]  # blocks that also feed the language model


@dataclass(frozen=True, slots=True, kw_only=True)
class SiglipConfig:
    """The vision encoder of Edge, SigLIP 2 with a projector, as the root ``config.json`` has it."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_channels: int
    patch_size: int
    num_patches: int  # of the learned table of positions, which is square
    spatial_merge_size: int
    projector_hidden_size: int
    out_hidden_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """``scheduler/scheduler_config.json``. ``t_list`` is set for distilled checkpoints only."""

    sigma_min: float | None
    sigma_max: float | None
    flow_shift: float
    t_list: tuple[float, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A whole checkpoint folder. ``sound`` is None where the checkpoint makes no sound.

    ``kind`` is one of `kinds.KINDS`, and says which modes the checkpoint was made for.
    ``quantization`` is None where matrices are loaded as they are, ``causal`` where the checkpoint is
    no simulator. ``adapters`` are merged into the transformer while it is loaded.
    """

    path: Path
    kind: str
    transformer: TransformerConfig
    vae: VAEConfig
    scheduler: SchedulerConfig
    sound: SoundConfig | None
    quantization: Quantization | None
    causal: CausalConfig | None = None
    adapters: tuple[Adapter, ...] = ()

    @property
    def sample_rate(self) -> int:
        """Samples a second of the sound of results, also of a sound that was given."""
        return SAMPLE_RATE if self.sound is None else self.sound.sampling_rate

    @property
    def distilled(self) -> bool:
        """Whether it was trained for fixed steps, without guidance."""
        return self.scheduler.t_list is not None


def read_config(folder: Path, kind: str | None = None) -> ModelConfig:
    """Every number of the generator in ``folder``, a checkpoint in the published layout.

    ``kind`` replaces the kind that the files tell.

    Raises CheckpointError that names all missing keys of a file, Unsupported for checkpoints that
    are recognised but cannot be run, such as 4-bit weights, and InvalidRequest for a ``kind`` that
    the checkpoint cannot be.
    """
    found = read_kind(folder)
    if found in UNSERVED:
        raise Unsupported(f"{folder} is {UNSERVED[found]}")
    if kind is not None:
        check_kind(kind, found)
    file = folder / "transformer" / "config.json"
    transformer, quantization = _read_transformer(file), read_quantization(folder, read_json(file))
    causal = read_causal(file, read_json(file))
    sound = folder / "sound_tokenizer" / "config.json"
    config = ModelConfig(
        path=folder,
        kind=kind or found,
        transformer=transformer,
        vae=_read_vae(folder / "vae" / "config.json"),
        scheduler=_read_scheduler(folder),
        sound=_read_sound(sound) if transformer.sound_gen and causal is None else None,
        quantization=quantization,
        causal=causal,
    )
    _check_agreement(config)
    return config


def read_kind(folder: Path) -> str:
    """What the checkpoint in ``folder`` was made for: one of `kinds.KINDS`."""
    return kind_of(
        folder,
        transformer=read_json(folder / "transformer" / "config.json"),
        scheduler=read_json(folder / "scheduler" / "scheduler_config.json"),
        pipeline=_optional(folder / "model_index.json")
        | _optional(folder / "modular_model_index.json"),
        root=_optional(folder / "config.json"),
    )


def read_vision_config(folder: Path) -> VisionConfig:
    """Dimensions of the reasoner's vision encoder in ``folder``; CheckpointError if unreadable."""
    file = folder / "vision_encoder" / "config.json"
    return _read(VisionConfig, file, read_json(file))


def siglip_config(root: Mapping[str, Any]) -> SiglipConfig:
    """Dimensions of Edge's vision encoder in a root ``config.json``; KeyError where one is missing.

    The projector's stand in a block of its own, or, as transformers writes them, beside the others.
    """
    text, vision = root["text_config"], root["vision_config"]
    projector = root.get("projector_config") or {
        "merger_intermediate_size": root["projector_hidden_size"],
        "spatial_merge_size": vision["spatial_merge_size"],
        "out_hidden_size": text["hidden_size"],
    }
    names = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_channels", "patch_size",
        "num_patches",
    )  # fmt: skip
    return SiglipConfig(
        **{name: vision[name] for name in names},
        spatial_merge_size=projector["spatial_merge_size"],
        projector_hidden_size=projector["merger_intermediate_size"],
        out_hidden_size=projector["out_hidden_size"],
    )


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


def _inner(file: Path, values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object in another one; empty where there is none."""
    value = values.get(key) or {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{_short(file)}: {key} is {value!r}, must be a JSON object")
    return value


def _optional(path: Path) -> dict[str, Any]:
    """A JSON object from a file that not every checkpoint has."""
    return read_json(path) if path.exists() else {}


def _read_transformer(file: Path) -> TransformerConfig:
    values = read_json(file)
    backbone = backbone_of(values)
    if backbone is None:
        raise Unsupported(
            f"{_short(file)}: hidden_act is {values['hidden_act']!r}, "
            f"this version runs only {' or '.join(repr(each.hidden_act) for each in BACKBONES)}"
        )
    _require(
        file,
        values,
        attention_bias=False,
        qk_norm_for_text=backbone.qk_norm_for_text,
        use_und_k_norm_for_gen=backbone.use_und_k_norm_for_gen,
        unified_3d_mrope_reset_spatial_ids=True,
    )
    # Older exports have no rope_axes_dim; distilled ones leave out what they do not generate.
    scaling = _inner(file, values, "rope_scaling")
    fallback = {
        "backbone": backbone,
        "rope_axes_dim": scaling.get("mrope_section", [24, 20, 20]),
    }
    if values.get("action_gen") is False:
        fallback |= {"action_dim": 0, "num_embodiment_domains": 0}
    if values.get("sound_gen") is False:
        fallback |= {"sound_dim": 0, "sound_latent_fps": 0}
    names = {"temporal_margin": "unified_3d_mrope_temporal_modality_margin"}
    return _read(TransformerConfig, file, values, names, fallback)


def _read_vae(file: Path) -> VAEConfig:
    values = read_json(file)
    _require(file, values, is_residual=True, attn_scales=[])
    return _read(VAEConfig, file, values, {"temporal_downsample": "temperal_downsample"})


def _read_sound(file: Path) -> SoundConfig:
    values = read_json(file)
    _require(
        file,
        values,
        model_type="autoencoder_v2",
        enc_type="spec_convnext",
        enc_use_snake=True,
        activation="snakebeta",
        snake_logscale=True,
        normalize_volume=True,
        causal=False,
        padding_mode="zeros",
        latent_mean=None,
        latent_std=None,
    )
    config = _read(SoundConfig, file, values, fallback={"encoder_enabled": True})
    # Published files hold the decoder alone and do not always say so.
    return replace(config, encoder_enabled=config.encoder_enabled and _encodes(file.parent))


def _encodes(folder: Path) -> bool:
    """Whether the file of the autoencoder has an encoder; true where it is not there yet, or corrupt."""
    try:
        with safe_open(folder / "diffusion_pytorch_model.safetensors", framework="np") as tensors:
            return any(name.startswith("encoder.") for name in tensors.keys())  # noqa: SIM118
    except (FileNotFoundError, SafetensorError):
        return True


def _read_scheduler(folder: Path) -> SchedulerConfig:
    """Base checkpoints name a UniPC scheduler; distilled ones an Euler scheduler with fixed steps.

    Diffusers reads those steps from its modular index: both must say the same, if both say any.
    """
    file = folder / "scheduler" / "scheduler_config.json"
    values = read_json(file)
    fixed = _inner(file, values, "fixed_step_sampler_config")
    _require(file, fixed, sample_type="sde")
    sigmas = _optional(folder / "modular_model_index.json").get("distilled_sigmas")
    t_list = fixed.get("t_list") or sigmas
    if sigmas and sigmas != t_list:
        raise CheckpointError(
            f"{file} has the fixed steps {t_list} and modular_model_index.json {sigmas}, "
            "must be equal"
        )
    fallback = {
        "sigma_min": None,
        "sigma_max": None,
        "flow_shift": values.get("shift", 1.0),
        "t_list": t_list,
    }
    config = _read(SchedulerConfig, file, values, {}, fallback)
    steps = config.t_list or ()
    falling = all(a > b for a, b in pairwise((*steps, 0.0)))
    if config.t_list is not None and not (steps and steps[0] <= 1 and falling):
        raise CheckpointError(
            f"{_short(file)}: t_list is {list(steps)}, must fall from at most 1 and stay above 0"
        )
    return config


def _check_agreement(config: ModelConfig) -> None:
    """Numbers that several files or keys state must be the same in all of them."""
    transformer, vae, sound = config.transformer, config.vae, config.sound
    equal: dict[str, tuple[object, object]] = {
        f"fixed steps of the kind {config.kind} and of the scheduler": (
            KINDS[config.kind].distilled,
            config.distilled,
        ),
        "2 x sum of rope_axes_dim and head_dim": (
            2 * sum(transformer.rope_axes_dim),
            transformer.head_dim,
        ),
        "vae z_dim and transformer latent_channel": (vae.z_dim, transformer.latent_channel),
        "vae z_dim and the length of latents_mean": (vae.z_dim, len(vae.latents_mean)),
        "vae z_dim and the length of latents_std": (vae.z_dim, len(vae.latents_std)),
        "num_attention_heads modulo num_key_value_heads and 0": (
            transformer.num_attention_heads % transformer.num_key_value_heads,
            0,
        ),
    }
    if config.causal is not None:
        steps = config.causal.sigmas, config.scheduler.t_list
        equal["fixed steps of the simulator and of the scheduler"] = steps
    if sound is not None:
        equal |= {
            "sound vocoder_input_dim and transformer sound_dim": (
                sound.vocoder_input_dim,
                transformer.sound_dim,
            ),
            "sound hop_size and the product of dec_strides": (
                sound.hop_size,
                math.prod(sound.dec_strides),
            ),
        }
    for what, (left, right) in equal.items():
        if left != right:
            raise CheckpointError(f"{config.path}: {what} are {left} and {right}, must be equal")


def _require(file: Path, values: Mapping[str, Any], **expected: object) -> None:
    """Refuse settings that the implementation does not have. An absent key has the usual value."""
    for key, value in expected.items():
        if key in values and values[key] != value:
            raise Unsupported(
                f"{_short(file)}: {key} is {values[key]!r}, this version runs only {value!r}"
            )


def _read(
    kind: type[Config],
    file: Path,
    values: Mapping[str, Any],
    names: Mapping[str, str] | None = None,
    fallback: Mapping[str, Any] | None = None,
) -> Config:
    """Build ``kind`` from ``values``. ``names`` maps fields to keys that are spelled differently."""
    names, fallback = names or {}, fallback or {}
    found, missing = {}, []
    for field, hint in typing.get_type_hints(kind).items():
        key = names.get(field, field)
        value = values.get(key)
        if value is None and field in fallback:
            value = fallback[field]
        elif value is None:
            missing.append(key)
            continue
        found[field] = _typed(value, hint, f"{_short(file)}: {key}")
        least = 0 if field in fallback or field in MAY_BE_ZERO else 1
        if hint is int and found[field] < least:
            raise CheckpointError(f"{_short(file)}: {key} is {value}, must be at least {least}")
    if missing:
        raise CheckpointError(f"{file} lacks {', '.join(missing)}")
    return kind(**found)


def _typed(value: Any, hint: Any, what: str) -> Any:
    """``value`` as the type of a field; JSON writes tuples as lists and may write 24.0 as 24."""
    options, items = typing.get_args(hint), typing.get_origin(hint)
    if items is tuple and isinstance(value, list):
        length = None if options[-1] is Ellipsis else len(options)
        if length in (None, len(value)):
            return tuple(_typed(item, options[0], what) for item in value)
    elif type(None) in options:
        return None if value is None else _typed(value, options[0], what)
    elif hint is float and type(value) is int:
        return float(value)
    elif type(value) is hint:
        return value
    shown = str(hint).removeprefix("<class '").removesuffix("'>")
    raise CheckpointError(f"{what} is {value!r}, must be {shown}")


def _short(file: Path) -> str:
    return f"{file.parent.name}/{file.name}"
