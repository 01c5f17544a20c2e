"""Streams and patches: nothing is lost, and given values stay what they are."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_cosmos3.checkpoint.latents import patch_grid, token_count
from vllm_cosmos3.generator.models.modalities import frame_mask, timestep_conditioned
from vllm_cosmos3.generator.sampling.packing import (
    Stream,
    patchify,
    start_stream,
    unpatchify,
)

SIZES = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 7), st.integers(1, 7))


@settings(deadline=None)
@given(size=SIZES, patch=st.integers(1, 3))
def test_unpatchify_undoes_patchify(size: tuple[int, int, int, int], patch: int) -> None:
    latents = torch.randn(1, *size)
    tokens = patchify(latents, patch)
    frames, rows, columns = patch_grid(tuple(latents.shape), patch)
    assert tokens.shape == (frames * rows * columns, patch * patch * size[0])
    assert torch.equal(unpatchify(tokens, tuple(latents.shape), patch), latents)


def test_a_patch_is_row_column_channel() -> None:
    latents = torch.arange(2 * 4 * 4).view(1, 2, 1, 4, 4)
    tokens = patchify(latents, 2)
    assert tokens[1].tolist() == [2, 18, 3, 19, 6, 22, 7, 23]  # top right; channel 1 is + 16
    assert tokens[2, 0] == 8  # the second row of patches comes after the first


def test_the_filling_is_zero_and_at_the_end() -> None:
    tokens = patchify(torch.ones(1, 1, 1, 3, 3), 2)
    assert tokens.tolist() == [[1, 1, 1, 1], [1, 0, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]


@settings(deadline=None)
@given(frames=st.integers(1, 6), known=st.sets(st.integers(0, 5)))
def test_given_frames_stay(frames: int, known: set[int]) -> None:
    given_frames = tuple(frame for frame in known if frame < frames)
    noise, clean = torch.randn(2, 1, 3, frames, 3, 5)
    stream = start_stream(
        "vision", noise=noise, clean_latent=clean, denoise_mask=frame_mask(frames, given_frames)
    )
    moved = stream.apply_clean(stream.x + 1)
    for frame in range(frames):
        if frame in given_frames:
            assert torch.equal(moved.x[:, :, frame], clean[:, :, frame])
        else:
            assert torch.equal(moved.x[:, :, frame], noise[:, :, frame] + 1)
    per_frame = timestep_conditioned(stream, 2).view(frames, -1)
    assert per_frame.shape[1] == token_count(stream.name, tuple(stream.x.shape), 2) // frames == 6
    assert per_frame.all(1).tolist() == per_frame.any(1).tolist()
    assert per_frame[:, 0].tolist() == [f not in given_frames for f in range(frames)]


def test_unused_channels_of_an_action_stay_while_its_row_is_noisy() -> None:
    free = torch.zeros(4, 64, dtype=torch.bool)
    free[1:, :10] = True
    noise, clean = torch.randn(4, 64), torch.zeros(4, 64)
    stream = Stream(name="action", x=noise, clean_latent=clean, denoise_mask=free).apply_clean(
        noise
    )
    assert torch.count_nonzero(stream.x[:, 10:]) == torch.count_nonzero(stream.x[0]) == 0
    assert timestep_conditioned(stream, 2).tolist() == [False, True, True, True]
    assert token_count(stream.name, tuple(stream.x.shape), 2) == 4


def test_a_sound_has_one_token_for_each_moment() -> None:
    x, free = torch.randn(64, 9), torch.ones(1, 9, dtype=torch.bool)
    stream = start_stream("sound", noise=x, clean_latent=torch.zeros_like(x), denoise_mask=free)
    assert token_count(stream.name, tuple(stream.x.shape), 2) == 9
    assert timestep_conditioned(stream, 2).shape == (9,)
