"""Geometry of latents: what holds for every length and size, and the figures of the published layout."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_cosmos3.checkpoint.config import VAEConfig, read_config
from vllm_cosmos3.checkpoint.latents import (
    CHUNK_FRAMES,
    CHUNK_POSITIONS,
    chunk_sizes,
    latent_frames,
    pixel_frames,
    round_frames,
    token_count,
    vision_shape,
)


@pytest.fixture(scope="module")
def vae(tiny_checkpoint: Path) -> VAEConfig:
    return read_config(tiny_checkpoint).vae


@given(frames=st.integers(1, 20_000))
def test_rounding_up_fills_whole_latent_frames(vae: VAEConfig, frames: int) -> None:
    whole = round_frames(frames, vae)
    assert frames <= whole < frames + 4
    assert pixel_frames(latent_frames(whole, vae), vae) == whole
    assert latent_frames(frames, vae) in (latent_frames(whole, vae), latent_frames(whole, vae) - 1)


def test_figures_of_the_default_video(vae: VAEConfig) -> None:
    assert (latent_frames(1, vae), latent_frames(189, vae), pixel_frames(48, vae)) == (1, 48, 189)
    assert vision_shape(189, 720, 1280, vae) == (1, 48, 48, 45, 80)
    assert token_count("vision", (1, 48, 48, 45, 80), 2) == 48 * 23 * 40  # odd sizes are filled up


def test_sound_and_actions_are_tokens_already() -> None:
    assert token_count("sound", (64, 197), 2) == 197
    assert token_count("action", (33, 64), 2) == 33


@given(
    frames=st.integers(1, 300),
    height=st.integers(1, 150),
    width=st.integers(1, 150),
    begun=st.booleans(),
)
def test_chunks_are_all_frames_within_their_bounds(
    frames: int, height: int, width: int, begun: bool
) -> None:
    sizes = chunk_sizes(frames, height, width, begun=begun)
    assert sum(sizes) == frames
    assert begun or sizes[0] == 1
    for size in sizes:
        assert size == 1 or size * height * width <= CHUNK_POSITIONS
        assert 1 <= size <= CHUNK_FRAMES
