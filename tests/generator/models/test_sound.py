"""The sound autoencoder: lengths, range, and a file without encoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from vllm_cosmos3.checkpoint.config import read_config
from vllm_cosmos3.checkpoint.shards import identity_table
from vllm_cosmos3.checkpoint.tensors import sound_tensors
from vllm_cosmos3.checkpoint.weights import load_weights
from vllm_cosmos3.errors import Unsupported
from vllm_cosmos3.generator.models.sound import SoundVAE, normalised


def load(folder: Path, *, encoder: bool) -> SoundVAE:
    config = read_config(folder).sound
    assert config is not None
    sound = SoundVAE(config, encoder=encoder)
    shapes = sound_tensors(config)
    needed = {name: shape for name, shape in shapes.items() if name in sound.state_dict()}
    load_weights(sound, identity_table(needed), folder / "sound_tokenizer", shapes)
    return sound


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_parameters_are_called_as_in_the_checkpoint(tiny_checkpoint_fp32: Path) -> None:
    sound = load(tiny_checkpoint_fp32, encoder=True)
    shapes = {name: tuple(value.shape) for name, value in sound.state_dict().items()}
    assert shapes == sound_tensors(sound.config)
    assert len(shapes) == 249


def test_decoder_alone_decodes_the_same_and_refuses_to_encode(tiny_checkpoint_fp32: Path) -> None:
    alone = load(tiny_checkpoint_fp32, encoder=False)
    assert all(name.startswith("decoder.") for name in alone.state_dict())
    latents = noise(64, 3)
    assert torch.equal(
        alone.decode(latents), load(tiny_checkpoint_fp32, encoder=True).decode(latents)
    )
    with pytest.raises(Unsupported, match="without encoder"):
        alone.encode(noise(2, 1920))


def test_samples_stay_within_one_and_both_channels_sound(tiny_checkpoint_fp32: Path) -> None:
    waveform = load(tiny_checkpoint_fp32, encoder=False).decode(10 * noise(64, 4))
    assert waveform.shape == (2, 4 * 1920)
    assert waveform.abs().max() <= 1
    assert waveform.std(dim=1).min() > 0.01
    assert not torch.equal(waveform[0], waveform[1])


def test_loudness_does_not_matter_to_the_encoder(tiny_checkpoint_fp32: Path) -> None:
    sound = load(tiny_checkpoint_fp32, encoder=True)
    waveform = noise(2, 4000)
    assert torch.allclose(sound.encode(waveform), sound.encode(0.5 * waveform), atol=1e-3)
    assert torch.isfinite(sound.encode(torch.zeros(2, 100))).all()


def test_bfloat16_weights_take_and_give_float32(tiny_checkpoint_fp32: Path) -> None:
    full = load(tiny_checkpoint_fp32, encoder=True)
    half = load(tiny_checkpoint_fp32, encoder=True).to(torch.bfloat16)
    latents = noise(64, 3)
    waveform = half.decode(latents)
    assert waveform.dtype == torch.float32
    assert (waveform - full.decode(latents)).abs().mean() < 0.05
    assert half.encode(waveform).dtype == torch.float32


def test_weights_have_the_stored_length() -> None:
    length, direction = noise(5, 1, 1).abs(), noise(5, 3, 7)
    weight = normalised(length, direction)
    assert torch.allclose(weight.norm(dim=(1, 2)), length.flatten())
    assert torch.allclose(normalised(length, 2 * direction), weight)
