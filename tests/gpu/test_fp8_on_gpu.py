"""FP8 and the step cache at Nano's width: products against torch, graphs, and the error by step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_generator_on_gpu import IMAGE, VIDEO, apart, latents, started
from torch import Tensor

from vllm_cosmos3.engine_options import EngineConfig, ParallelConfig
from vllm_cosmos3.generator import prediction
from vllm_cosmos3.generator.models.quantization import (
    dequantized,
    product,
    quantized_by_tensor,
    quantized_by_token,
    quantized_rows,
)
from vllm_cosmos3.generator.pipeline import Pipeline
from vllm_cosmos3.parallel.mesh import close_mesh, init_mesh

pytestmark = pytest.mark.gpu

NATIVE = {"fp8_first_steps": 0, "fp8_last_steps": 0, "fp8_text": "native"}
SHAPES = {"qkv": (6144, 4096), "out": (4096, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)}
ROWS = (1, 7, 920, 2880)


def noise(device: torch.device, *shape: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(sum(shape))
    return torch.randn(shape, device=device, generator=generator)


def load(folder: Path, device: torch.device, **options: Any) -> Pipeline:
    config = EngineConfig(model=folder, device=str(device), load_format="dummy", **options)
    mesh = init_mesh(ParallelConfig())
    try:
        return Pipeline.load(config, mesh, device)
    finally:
        close_mesh(mesh)


@pytest.fixture(scope="module")
def native(wide_checkpoint: Path, device: torch.device) -> Iterator[Pipeline]:
    """The weights of ``pipeline`` quantized, activations too in every step."""
    yield load(wide_checkpoint, device, quantization="fp8", **NATIVE)
    torch.cuda.empty_cache()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", SHAPES)
def test_products_are_those_of_the_dequantized_operands(
    device: torch.device, name: str, rows: int
) -> None:
    outputs, inputs = SHAPES[name]
    x, w = noise(device, rows, inputs).bfloat16(), noise(device, outputs, inputs) * 0.02
    wq, scale = quantized_rows(w)
    scale = scale.squeeze(1)
    for xq, own in (
        quantized_by_token(x),
        quantized_by_tensor(x, x.float().abs().amax()[None] / 448),
    ):
        made = product(xq, own, wq, scale, torch.bfloat16)
        exact = (xq.float() * own) @ dequantized(wq, scale, torch.float32).T
        assert apart(made, exact) <= 5e-3
        assert made.shape == (rows, outputs)


@pytest.mark.parametrize("rows", ROWS)
def test_joined_matrices_give_the_bits_of_each_alone(device: torch.device, rows: int) -> None:
    x = noise(device, rows, 4096).bfloat16()
    xq, own = quantized_by_tensor(x, torch.full((1,), 6 / 448, device=device))
    parts = [noise(device, outputs, 4096) * 0.02 for outputs in (4096, 1024, 1024)]
    quantized = [(q, s.squeeze(1)) for q, s in map(quantized_rows, parts)]
    each = [product(xq, own, q, s, torch.bfloat16) for q, s in quantized]
    joined = torch.cat([q.view(torch.uint8) for q, _ in quantized]).view(torch.float8_e4m3fn)
    made = product(xq, own, joined, torch.cat([s for _, s in quantized]), torch.bfloat16)
    assert torch.equal(made, torch.cat(each, dim=1))


def test_kernels_quantize_as_torch_does(device: torch.device) -> None:
    """But for values between two steps of FP8, which the kernels may round to either."""
    x = noise(device, 920, 4096).bfloat16()
    xq, scale = quantized_by_token(x)
    expected, expected_scale = quantized_rows(x)
    assert torch.allclose(scale, expected_scale, rtol=1e-5)
    assert (xq.float() != expected.float()).float().mean() <= 1e-3


@pytest.mark.parametrize("fields", [IMAGE, VIDEO], ids=["image", "video"])
def test_errors_by_step(
    pipeline: Pipeline, native: Pipeline, wide_checkpoint: Path, device: torch.device, fields: Any
) -> None:
    """Relative errors of the latents in each mode: printed, and bounded far above what is usual."""
    fields, steps = fields | {"num_inference_steps": 12}, 12
    sea = {"step_cache": "sea"}
    policy = load(wide_checkpoint, device, quantization="fp8")
    exact = by_step(pipeline, fields, steps)
    for name, model, more in (
        ("fp8, every step", native, {}),
        ("fp8, 3 + 3 steps a16", policy, {}),
        ("sea", pipeline, sea),
        ("fp8, 3 + 3 steps a16, and sea", policy, sea),
    ):
        errors = [
            apart(x, y) for x, y in zip(by_step(model, fields | more, steps), exact, strict=True)
        ]
        print(f"{name}: {', '.join(f'{error:.1e}' for error in errors)}")  # noqa: T201
        assert 0 < errors[-1] < 1, name


def by_step(pipeline: Pipeline, fields: Any, steps: int) -> list[Tensor]:
    state, found = started(pipeline, fields), []
    for _ in range(steps):
        pipeline.step(state)
        found.append(state.streams[0].x if state.streams else state.denoised[0]["vision"])
    return found


@pytest.mark.parametrize("more", [{}, {"step_cache": "sea", "step_cache_threshold": 0.5}])
def test_graphs_of_both_precisions_equal_launched_kernels(
    wide_checkpoint: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch, more: Any
) -> None:
    """The steps of a request change their mode twice; each has a graph of its own."""
    model = load(wide_checkpoint, device, quantization="fp8")
    fields = IMAGE | {"num_inference_steps": 16} | more
    replayed = latents(model, fields, 16)
    monkeypatch.setattr(prediction, "launches_matter", lambda *_: False)
    launched = latents(model, fields, 16)
    assert apart(replayed, launched) <= 5e-2


def test_half_the_bytes(pipeline: Pipeline, native: Pipeline) -> None:
    plain, quantized = (
        sum(p.nbytes for layer in each.transformer.layers for p in layer.parameters())
        for each in (pipeline, native)
    )
    assert 0.5 < quantized / plain < 0.51
