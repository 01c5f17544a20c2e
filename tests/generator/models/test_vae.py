"""Chunks, prefixes, layouts and division among ranks do not change what the video VAE computes."""

from __future__ import annotations

from functools import cache
from io import BytesIO
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from ranks import Ranks
from torch import Tensor

from vllm_cosmos3.checkpoint import latents as geometry
from vllm_cosmos3.checkpoint.config import read_config
from vllm_cosmos3.checkpoint.shards import identity_table
from vllm_cosmos3.checkpoint.tensors import vae_tensors
from vllm_cosmos3.checkpoint.weights import load_weights
from vllm_cosmos3.engine_options import ParallelConfig
from vllm_cosmos3.generator.models import vae as vae_module
from vllm_cosmos3.generator.models.vae import (
    VideoVAE,
    depth_to_space,
    space_to_depth,
    to_frames,
    to_pixels,
)
from vllm_cosmos3.generator.preview import reduced, seconds_and_jpeg
from vllm_cosmos3.parallel.axis import WHOLE, Axis
from vllm_cosmos3.parallel.mesh import Mesh
from vllm_cosmos3.parallel.plane import divide

BOUND = 1e-5


@cache
def load(folder: Path, axis: Axis, mode: str) -> VideoVAE:
    config = read_config(folder).vae
    vae = VideoVAE(config, axis, mode)
    shapes = vae_tensors(config)
    load_weights(vae, identity_table(shapes), folder / "vae", shapes)
    return vae


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def clip(frames: int, height: int, width: int) -> Tensor:
    return noise(1, 3, frames, 16 * height, 16 * width).clamp(-1, 1)


def whole(chunks: object) -> Tensor:
    return torch.cat(list(chunks), dim=2)


@pytest.fixture
def vae(tiny_checkpoint_fp32: Path) -> VideoVAE:
    return load(tiny_checkpoint_fp32, WHOLE, "halo")


def test_parameters_are_called_as_in_the_checkpoint(vae: VideoVAE) -> None:
    shapes = {name: tuple(value.shape) for name, value in vae.state_dict().items()}
    assert shapes == vae_tensors(vae.config)
    assert len(shapes) == 196


def test_a_prefix_has_the_latents_of_the_whole(vae: VideoVAE) -> None:
    pixels = clip(13, 3, 5)
    latents = vae.encode(pixels)
    for frames in (1, 5, 9):
        prefix = vae.encode(pixels[:, :, :frames])
        assert torch.allclose(prefix, latents[:, :, : 1 + frames // 4], atol=BOUND, rtol=0)


def test_first_frames_do_not_depend_on_later_latents(vae: VideoVAE) -> None:
    latents = noise(1, 48, 4, 3, 5)
    first = next(vae.decode(latents[:, :, :1]))
    assert torch.equal(first, next(vae.decode(latents)))


def test_frames_differ_and_depend_on_earlier_latents(vae: VideoVAE) -> None:
    latents = noise(1, 48, 3, 3, 5)
    pixels = whole(vae.decode(latents))
    assert (pixels[:, :, 5:] - pixels[:, :, 1:5]).abs().mean() > 0.01
    latents[:, :, 0] += 1
    assert (whole(vae.decode(latents))[:, :, 5:] - pixels[:, :, 5:]).abs().max() > 1e-3


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_result_does_not_depend_on_the_chunks(
    vae: VideoVAE, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    latents, pixels = noise(1, 48, 6, 3, 5), clip(21, 3, 5)
    expected = whole(vae.decode(latents)), vae.encode(pixels)
    monkeypatch.setattr(geometry, "CHUNK_FRAMES", size)
    chunks = list(vae.decode(latents))
    whole_chunks, rest = divmod(5, size)
    lengths = [1, *[4 * size] * whole_chunks, *[4 * rest] * (rest > 0)]
    assert [chunk.shape[2] for chunk in chunks] == lengths
    assert (whole(chunks) - expected[0]).abs().max() <= BOUND
    assert (vae.encode(pixels) - expected[1]).abs().max() <= BOUND


def test_a_clip_goes_on_in_calls_of_any_length(vae: VideoVAE) -> None:
    latents = noise(1, 48, 8, 3, 5)
    begun = vae.begin_clip(3, 5)
    parts = [whole(vae.decode(part, begun)) for part in latents.split([2, 1, 5], dim=2)]
    assert [part.shape[2] for part in parts] == [5, 4, 20]
    assert (whole(parts) - whole(vae.decode(latents))).abs().max() <= BOUND
    assert begun.frames == 8


def test_two_clips_decoded_in_turn_do_not_mix(vae: VideoVAE) -> None:
    a, b = noise(1, 48, 3, 3, 5), noise(1, 48, 3, 4, 4)
    expected = whole(vae.decode(a)), whole(vae.decode(b))
    chunks = list(zip(vae.decode(a), vae.decode(b), strict=True))
    for clip_index in (0, 1):
        mixed = whole(pair[clip_index] for pair in chunks)
        assert torch.equal(mixed, expected[clip_index])


def test_latents_are_normalised_with_the_checkpoint_statistics(vae: VideoVAE) -> None:
    pixels = clip(1, 2, 2)
    shifted = vae.config.latents_mean[0] + 3 * vae.config.latents_std[0]
    own = vae.encode(pixels)[0, 0]
    old = vae.quant_conv.bias.data[0].clone()
    vae.quant_conv.bias.data[0] += shifted - vae.config.latents_mean[0]
    try:
        assert torch.allclose(vae.encode(pixels)[0, 0], own + 3, atol=1e-4)
    finally:
        vae.quant_conv.bias.data[0] = old


def test_channels_last_gives_the_same(tiny_checkpoint_fp32: Path, vae: VideoVAE) -> None:
    other = load.__wrapped__(tiny_checkpoint_fp32, WHOLE, "halo").channels_last()
    assert not other.decoder.conv_in.weight.is_contiguous()
    latents, pixels = noise(1, 48, 3, 3, 5), clip(5, 3, 5)
    assert torch.allclose(whole(other.decode(latents)), whole(vae.decode(latents)), atol=BOUND)
    assert torch.allclose(other.encode(pixels), vae.encode(pixels), atol=BOUND)


def test_bfloat16_weights_take_and_give_float32(tiny_checkpoint_fp32: Path, vae: VideoVAE) -> None:
    half = load.__wrapped__(tiny_checkpoint_fp32, WHOLE, "halo").to(torch.bfloat16)
    latents = noise(1, 48, 2, 3, 5)
    pixels = whole(half.decode(latents))
    assert pixels.dtype == torch.float32
    assert (pixels - whole(vae.decode(latents))).abs().mean() < 0.02
    encoded = half.encode(pixels)
    assert encoded.dtype == torch.float32
    assert (encoded - vae.encode(pixels)).abs().mean() < 0.05


def test_every_level_survives_pixels() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(2, 16, 16, 3)
    pixels = to_pixels(levels)
    assert (pixels.min(), pixels.max(), pixels.shape) == (-1, 1, (1, 3, 2, 16, 16))
    assert torch.equal(to_frames(pixels), levels)
    assert torch.equal(to_frames(torch.full((1, 3, 1, 1, 1), 1.5)), torch.full((1, 1, 1, 3), 255))


def test_patches_put_the_column_before_the_row() -> None:
    x = torch.arange(4.0).view(1, 1, 1, 2, 2)
    assert space_to_depth(x, 2).flatten().tolist() == [0, 2, 1, 3]
    y = noise(1, 3, 2, 6, 8)
    assert torch.equal(depth_to_space(space_to_depth(y, 2), 2), y)


@pytest.mark.parametrize(("short", "time", "frames"), [(1, 2, 1), (1, 2, 2), (3, 2, 6), (3, 1, 3)])
@pytest.mark.parametrize("shares", [1, 2, 4])
def test_small_kernels_make_the_doubled_image(
    short: int, time: int, frames: int, shares: int
) -> None:
    """As nearest doubling, the whole kernel and a shortcut that is really repeated do."""
    x, shortcut = noise(1, 6, frames, 3, 5), noise(1, 6 * shares, short, 3, 5)
    weight, bias = noise(6, 6, 3, 3), noise(6)
    rows_twice = x[0].transpose(0, 1).repeat_interleave(2, dim=2)
    expected = F.conv2d(rows_twice.repeat_interleave(2, dim=3), weight, bias, padding=1)
    repeated = shortcut.repeat_interleave(4 * time // shares, dim=1)
    repeated = repeated.view(6, time, 2, 2, short, 3, 5).permute(0, 4, 1, 5, 2, 6, 3)
    expected = expected.transpose(0, 1) + repeated.reshape(6, short * time, 6, 10)[:, -frames:]
    corners = F.conv2d(x[0].transpose(0, 1), vae_module.corner_kernels(weight), padding=1)
    actual = vae_module.join_corners(corners.transpose(0, 1)[None], shortcut, bias, time)
    assert torch.allclose(actual[0], expected, atol=1e-4)


def test_small_kernels_make_a_strip_of_the_doubled_image() -> None:
    """With a row of the neighbours on both sides, as ranks on GPUs have it."""
    x, shortcut, bias = noise(1, 6, 2, 6, 5), noise(1, 6, 2, 6, 5), noise(6)
    kernels = vae_module.corner_kernels(noise(6, 6, 3, 3))

    def image(x: Tensor, shortcut: Tensor, padding: tuple[int, int]) -> Tensor:
        corners = vae_module.each_frame(x, kernels, padding=padding)
        return vae_module.join_corners(corners, shortcut, bias, 1)

    whole = image(x, shortcut, (1, 1))
    strip = image(x[..., 1:5, :], shortcut[..., 2:4, :], (0, 1))
    assert torch.allclose(strip, whole[..., 4:8, :], atol=1e-5)


# Several ranks


def both_ways(mesh: Mesh, folder: Path, mode: str, latents: Tensor, pixels: Tensor) -> list[Tensor]:
    vae = load.__wrapped__(folder, mesh.world, mode)
    return [vae.encode(pixels), whole(vae.decode(latents))]


@pytest.mark.parametrize("mode", ["halo", "off"])
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(("height", "width"), [(5, 7), (7, 4), (4, 4), (2, 1)], ids=str)
def test_every_rank_gets_the_result_of_one(
    ranks: Ranks,
    tiny_checkpoint_fp32: Path,
    vae: VideoVAE,
    mode: str,
    size: int,
    height: int,
    width: int,
) -> None:
    latents, pixels = noise(1, 48, 3, height, width), clip(9, height, width)
    expected = [vae.encode(pixels), whole(vae.decode(latents))]
    mesh = ParallelConfig(ulysses_degree=size)
    results = ranks(mesh, both_ways, tiny_checkpoint_fp32, mode, latents, pixels)
    assert len(results) == size
    for result in results:
        for ours, alone in zip(result, expected, strict=True):
            assert (ours - alone).abs().max() <= BOUND


def frames_in_half_precision(mesh: Mesh | None, folder: Path, latents: Tensor) -> Tensor:
    axis = WHOLE if mesh is None else mesh.world
    return to_frames(whole(load.__wrapped__(folder, axis, "halo").bfloat16().decode(latents)))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("height", "width"), [(12, 20), (20, 12), (5, 7)], ids=str)
def test_pixels_on_several_ranks_are_those_of_one(
    ranks: Ranks, tiny_checkpoint_fp32: Path, size: int, height: int, width: int
) -> None:
    """Every level, in the dtype that requests have. The latents are as large as a random model's."""
    latents = 4 * noise(1, 48, 7, height, width)
    expected = frames_in_half_precision(None, tiny_checkpoint_fp32, latents)
    mesh = ParallelConfig(ulysses_degree=size)
    for frames in ranks(mesh, frames_in_half_precision, tiny_checkpoint_fp32, latents):
        assert torch.equal(frames, expected)


def preview_of(mesh: Mesh | None, folder: Path, mode: str, latents: Tensor) -> bytes | None:
    axis = WHOLE if mesh is None else mesh.world
    found = seconds_and_jpeg(load.__wrapped__(folder, axis, mode), reduced(latents), axis)
    return None if found is None else found[1]


@pytest.mark.parametrize("mode", ["halo", "tile", "off"])
def test_a_preview_is_the_same_on_several_ranks(
    ranks: Ranks, tiny_checkpoint_fp32: Path, mode: str
) -> None:
    latents = noise(1, 48, 7, 12, 40)
    assert reduced(latents).shape == (1, 48, 1, 4, 13)
    expected = preview_of(None, tiny_checkpoint_fp32, mode, latents)
    assert expected is not None
    assert Image.open(BytesIO(expected)).size == (208, 64)
    for size in (2, 3):
        mesh = ParallelConfig(ulysses_degree=size)
        found = ranks(mesh, preview_of, tiny_checkpoint_fp32, mode, latents)
        assert found == [expected, *[None] * (size - 1)]


def tiled_both_ways(mesh: Mesh, folder: Path, latents: Tensor, pixels: Tensor) -> list[Tensor]:
    return both_ways(mesh, folder, "tile", latents, pixels)


def test_tiles_do_not_depend_on_the_ranks(
    ranks: Ranks, tiny_checkpoint_fp32: Path, vae: VideoVAE
) -> None:
    latents, pixels = noise(1, 48, 2, 3, 70), clip(1, 3, 70)  # three tiles
    one = load(tiny_checkpoint_fp32, WHOLE, "tile")
    expected = [one.encode(pixels), whole(one.decode(latents))]
    for size in (2, 4):  # uneven, and more ranks than tiles
        mesh = ParallelConfig(ulysses_degree=size)
        for result in ranks(mesh, tiled_both_ways, tiny_checkpoint_fp32, latents, pixels):
            for ours, alone in zip(result, expected, strict=True):
                assert (ours - alone).abs().max() <= BOUND
    # Approximate, and exactly the tile where no other lies.
    assert (expected[1] - whole(vae.decode(latents))).abs().max() > BOUND
    first = divide(3, 70, WHOLE, "tile")[0]
    alone = whole(one.decode(first.cut(latents)))
    own = 16 * (first.columns[1] - first.fade_columns[1])
    assert torch.equal(expected[1][..., :own], alone[..., :own])


def test_small_planes_are_one_tile(tiny_checkpoint_fp32: Path, vae: VideoVAE) -> None:
    latents = noise(1, 48, 2, 5, 7)
    tiled = load(tiny_checkpoint_fp32, WHOLE, "tile")
    assert torch.equal(whole(tiled.decode(latents)), whole(vae.decode(latents)))


def test_memory_holds_copies_and_not_whole_chunks(vae: VideoVAE) -> None:
    (part,) = divide(4, 4, WHOLE, "halo")
    cache = vae_module.CausalCache(part.strips)
    extended = cache.extend(vae.decoder.conv_in, noise(1, 48, 4, 4, 4), frames=2, rows=1)
    (past,) = cache._past.values()
    assert past.shape == (1, 48, 2, 4, 4)
    assert past.untyped_storage().nbytes() < extended.untyped_storage().nbytes()
    assert torch.equal(past, extended[:, :, -2:])
