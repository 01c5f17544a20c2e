"""The quantization of FP8 revisions: their step policy, and everything wrong with their files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vllm_cosmos3.checkpoint.config import read_config
from vllm_cosmos3.checkpoint.quantization import ON_THE_FLY, Quantization
from vllm_cosmos3.checkpoint.synthetic import write_checkpoint
from vllm_cosmos3.checkpoint.tensors import layer_matrices, scale_tensors, transformer_tensors
from vllm_cosmos3.cli import main
from vllm_cosmos3.engine_options import EngineConfig
from vllm_cosmos3.errors import CheckpointError, Cosmos3Error, InvalidRequest, Unsupported
from vllm_cosmos3.generator.models.components import check_files

POLICY = "quantization_config in transformer/config.json"
STEPS = {"count": 3, "mode": "a16"}


@pytest.fixture(scope="module")
def unfilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp8") / "nano"
    write_checkpoint(folder, size="nano", quantization="fp8", weights=False)
    return folder


def changed(folder: Path, to: Path, change: Any) -> Path:
    """A copy whose quantization is what ``change`` makes of it."""
    shutil.copytree(folder, to)
    file = to / "transformer" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] = change(config["quantization_config"])
    file.write_text(json.dumps(config))
    return to


def with_policy(**fields: Any) -> Any:
    def change(config: dict[str, Any]) -> dict[str, Any]:
        policy = config["runtime"]["diffusion_step_policy"] | fields
        policy = {name: value for name, value in policy.items() if value != "missing"}
        return {**config, "runtime": {"diffusion_step_policy": policy}}

    return change


def test_the_published_policy(unfilled: Path) -> None:
    found = read_config(unfilled).quantization
    assert found == Quantization(
        stored=True, first_steps=3, last_steps=3, overlap="a16", text="a16"
    )
    assert found.record()["scales"] == "checkpoint"


@pytest.mark.parametrize(
    ("steps", "overlap", "expected"),
    [
        (1, "a16", "n"),
        (2, "a16", "aa"),
        (2, "native", "nn"),
        (5, "a16", "aaaaa"),
        (5, "native", "aanaa"),
        (6, "a16", "aaaaaa"),
        (7, "a16", "aaanaaa"),
        (9, "native", "aaannnaaa"),
    ],
)
def test_modes_by_step(steps: int, overlap: str, expected: str) -> None:
    policy = Quantization(stored=True, first_steps=3, last_steps=3, overlap=overlap)
    made = ["n" if policy.native(index, steps) else "a" for index in range(steps)]
    assert "".join(made) == expected


def test_without_a_policy_every_step_is_native(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "t2i", kind="distilled-t2i", quantization="fp8", weights=False)
    found = read_config(tmp_path / "t2i").quantization
    assert found == Quantization(stored=True)
    assert all(found.native(index, 4) for index in range(4))
    assert found.text == "native"


def test_counts_of_windows_without_effect(unfilled: Path, tmp_path: Path) -> None:
    change = with_policy(
        first_steps={"count": 5, "mode": "native"}, last_steps=STEPS | {"count": 1}
    )
    found = read_config(changed(unfilled, tmp_path / "changed", change)).quantization
    assert (found.first_steps, found.last_steps) == (0, 1)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (with_policy(schema_version=2), Unsupported, "schema_version is 2, must be 1"),
        (with_policy(type="every_n"), Unsupported, "type is 'every_n', must be 'first_last_n'"),
        (with_policy(scope=["text"]), Unsupported, "scope is"),
        (with_policy(scope=["transformer", "vae"]), Unsupported, "scope is"),
        (with_policy(default_mode="a16"), Unsupported, "default_mode is 'a16'"),
        (with_policy(overlap="both"), Unsupported, "overlap is 'both', must be native or a16"),
        (with_policy(reasoner="w4"), Unsupported, "reasoner is 'w4', must be native or a16"),
        (with_policy(first_steps=3), Unsupported, "first_steps is 3, must be an object"),
        (with_policy(last_steps=STEPS | {"count": -1}), Unsupported, "last_steps.count is -1"),
        (with_policy(last_steps=STEPS | {"count": True}), Unsupported, "last_steps.count is True"),
        (with_policy(first_steps=STEPS | {"mode": "w"}), Unsupported, "first_steps.mode is 'w'"),
        (with_policy(warmup=2), Unsupported, "warmup is 2, must be left out"),
        (with_policy(overlap="missing", type="missing"), CheckpointError, "lacks overlap, type"),
        (lambda c: c | {"quant_algo": "NVFP4"}, Unsupported, "quant_algo 'NVFP4'"),
        (lambda c: c | {"quant_method": "torchao"}, Unsupported, "quant_method 'torchao'"),
        (lambda _: "fp8", CheckpointError, "must be an object"),
        (lambda c: c | {"runtime": {"diffusion_step_policy": "a16"}}, CheckpointError, "must be an object"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_refused(
    unfilled: Path, tmp_path: Path, change: Any, error: type[Cosmos3Error], words: str
) -> None:
    with pytest.raises(error, match=words):
        read_config(changed(unfilled, tmp_path / "changed", change))


@pytest.mark.parametrize(("size", "layers", "count"), [("nano", 36, 1_822), ("super", 64, 3_222)])
def test_counts_of_the_published_revisions(
    tmp_path: Path, size: str, layers: int, count: int
) -> None:
    """Fourteen matrices a layer with two scales each, and eight norms; the rest as in bfloat16."""
    write_checkpoint(tmp_path / size, size=size, quantization="fp8", weights=False)
    tensors = transformer_tensors(read_config(tmp_path / size).transformer)
    assert len(layer_matrices(tensors)) == 14 * layers
    assert len(tensors) + len(scale_tensors(tensors)) == count


MATRIX = "layers.1.self_attn.add_q_proj"


def without(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{MATRIX}.weight_scale"]


def in_bfloat16(tensors: dict[str, Tensor]) -> None:
    tensors[f"{MATRIX}.weight"] = tensors[f"{MATRIX}.weight"].bfloat16()


def half_scale(tensors: dict[str, Tensor]) -> None:
    tensors[f"{MATRIX}.weight_scale"] = tensors[f"{MATRIX}.weight_scale"].half()


def smooth(tensors: dict[str, Tensor]) -> None:
    tensors[f"{MATRIX}.pre_quant_scale"] = torch.ones(64)


def one_dimension(tensors: dict[str, Tensor]) -> None:
    tensors[f"{MATRIX}.weight_scale"] = tensors[f"{MATRIX}.weight_scale"].reshape(1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without, f"missing: {MATRIX}.weight_scale"),
        (in_bfloat16, f"of another type: {MATRIX}.weight BF16 instead of F8_E4M3"),
        (half_scale, f"of another type: {MATRIX}.weight_scale F16 instead of F32"),
        (smooth, f"unexpected: {MATRIX}.pre_quant_scale"),
        (one_dimension, ""),
    ],
)
def test_tensors_that_are_wrong(
    tiny_checkpoint_fp8: Path, tmp_path: Path, change: Any, words: str
) -> None:
    folder = rewritten(tiny_checkpoint_fp8, tmp_path / "changed", change)
    model = read_config(folder)
    if not words:
        check_files(model)
        return
    with pytest.raises(CheckpointError, match=words):
        check_files(model)


def test_a_bfloat16_checkpoint_with_an_fp8_matrix(tiny_checkpoint: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{MATRIX}.weight"] = tensors[f"{MATRIX}.weight"].to(torch.float8_e4m3fn)
        tensors[f"{MATRIX}.weight_scale"] = torch.tensor(1.0)

    folder = rewritten(tiny_checkpoint, tmp_path / "changed", change)
    with pytest.raises(CheckpointError, match=r"unexpected.*of another type"):
        check_files(read_config(folder))


def rewritten(folder: Path, to: Path, change: Any) -> Path:
    """A copy with other tensors, all in the first of its files."""
    shutil.copytree(folder, to)
    first, *others = sorted((to / "transformer").glob("*.safetensors"))
    tensors = {n: tensor for file in (first, *others) for n, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, first, {"format": "pt"})
    for file in others:
        save_file({}, file, {"format": "pt"})
    return to


def test_options_change_the_policy(unfilled: Path, tmp_path: Path) -> None:
    stored = EngineConfig(model=unfilled, fp8_first_steps=0, fp8_text="native").read_model()
    assert stored.quantization == Quantization(stored=True, last_steps=3)
    write_checkpoint(tmp_path / "nano", size="nano", weights=False)
    assert EngineConfig(model=tmp_path / "nano").read_model().quantization is None
    made = EngineConfig(model=tmp_path / "nano", quantization="fp8").read_model()
    assert made.quantization == ON_THE_FLY
    for options, words in (
        ({"model": unfilled, "quantization": "none"}, "quantization is 'none', must be fp8 or left out"),
        ({"model": tmp_path / "nano", "fp8_last_steps": 2}, "fp8_last_steps is 2, must be left out, or"),
    ):  # fmt: skip
        with pytest.raises(InvalidRequest, match=words):
            EngineConfig(**options).read_model()


def test_plan_of_fp8(capsys: pytest.CaptureFixture[str]) -> None:
    """Nano's layers are 13.9 GB in bfloat16 for each tower."""
    needed = {}
    for flags in ((), ("--quantization", "fp8")):
        assert main(["plan", "nano", "--json", *flags]) == 0
        needed[flags] = json.loads(capsys.readouterr().out)["weights"]["generation"]
    exact, half = needed.values()
    assert 0.5 < half / exact < 0.502
    assert main(["plan", "nano", "--quantization", "fp8"]) == 0
    assert capsys.readouterr().out.startswith("nano, bfloat16 and fp8, quantized at load, on 1 GPU")
