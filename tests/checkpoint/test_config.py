"""Reading a checkpoint's own JSON files: numbers, fall-backs, and one clear error for each fault."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_cosmos3.checkpoint.config import read_config, read_vision_config
from vllm_cosmos3.checkpoint.synthetic import write_checkpoint
from vllm_cosmos3.errors import CheckpointError, Unsupported

TRANSFORMER = "transformer/config.json"
VAE = "vae/config.json"
SOUND = "sound_tokenizer/config.json"
SCHEDULER = "scheduler/scheduler_config.json"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a tiny checkpoint, without weights."""
    folder = tmp_path_factory.mktemp("config") / "tiny"
    write_checkpoint(folder, weights=False)
    return folder


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(plain, tmp_path / "copy"))


def edit(folder: Path, file: str, *removed: str, **changed: Any) -> None:
    values = json.loads((folder / file).read_text())
    values = {key: value for key, value in values.items() if key not in removed} | changed
    (folder / file).write_text(json.dumps(values))


def test_every_number_comes_from_the_files(folder: Path) -> None:
    edit(folder, TRANSFORMER, base_fps=16, num_hidden_layers=5, timestep_scale=0.5)
    edit(folder, VAE, base_dim=12, temperal_downsample=[True, False, True])
    edit(folder, SOUND, sampling_rate=44100)
    edit(folder, SCHEDULER, flow_shift=3)
    config = read_config(folder)
    assert (config.transformer.base_fps, config.transformer.num_hidden_layers) == (16.0, 5)
    assert config.transformer.timestep_scale == 0.5
    assert config.transformer.temporal_margin == 15000
    assert config.transformer.patch_latent_dim == 192
    assert config.vae.base_dim == 12
    assert config.vae.temporal_downsample == (True, False, True)
    assert len(config.vae.latents_mean) == len(config.vae.latents_std) == 48
    assert config.sound is not None
    assert config.sound.sampling_rate == 44100
    assert (config.scheduler.flow_shift, config.scheduler.sigma_max) == (3.0, 200.0)
    assert config.scheduler.t_list is None


def test_vision_encoder(folder: Path) -> None:
    edit(folder, "vision_encoder/config.json", depth=7)
    vision = read_vision_config(folder)
    assert (vision.depth, vision.deepstack_visual_indexes) == (7, (1, 2, 3))


def test_older_exports_keep_the_rope_axes_elsewhere(folder: Path) -> None:
    edit(folder, TRANSFORMER, "rope_axes_dim", rope_scaling={"mrope_section": [8, 4, 4]})
    assert read_config(folder).transformer.rope_axes_dim == (8, 4, 4)
    edit(folder, TRANSFORMER, "rope_axes_dim", "rope_scaling", head_dim=128)
    assert read_config(folder).transformer.rope_axes_dim == (24, 20, 20)


def test_a_silent_checkpoint_needs_no_sound_tokenizer(folder: Path) -> None:
    shutil.rmtree(folder / "sound_tokenizer")
    with pytest.raises(CheckpointError, match="sound_tokenizer"):
        read_config(folder)
    edit(folder, TRANSFORMER, "sound_dim", "sound_latent_fps", sound_gen=False)
    assert read_config(folder).sound is None


def test_distilled_scheduler(folder: Path) -> None:
    t_list = [1.0, 0.9375, 0.8333333333333334, 0.625]
    edit(folder, SCHEDULER, "flow_shift", "use_karras_sigmas", "sigma_min", "sigma_max")
    edit(
        folder,
        SCHEDULER,
        _class_name="FlowMatchEulerDiscreteScheduler",
        shift=1.0,
        fixed_step_sampler_config={"t_list": t_list, "sample_type": "sde"},
    )
    scheduler = read_config(folder).scheduler
    assert scheduler.t_list == tuple(t_list)
    assert scheduler.sigma_max is None
    edit(folder, SCHEDULER, fixed_step_sampler_config={"t_list": t_list, "sample_type": "ode"})
    with pytest.raises(Unsupported, match="sample_type is 'ode'"):
        read_config(folder)


REQUIRED = {
    TRANSFORMER: [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "vocab_size",
        "rms_norm_eps",
        "rope_theta",
        "latent_channel",
        "latent_patch_size",
        "timestep_scale",
        "base_fps",
        "enable_fps_modulation",
        "unified_3d_mrope_temporal_modality_margin",
        "action_gen",
        "action_dim",
        "num_embodiment_domains",
        "sound_gen",
        "sound_dim",
        "sound_latent_fps",
    ],
    VAE: [
        "base_dim",
        "decoder_base_dim",
        "z_dim",
        "dim_mult",
        "num_res_blocks",
        "temperal_downsample",
        "in_channels",
        "out_channels",
        "patch_size",
        "scale_factor_temporal",
        "scale_factor_spatial",
        "latents_mean",
        "latents_std",
    ],
}


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_all_missing_keys_are_named_at_once(
    plain: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    file = data.draw(st.sampled_from(sorted(REQUIRED)))
    missing = data.draw(st.sets(st.sampled_from(REQUIRED[file]), min_size=1))
    copy = Path(shutil.copytree(plain, tmp_path_factory.mktemp("missing") / "copy"))
    edit(copy, file, *missing)
    with pytest.raises(CheckpointError) as error:
        read_config(copy)
    assert f"{copy / file} lacks " in str(error.value)
    assert set(str(error.value).split(" lacks ")[1].split(", ")) == missing


@pytest.mark.parametrize(
    ("file", "changed", "sentence"),
    [
        (TRANSFORMER, {"hidden_size": "64"}, "hidden_size is '64', must be int"),
        (TRANSFORMER, {"hidden_size": True}, "hidden_size is True, must be int"),
        (TRANSFORMER, {"num_key_value_heads": 0}, "num_key_value_heads is 0, must be at least 1"),
        (
            TRANSFORMER,
            {"rope_scaling": "linear"},
            "rope_scaling is 'linear', must be a JSON object",
        ),
        (TRANSFORMER, {"rope_axes_dim": [8, 8]}, "rope_axes_dim is [8, 8]"),
        (TRANSFORMER, {"rope_axes_dim": [6, 5, 6]}, "are 34 and 32, must be equal"),
        (TRANSFORMER, {"num_key_value_heads": 3}, "are 2 and 0, must be equal"),
        (VAE, {"z_dim": 16}, "are 16 and 48, must be equal"),
        (VAE, {"latents_std": [1.0]}, "latents_std are 48 and 1, must be equal"),
        (SOUND, {"hop_size": 960}, "are 960 and 1920, must be equal"),
        (
            SCHEDULER,
            {"fixed_step_sampler_config": [4]},
            "fixed_step_sampler_config is [4], must be",
        ),
        (
            SCHEDULER,
            {"t_list": [1.0, 0.5, 0.5]},
            "t_list is [1.0, 0.5, 0.5], must fall from at most 1",
        ),
        (SCHEDULER, {"t_list": [1000, 500]}, "t_list is [1000.0, 500.0], must fall from at most 1"),
        (SCHEDULER, {"t_list": []}, "t_list is [], must fall from at most 1"),
    ],
)
def test_wrong_values_are_named(
    folder: Path, file: str, changed: dict[str, Any], sentence: str
) -> None:
    edit(folder, file, **changed)
    with pytest.raises(CheckpointError) as error:
        read_config(folder)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("file", "changed", "sentence"),
    [
        (TRANSFORMER, {"hidden_act": "gelu"}, "'gelu', this version runs only 'silu' or 'relu2'"),
        (TRANSFORMER, {"hidden_act": ["silu"]}, "['silu'], this version runs only 'silu' or"),
        (TRANSFORMER, {"hidden_act": "relu2"}, "qk_norm_for_text is True"),
        (TRANSFORMER, {"use_und_k_norm_for_gen": True}, "use_und_k_norm_for_gen is True"),
        (TRANSFORMER, {"backbone_type": "cosmos3_multiview"}, "Transfer-Auto"),
        (TRANSFORMER, {"quantization_config": {"quant_method": "modelopt"}}, "quant_algo None"),
        (TRANSFORMER, {"attention_bias": True}, "attention_bias is True"),
        (VAE, {"is_residual": False}, "is_residual is False"),
        (SOUND, {"activation": "elu"}, "activation is 'elu'"),
    ],
)
def test_other_architectures_are_refused_by_name(
    folder: Path, file: str, changed: dict[str, Any], sentence: str
) -> None:
    edit(folder, file, **changed)
    with pytest.raises(Unsupported) as error:
        read_config(folder)
    assert sentence in str(error.value)


def test_unreadable_files_are_named(folder: Path) -> None:
    (folder / VAE).write_text("{")
    with pytest.raises(CheckpointError, match=r"vae/config\.json cannot be read"):
        read_config(folder)
    (folder / VAE).write_text("[]")
    with pytest.raises(CheckpointError, match="holds list, must be a JSON object"):
        read_config(folder)
    (folder / VAE).unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing in .*vae"):
        read_config(folder)
