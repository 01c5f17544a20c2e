"""The vision tower's queries and keys on a GPU: one kernel instead of vLLM's copy and rotation."""

from __future__ import annotations

import pytest
import torch

from vllm_cosmos3.reasoner.vision_attention import split_rotated

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("heads", "channels"), [(16, 72), (2, 72), (3, 64), (1, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equal_to_vllms(
    heads: int, channels: int, dtype: torch.dtype, device: torch.device
) -> None:
    from vllm.vllm_flash_attn.layers.rotary import apply_rotary_emb

    make = torch.Generator(device).manual_seed(heads)
    patches = 1571  # no multiple of anything
    qkv = torch.randn(patches, 3 * heads * channels, generator=make, device=device).to(dtype)
    angle = torch.randn(patches, channels // 2, generator=make, device=device)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)

    q, k, v = split_rotated(qkv, cos, sin, heads)

    parts = qkv.view(patches, 3, heads, channels)
    assert torch.equal(v, parts[:, 2])
    for turned, plain in ((q, parts[:, 0]), (k, parts[:, 1])):
        assert turned.is_contiguous()
        assert torch.equal(turned, apply_rotary_emb(plain[None].contiguous(), cos, sin)[0])
        first, second = plain.float().chunk(2, -1)
        c, s = cos.float()[:, None], sin.float()[:, None]
        exact = torch.cat((first * c - second * s, first * s + second * c), -1)
        torch.testing.assert_close(turned.float(), exact, atol=0.02, rtol=0.01)
