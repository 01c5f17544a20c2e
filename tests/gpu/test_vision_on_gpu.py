"""The vision tower's attention on a GPU: vLLM's, with its rotation in place instead of a copy."""

from __future__ import annotations

import pytest
import torch
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VisionAttention
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_cosmos3.engine_options import ParallelConfig
from vllm_cosmos3.parallel.mesh import building_layers, close_mesh, init_mesh
from vllm_cosmos3.reasoner.vision_attention import VisionAttention

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("heads", "channels"), [(16, 72), (2, 72), (1, 128)])
def test_equal_to_vllms(heads: int, channels: int, device: torch.device) -> None:
    width = heads * channels
    mesh = init_mesh(ParallelConfig())
    torch.set_default_dtype(torch.bfloat16)  # by which vLLM chooses the kernel
    try:
        with building_layers(mesh), device:
            layer = Qwen2_5_VisionAttention(width, heads, width)
    finally:
        torch.set_default_dtype(torch.float32)
        close_mesh(mesh)
    assert layer.attn.attn_backend == AttentionBackendEnum.FLASH_ATTN
    make = torch.Generator(device).manual_seed(heads)
    for parameter in layer.parameters():
        parameter.data.normal_(std=0.05, generator=make)
    frames = torch.tensor([0, 520, 1040, 1571], dtype=torch.int32, device=device)
    x = torch.randn(1571, 1, width, generator=make, device=device).to(torch.bfloat16)
    angle = torch.randn(1571, channels // 2, generator=make, device=device)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)

    with torch.inference_mode():
        expected = layer(x, frames, cos, sin, torch.tensor(531), None)
        layer.__class__ = VisionAttention
        found = layer(x, frames, cos, sin, torch.tensor(531), None)

    assert torch.equal(found, expected)
    assert expected.abs().max() > 0.01
