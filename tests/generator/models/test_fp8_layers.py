"""FP8 products in whole runs: against separate products of torch, and against dequantized weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import Ranks
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vllm_cosmos3.checkpoint.tensors import layer_matrices
from vllm_cosmos3.engine_options import EngineConfig, ParallelConfig
from vllm_cosmos3.errors import CheckpointError
from vllm_cosmos3.generator.models.quantization import (
    Fp8Linear,
    product,
    quantized_by_tensor,
    quantized_by_token,
    quantized_rows,
)
from vllm_cosmos3.generator.output import Output
from vllm_cosmos3.generator.pipeline import Pipeline
from vllm_cosmos3.parallel.mesh import Mesh, close_mesh, init_mesh
from vllm_cosmos3.request.planner import make_plan
from vllm_cosmos3.request.request import GenerateRequest

REQUEST: dict[str, Any] = {
    "prompt": "A paper boat",
    "negative_prompt": "blurry",
    "num_frames": 5,
    "size": "96x64",
    "seed": 7,
    "num_inference_steps": 8,
    "generate_sound": True,
    "output_type": "latent",
}
MATRICES = {  # of a layer of one tower: the joined ones, as the files name them
    "qkv": (("to_q", "add_q_proj"), ("to_k", "add_k_proj"), ("to_v", "add_v_proj")),
    "out": (("to_out", "to_add_out"),),
    "kv": (("to_k", "add_k_proj"), ("to_v", "add_v_proj")),
}
MLP = {"up": ("gate_proj", "up_proj"), "down": ("down_proj",)}


def made(pipeline: Pipeline, **fields: Any) -> dict[str, np.ndarray]:
    plan = make_plan(GenerateRequest(**REQUEST | fields), pipeline.model, pipeline.tokenizer)
    state = pipeline.encode(plan)
    while not state.done:
        pipeline.step(state)
    pipeline.decode(state)
    return pipeline.finish(state).samples[0].latents


def load(folder: Path, **options: Any) -> Pipeline:
    mesh = init_mesh(ParallelConfig())
    try:
        config = EngineConfig(model=folder, dtype="float32", **options)
        return Pipeline.load(config, mesh, "cpu")
    finally:
        close_mesh(mesh)


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(a[name], b[name]) for name in a)


def furthest(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)


@pytest.fixture(scope="module")
def stored(tiny_checkpoint_fp8: Path) -> dict[str, Tensor]:
    """The tensors of the files."""
    files = (tiny_checkpoint_fp8 / "transformer").glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def names_of(module: str) -> list[str]:
    """The matrices of the files that a linear layer of ours holds, in its order."""
    *path, name = module.split(".")
    text = path[0] == "understanding"
    layer = "2" if path[-1] == "last" else path[-1]
    if name in MLP:
        return [f"layers.{layer}.mlp{'' if text else '_moe_gen'}.{each}" for each in MLP[name]]
    return [f"layers.{layer}.self_attn.{pair[not text]}" for pair in MATRICES[name]]


def linears(pipeline: Pipeline) -> dict[str, nn.Module]:
    found = pipeline.transformer.named_modules()
    return {n: m for n, m in found if isinstance(getattr(m, "quant_method", None), Fp8Linear)}


def test_native_products_are_those_of_each_matrix_alone(
    tiny_checkpoint_fp8: Path, stored: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit in a whole run: one ``torch._scaled_mm`` for each tensor, with its two scales.

    With scales that are scalars torch multiplies in another order, and the last bits differ.
    """
    pipeline = load(tiny_checkpoint_fp8, fp8_first_steps=0, fp8_last_steps=0, fp8_text="native")
    joined = made(pipeline, num_inference_steps=3)
    names = {id(module): names_of(name) for name, module in linears(pipeline).items()}
    assert len(names) == 3 * 4 + 2 * 4 + 1
    calls = 0

    def apply(_: Fp8Linear, layer: nn.Module, x: Tensor, bias: object = None) -> Tensor:
        nonlocal calls
        calls += 1
        parts = []
        for name in names[id(layer)]:
            weight, scale = stored[f"{name}.weight"], stored[f"{name}.weight_scale"]
            own = stored[f"{name}.input_scale"]
            xq = (x.float() / own).clamp(-448, 448).to(torch.float8_e4m3fn)
            matrices, kind = (xq, weight.t()), {"out_dtype": x.dtype}
            scales = {"scale_a": own.repeat(len(x), 1), "scale_b": scale.repeat(1, len(weight))}
            part = torch._scaled_mm(*matrices, **scales, **kind)
            scalar = torch._scaled_mm(*matrices, scale_a=own, scale_b=scale, **kind)
            assert (part - scalar).norm() <= 1e-6 * scalar.norm()
            parts.append(part)
        return torch.cat(parts, dim=1)

    monkeypatch.setattr(Fp8Linear, "apply", apply)
    pipeline.texts.clear()
    assert equal(joined, made(pipeline, num_inference_steps=3))
    assert calls > 3 * 3 * 4


def test_a16_products_are_those_of_the_dequantized_matrices(
    tiny_checkpoint_fp8: Path, stored: dict[str, Tensor], tmp_path: Path
) -> None:
    """A checkpoint of matrices dequantized in float32, run without any quantization."""
    exact = tmp_path / "exact"
    shutil.copytree(tiny_checkpoint_fp8, exact)
    config = json.loads((exact / "transformer" / "config.json").read_text())
    del config["quantization_config"]
    (exact / "transformer" / "config.json").write_text(json.dumps(config))
    for file in (exact / "transformer").glob("*.safetensors"):
        tensors = load_file(file)
        for name in layer_matrices({n: tuple(t.shape) for n, t in tensors.items()}):
            scale = stored[f"{name}_scale"]
            tensors[name] = tensors[name].float() * scale
        kept = {n: t for n, t in tensors.items() if "_scale" not in n and "_quantizer" not in n}
        save_file(kept, file, {"format": "pt"})
    everywhere = {"fp8_first_steps": 8, "fp8_last_steps": 0, "fp8_text": "a16"}
    a16, native = load(tiny_checkpoint_fp8, **everywhere), load(tiny_checkpoint_fp8)
    expected = made(load(exact))
    assert furthest(made(a16), expected) <= 1e-4
    assert furthest(made(native), expected) > 1e-2  # steps 3 and 4 alone quantize activations


def test_the_policy_is_that_of_the_steps(
    tiny_checkpoint_fp8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a layer of each tower is multiplied with, step by step; two requests take turns."""
    pipeline = load(tiny_checkpoint_fp8)
    seen: list[tuple[str, bool]] = []
    apply = Fp8Linear.apply
    places = {id(module): name for name, module in linears(pipeline).items()}

    def noted(self: Fp8Linear, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if places[id(layer)] in ("layers.0.qkv", "understanding.layers.0.qkv"):
            seen.append((places[id(layer)].partition(".")[0], self._precision.native))
        return apply(self, layer, x, bias)

    monkeypatch.setattr(Fp8Linear, "apply", noted)
    plans = [
        make_plan(GenerateRequest(**REQUEST | more), pipeline.model, pipeline.tokenizer)
        for more in ({}, {"num_inference_steps": 1})
    ]
    long, short = (pipeline.encode(plan) for plan in plans)
    for index in range(8):
        pipeline.step(long)
        if index == 1:
            pipeline.step(short)
    text = [native for tower, native in seen if tower == "understanding"]
    steps = [native for tower, native in seen if tower == "layers"]
    assert text == [False] * 4  # both prompts of each request
    assert steps == [False, False, True, False, True, True, False, False, False]


def test_on_the_fly_weights_have_a_scale_for_each_output(tiny_checkpoint_fp32: Path) -> None:
    pipeline, exact = load(tiny_checkpoint_fp32, quantization="fp8"), load(tiny_checkpoint_fp32)
    files = (tiny_checkpoint_fp32 / "transformer").glob("*.safetensors")
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    for name, module in linears(pipeline).items():
        whole = torch.cat([tensors[f"{each}.weight"] for each in names_of(name)])
        scale = whole.abs().amax(dim=1) / 448
        assert torch.equal(module.weight_scale, scale), name
        back = module.weight.float() * scale.unsqueeze(1)
        assert ((back - whole).abs() <= whole.abs() * 2**-4 + scale.unsqueeze(1) * 2**-10).all()
        assert not hasattr(module, "input_scale")
    quantized, plain = made(pipeline), made(exact)
    for stream in plain:
        relative = np.linalg.norm(quantized[stream] - plain[stream]) / np.linalg.norm(plain[stream])
        assert 1e-4 < relative < 0.2, stream


def test_activations_have_a_scale_for_each_token() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1e-3], [1.0], [50.0], [1e4], [0.0]]
    )
    xq, scale = quantized_by_token(x)
    assert torch.equal(scale[:4, 0], x[:4].abs().amax(dim=1) / 448)
    assert ((xq.float() * scale - x).abs() <= x.abs() * 2**-4 + scale * 2**-10).all()
    w, w_scale = quantized_rows(torch.randn(32, 64, generator=torch.Generator().manual_seed(1)))
    y = product(xq, scale, w, w_scale.squeeze(1), torch.float32)
    expected = (xq.float() * scale).double() @ (w.float() * w_scale).double().T
    assert torch.allclose(y.double(), expected, rtol=1e-4, atol=1e-6)


def test_static_scales_saturate() -> None:
    xq, scale = quantized_by_tensor(torch.tensor([[1.0, -1e6, 1e6]]), torch.tensor([0.5]))
    assert xq.float().tolist() == [[2.0, -448.0, 448.0]]
    assert scale.tolist() == [[0.5]]


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_none(tiny_checkpoint_fp8: Path, tmp_path: Path, value: float) -> None:
    shutil.copytree(tiny_checkpoint_fp8, tmp_path / "changed")
    name = "layers.1.mlp_moe_gen.down_proj.input_scale"
    for file in (tmp_path / "changed" / "transformer").glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            save_file(tensors | {name: torch.tensor(value)}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name} is {value:g}, must be a number above 0"):
        load(tmp_path / "changed")


MESHES = [
    ParallelConfig(ulysses_degree=2),
    ParallelConfig(tensor_parallel_size=2),
    ParallelConfig(cfg_parallel_size=2, ulysses_degree=2),
]
FEW = {"generate_sound": False, "num_frames": 1, "num_inference_steps": 7}
WAYS: dict[str, dict[str, Any]] = {
    "stored": {},
    "on the fly": {"quantization": "fp8"},
    "on the host": {"und_residency": "host", "enable_layerwise_offload": True},
    "dummy": {"load_format": "dummy"},
}


def on_mesh(mesh: Mesh, fp8: Path, exact: Path, parallel: ParallelConfig) -> dict[str, Output]:
    found = {}
    for name, options in WAYS.items():
        folder = exact if name == "on the fly" else fp8
        config = EngineConfig(model=folder, dtype="float32", **asdict(parallel), **options)
        pipeline = Pipeline.load(config, mesh, "cpu")
        found[name] = made(pipeline, **FEW)
    found["with sea"] = made(pipeline, **FEW, step_cache="sea", step_cache_threshold=1.0)
    return found


@pytest.fixture(scope="module")
def alone(ranks: Ranks, tiny_checkpoint_fp8: Path, tiny_checkpoint_fp32: Path) -> Any:
    folders = tiny_checkpoint_fp8, tiny_checkpoint_fp32
    (found,) = ranks(ParallelConfig(), on_mesh, *folders, ParallelConfig())
    return found


@pytest.mark.parametrize("parallel", MESHES, ids=lambda p: "x".join(map(str, p.degrees.values())))
def test_a_mesh_equals_one_rank(
    ranks: Ranks,
    tiny_checkpoint_fp8: Path,
    tiny_checkpoint_fp32: Path,
    alone: dict[str, dict[str, np.ndarray]],
    parallel: ParallelConfig,
) -> None:
    """Under tensor parallelism partial sums are rounded apart, and FP8 makes more of a last bit."""
    folders = tiny_checkpoint_fp8, tiny_checkpoint_fp32
    first, *others = ranks(parallel, on_mesh, *folders, parallel)
    bound = 1e-5 if parallel.tensor_parallel_size == 1 else 0.05
    for name, expected in alone.items():
        x, y = first[name]["vision"], expected["vision"]
        assert np.linalg.norm(x - y) <= bound * np.linalg.norm(y), name
        for other in others:
            assert np.array_equal(other[name]["vision"], x), name


def test_weights_on_the_host_change_no_bit(alone: dict[str, dict[str, np.ndarray]]) -> None:
    assert equal(alone["stored"], alone["on the host"])
    assert not equal(alone["dummy"], alone["with sea"])


def test_effective_says_what_was_used(tiny_checkpoint_fp8: Path) -> None:
    pipeline = load(tiny_checkpoint_fp8, fp8_first_steps=1)
    plan = make_plan(GenerateRequest(**REQUEST), pipeline.model, pipeline.tokenizer)
    assert plan.effective["quantization"] == {
        "weights": "fp8",
        "scales": "checkpoint",
        "first_steps_a16": 1,
        "last_steps_a16": 3,
        "text": "a16",
    }
    plain = replace(pipeline.model, quantization=None)
    assert (
        make_plan(GenerateRequest(**REQUEST), plain, pipeline.tokenizer).effective["quantization"]
        is None
    )
