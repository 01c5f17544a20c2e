"""Video and sound autoencoders against those of diffusers, float32, the same tiny checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, Cosmos3AVAEAudioTokenizer
from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import _preprocess_conditioning_image
from torch import Tensor

from vllm_cosmos3.checkpoint.config import read_config
from vllm_cosmos3.checkpoint.shards import identity_table
from vllm_cosmos3.checkpoint.tensors import sound_tensors, vae_tensors
from vllm_cosmos3.checkpoint.weights import load_weights
from vllm_cosmos3.generator.models.sound import SoundVAE
from vllm_cosmos3.generator.models.vae import VideoVAE, to_pixels
from vllm_cosmos3.media import cover_crop
from vllm_cosmos3.parallel.axis import WHOLE

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning"),
]

BOUND = 1e-5  # absolute; pixels and samples reach 1, latents about 5


@pytest.fixture(scope="module")
def vae(tiny_checkpoint_fp32: Path) -> VideoVAE:
    config = read_config(tiny_checkpoint_fp32).vae
    vae = VideoVAE(config, WHOLE, "off")
    shapes = vae_tensors(config)
    load_weights(vae, identity_table(shapes), tiny_checkpoint_fp32 / "vae", shapes)
    return vae


@pytest.fixture(scope="module")
def reference(tiny_checkpoint_fp32: Path) -> AutoencoderKLWan:
    return AutoencoderKLWan.from_pretrained(tiny_checkpoint_fp32 / "vae")


@pytest.fixture(scope="module")
def sound(tiny_checkpoint_fp32: Path) -> SoundVAE:
    config = read_config(tiny_checkpoint_fp32).sound
    assert config is not None
    sound = SoundVAE(config, encoder=True)
    shapes = sound_tensors(config)
    load_weights(sound, identity_table(shapes), tiny_checkpoint_fp32 / "sound_tokenizer", shapes)
    return sound


@pytest.fixture(scope="module")
def sound_reference(tiny_checkpoint_fp32: Path) -> Cosmos3AVAEAudioTokenizer:
    return Cosmos3AVAEAudioTokenizer.from_pretrained(tiny_checkpoint_fp32 / "sound_tokenizer")


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def statistics(reference: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
    values = reference.config.latents_mean, reference.config.latents_std
    mean, std = (torch.tensor(value).view(1, -1, 1, 1, 1) for value in values)
    return mean, std


@torch.no_grad()
def reference_encode(reference: AutoencoderKLWan, pixels: Tensor) -> Tensor:
    mean, std = statistics(reference)
    return (reference.encode(pixels).latent_dist.mode() - mean) / std


@torch.no_grad()
def reference_decode(reference: AutoencoderKLWan, latents: Tensor) -> Tensor:
    mean, std = statistics(reference)
    return reference.decode(latents * std + mean).sample


def same(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.01  # constants would agree with anything
    assert (ours - theirs).abs().max() <= BOUND


SIZES = [(1, 4, 6), (5, 3, 5), (9, 5, 2), (13, 2, 3)]  # pixel frames, latent height and width


@pytest.mark.parametrize(("frames", "height", "width"), SIZES)
def test_encode(
    vae: VideoVAE, reference: AutoencoderKLWan, frames: int, height: int, width: int
) -> None:
    pixels = noise(1, 3, frames, 16 * height, 16 * width).clamp(-1, 1)
    ours = vae.encode(pixels)
    assert ours.shape == (1, 48, 1 + frames // 4, height, width)
    same(ours, reference_encode(reference, pixels))


@pytest.mark.parametrize(("frames", "height", "width"), SIZES)
def test_decode(
    vae: VideoVAE, reference: AutoencoderKLWan, frames: int, height: int, width: int
) -> None:
    latents = noise(1, 48, 1 + frames // 4, height, width)
    chunks = list(vae.decode(latents))
    assert [chunk.shape[2] for chunk in chunks] == [1] + [frames - 1] * (frames > 1)
    same(torch.cat(chunks, dim=2), reference_decode(reference, latents))


@pytest.mark.parametrize("prefix", [1, 5])
def test_prefix_has_the_latents_of_the_reference_on_the_whole_clip(
    vae: VideoVAE, reference: AutoencoderKLWan, prefix: int
) -> None:
    pixels = noise(1, 3, 13, 48, 64).clamp(-1, 1)
    known = 1 + prefix // 4
    same(vae.encode(pixels[:, :, :prefix]), reference_encode(reference, pixels)[:, :, :known])


@pytest.mark.parametrize("frames", [1, 2, 7])
def test_sound_decode(
    sound: SoundVAE, sound_reference: Cosmos3AVAEAudioTokenizer, frames: int
) -> None:
    latents = noise(64, frames)
    ours = sound.decode(latents)
    assert ours.shape == (2, 1920 * frames)
    with torch.no_grad():
        same(ours, sound_reference.decode(latents))


@pytest.mark.parametrize("samples", [1920, 3000, 1920 * 5 - 1])
def test_sound_encode(
    sound: SoundVAE, sound_reference: Cosmos3AVAEAudioTokenizer, samples: int
) -> None:
    waveform = 0.1 * noise(2, samples)
    ours = sound.encode(waveform)
    assert ours.shape == (64, -(-samples // 1920))
    with torch.no_grad():
        same(ours, sound_reference.encode(waveform[None]).latent_dist.mean[0])


@pytest.mark.parametrize("source", [(33, 47), (120, 31), (48, 80), (481, 853)])
def test_picture_is_prepared_as_the_reference_does(source: tuple[int, int]) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (*source, 3), dtype=np.uint8)
    frames = cover_crop(picture[None], height=48, width=80)
    ours = to_pixels(torch.from_numpy(frames))
    assert torch.equal(ours[:, :, 0], _preprocess_conditioning_image(picture, 48, 80))
