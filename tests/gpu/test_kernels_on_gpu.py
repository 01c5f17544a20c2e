"""Kernels of the GPU against torch's own operations on the same values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from vllm_cosmos3.checkpoint.shards import identity_table
from vllm_cosmos3.checkpoint.tensors import vae_tensors
from vllm_cosmos3.checkpoint.weights import load_dummy_weights
from vllm_cosmos3.compat import fused_qk_norm_rope
from vllm_cosmos3.engine_options import ParallelConfig
from vllm_cosmos3.generator.models import vae
from vllm_cosmos3.generator.models.backbone import NormedHeads
from vllm_cosmos3.generator.models.kernels import add_with_bias, norm_silu
from vllm_cosmos3.generator.models.transformer import Layer
from vllm_cosmos3.generator.models.vae import VideoVAE, rms_normalised, to_frames, to_pixels
from vllm_cosmos3.generator.pipeline import Pipeline
from vllm_cosmos3.parallel.attention import BACKENDS, make_attend
from vllm_cosmos3.parallel.mesh import building_layers, close_mesh, init_mesh

pytestmark = pytest.mark.gpu

HEADS, KV_HEADS, HEAD = 32, 8, 128
SHAPES = [(60, 572, False), (920, 1432, False), (2880, 3392, False), (512, 512, True), (7, 7, True)]


def noise(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(
        shape, device=device, generator=torch.Generator(device).manual_seed(sum(shape))
    )


def apart(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.mark.parametrize(("queries", "keys", "causal"), SHAPES)
@pytest.mark.parametrize("name", sorted(BACKENDS))
def test_attention_in_bfloat16_is_near_torchs_in_float32(
    device: torch.device, name: str, queries: int, keys: int, causal: bool
) -> None:
    """On the same rounded values; rounding the result alone is worth 1e-3."""
    q = noise(device, queries, HEADS, HEAD).bfloat16()
    k, v = noise(device, 2, keys, KV_HEADS, HEAD).bfloat16()
    exact = attend("sdpa", device, torch.float32)(q.float(), k.float(), v.float(), causal=causal)
    assert apart(attend(name, device, torch.bfloat16)(q, k, v, causal=causal), exact) <= 5e-3


def attend(name: str, device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    return make_attend(name, device=device, dtype=dtype, head_dim=HEAD)


def test_the_choice_here_is_flash(device: torch.device) -> None:
    """Or every figure would be of another kernel than it says."""
    q = noise(device, 64, HEADS, HEAD).bfloat16()
    k, v = noise(device, 2, 96, KV_HEADS, HEAD).bfloat16()
    chosen = attend("auto", device, torch.bfloat16)(q, k, v, causal=False)
    flash = attend("flash", device, torch.bfloat16)(q, k, v, causal=False)
    assert torch.equal(chosen, flash)


@pytest.mark.parametrize("head", [32, 64, 96, 128, 256, 512])
def test_the_fused_pass_is_taken_exactly_where_the_kernel_takes_such_heads(
    device: torch.device, head: int
) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        found = fused_qk_norm_rope(head, dtype, device)
        assert found is not None or head not in (64, 128, 256)
        assert found is None or head not in (32, 96)
    assert fused_qk_norm_rope(head, torch.float32, device) is None


@pytest.mark.parametrize("tokens", [1, 60, 2880])
def test_fused_norm_and_rotation_of_queries_and_keys(device: torch.device, tokens: int) -> None:
    fused = fused_qk_norm_rope(HEAD, torch.bfloat16, device)
    assert fused is not None
    qkv = noise(device, tokens, (HEADS + 2 * KV_HEADS) * HEAD).bfloat16()
    angle = noise(device, tokens, HEAD // 2)
    table = torch.cat([angle.cos(), angle.sin()], dim=1).bfloat16()
    q_weight, k_weight = (1 + 0.1 * noise(device, 2, HEAD)).bfloat16()
    plain = qkv.clone().unflatten(1, (-1, HEAD))
    q, k, v = plain.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
    rows = torch.arange(tokens, device=device)
    sizes = HEADS, KV_HEADS, KV_HEADS, HEAD
    fused(qkv, *sizes, 1e-6, q_weight, k_weight, table, True, rows)  # noqa: FBT003
    made = qkv.unflatten(1, (-1, HEAD)).split([HEADS, KV_HEADS, KV_HEADS], dim=1)
    assert apart(made[0], kernels.plain_norm_rotate(q, q_weight, table, 1e-6)) <= 1e-2
    assert apart(made[1], kernels.plain_norm_rotate(k, k_weight, table, 1e-6)) <= 1e-2
    assert torch.equal(made[2], v)


def test_a_layer_without_the_fused_pass_computes_the_same(
    pipeline: Pipeline, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = pipeline.transformer.layers[0]
    assert isinstance(layer, Layer)
    heads = layer.heads
    assert isinstance(heads, NormedHeads)
    assert heads._fused is not None
    positions = torch.arange(3 * 50, device="cpu").view(3, 50).float()
    rope = pipeline.transformer.rope(positions)
    x = noise(device, 50, pipeline.model.transformer.hidden_size).bfloat16()
    with torch.inference_mode():
        fused = heads(layer.qkv(x), rope)
        monkeypatch.setattr(heads, "_fused", None)
        plain = heads(layer.qkv(x), rope)
    for a, b in zip(fused, plain, strict=True):
        assert apart(a, b) <= 1e-2


@pytest.mark.parametrize("tokens", [1, 60, 2880])
def test_fused_add_and_norm(pipeline: Pipeline, device: torch.device, tokens: int) -> None:
    norm, width = pipeline.transformer.norm, pipeline.model.transformer.hidden_size
    x, residual = noise(device, 2, tokens, width).bfloat16()
    expected = kernels.plain_norm(x, residual, norm.weight, norm.variance_epsilon)
    with torch.inference_mode():
        actual = norm(x.clone(), residual.clone())
    assert apart(actual[0], expected[0]) <= 1e-2
    assert apart(actual[1], expected[1]) <= 5e-3


def test_silu_and_multiply(pipeline: Pipeline, device: torch.device) -> None:
    gates = noise(device, 60, 2 * pipeline.model.transformer.intermediate_size).bfloat16()
    with torch.inference_mode():
        actual = pipeline.transformer.layers[0].act(gates)
    assert apart(actual, kernels.plain_gate(gates)) <= 1e-2


@pytest.mark.parametrize("channels", [48, 256, 1024])
@pytest.mark.parametrize("biased", [0, 1])
def test_norm_and_silu_of_the_autoencoder(device: torch.device, channels: int, biased: int) -> None:
    """Into a part of a larger tensor, whose rest stays as it was."""
    x = innermost(noise(device, 1, channels, 2, 11, 7).bfloat16())
    gamma = (1 + 0.1 * noise(device, channels, 1, 1, 1)).bfloat16()
    bias = noise(device, channels).bfloat16() if biased else None
    shifted = x.float() if bias is None else x.float() + bias.float().view(-1, 1, 1, 1)
    expected = F.silu(rms_normalised(shifted, gamma.float()))
    around = innermost(torch.zeros(1, channels, 4, 13, 9, device=device, dtype=x.dtype))
    norm_silu(around[:, :, 2:, 1:-1, 1:-1], x, bias, gamma)
    assert apart(around[:, :, 2:, 1:-1, 1:-1], expected) <= 5e-3
    around[:, :, 2:, 1:-1, 1:-1] = 0
    assert not around.any()


@pytest.mark.parametrize("channels", [48, 256, 1024])
def test_sums_with_bias_of_the_autoencoder(device: torch.device, channels: int) -> None:
    x, other = (innermost(noise(device, 1, channels, t, 5, 7).bfloat16()) for t in (2, 2))
    bias = noise(device, channels).bfloat16()
    expected = x.float() + other.float() + bias.float().view(-1, 1, 1, 1)
    assert apart(add_with_bias(x, other, bias), expected) <= 5e-3


@pytest.mark.parametrize(("channels", "frames", "time"), [(48, 6, 2), (1024, 1, 2), (512, 3, 1)])
@pytest.mark.parametrize("shares", [1, 2, 4])
def test_doubled_images_of_the_autoencoder(
    device: torch.device, channels: int, frames: int, time: int, shares: int
) -> None:
    """A first frame too, whose frames are not doubled."""
    short = max(1, frames // time)
    shortcut = innermost(noise(device, 1, channels * shares, short, 5, 7).bfloat16())
    corners = innermost(noise(device, 1, 4 * channels, frames, 6, 8).bfloat16())
    bias = noise(device, channels).bfloat16()
    plain = (value.cpu().float() for value in (corners, shortcut, bias))
    expected = vae.join_corners(*plain, time).to(device)
    assert apart(vae.join_corners(corners, shortcut, bias, time), expected) <= 5e-3


def innermost(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)


def test_the_fast_decoder_equals_the_plain_one(pipeline: Pipeline, device: torch.device) -> None:
    """Both in bfloat16, at the real width: as near to each other as to float32."""
    mesh = init_mesh(ParallelConfig())
    shapes = vae_tensors(pipeline.model.vae)
    decoders = {}
    for dtype in (torch.bfloat16, torch.float32):
        with building_layers(mesh), device:
            decoders[dtype] = VideoVAE(pipeline.model.vae, mesh.world, "off").to(dtype)
        load_dummy_weights(decoders[dtype], identity_table(shapes), shapes, device=device)
    close_mesh(mesh)
    for name, parameter in decoders[torch.float32].named_parameters():
        parameter.data.copy_(decoders[torch.bfloat16].get_parameter(name))
    latents = noise(device, 1, pipeline.model.vae.z_dim, 3, 6, 10)
    with torch.inference_mode():
        fast = torch.cat(list(pipeline.vae.decode(latents)), dim=2)
        plain = torch.cat(list(decoders[torch.bfloat16].decode(latents)), dim=2)
        exact = torch.cat(list(decoders[torch.float32].decode(latents)), dim=2)
    assert fast.shape == (1, 3, 9, 96, 160)
    error = apart(plain, exact)
    assert apart(fast, exact) <= 1.5 * error + 1e-3
    assert apart(fast, plain) <= 2 * error + 1e-3


def test_frames_are_rounded_on_the_device(device: torch.device) -> None:
    frames = torch.randint(0, 256, (5, 16, 32, 3), dtype=torch.uint8, device=device)
    assert torch.equal(to_frames(to_pixels(frames)), frames)
