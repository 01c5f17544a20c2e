"""Files of LoRA adapters: what is read of them, and everything wrong with them; merged checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lora_files import DOWN, QUERIES, halves, saved
from safetensors.torch import load_file
from torch import Tensor

from vllm_cosmos3 import Cosmos3
from vllm_cosmos3.checkpoint.adapters.adapter import Adapter
from vllm_cosmos3.cli import main
from vllm_cosmos3.engine_options import EngineConfig, EngineOptions, ParallelConfig
from vllm_cosmos3.errors import CheckpointError, Cosmos3Error, InvalidRequest, Unsupported
from vllm_cosmos3.generator.loading import load_models
from vllm_cosmos3.generator.models.components import check_files
from vllm_cosmos3.parallel.mesh import Mesh, close_mesh, init_mesh
from vllm_cosmos3.reasoner.required_tensors import check_folder, expected_tensors


def read(checkpoint: Path, *lora: Any, alpha: float | None = None) -> tuple[Adapter, ...]:
    return EngineConfig(model=checkpoint, lora=lora, lora_alpha=alpha).read_model().adapters


ALPHA = {"lora_alpha": 4}


def test_what_a_record_says(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path / "snow", halves(tiny_checkpoint, QUERIES, DOWN), **ALPHA)
    (one,) = read(tiny_checkpoint, f"{folder}:0.5")
    assert one.record() | {"sha256": ""} == {
        "name": "snow", "scale": 0.5, "dialect": "diffusers", "matrices": 2, "rank": 2, "sha256": "",
    }  # fmt: skip
    assert one.pairs[f"{QUERIES}.weight"].factor == 0.5 * 4 / 2
    (same,) = read(tiny_checkpoint, (folder, 0.5))
    (other,) = read(tiny_checkpoint, folder)
    assert same.digest == one.digest != other.digest


def test_paths_and_scales() -> None:
    found = EngineOptions("/", lora=["/a:0.5", Path("/b"), ("/c:1", -2), "/d:e", "/f:.5:1"]).lora
    assert found == (("/a", 0.5), ("/b", 1.0), ("/c:1", -2.0), ("/d:e", 1.0), ("/f:.5", 1.0))
    assert EngineOptions("/", lora="/a").lora == (("/a", 1.0),)
    assert EngineOptions("/", lora=found).lora == found
    for wrong in (1, [1], {"a": 1}, [("/a", "1")], [("/a", float("nan"))], [""]):
        with pytest.raises(InvalidRequest, match=r"lora is .*, must be PATH or PATH:SCALE"):
            EngineOptions("/", lora=wrong)


def test_an_alpha_that_no_file_says_is_asked_for(tiny_checkpoint: Path, tmp_path: Path) -> None:
    silent = saved(tmp_path / "silent", halves(tiny_checkpoint, QUERIES))
    with pytest.raises(InvalidRequest, match=r"lora_alpha is missing, must be given: .*silent does not say its alpha, and its rank is 2"):  # fmt: skip
        read(tiny_checkpoint, silent)
    (one,) = read(tiny_checkpoint, silent, alpha=8)
    assert one.pairs[f"{QUERIES}.weight"].factor == 4
    said = saved(tmp_path / "said", halves(tiny_checkpoint, QUERIES), **ALPHA)
    with pytest.raises(
        InvalidRequest, match=r"lora_alpha is 8\.0, must be left out: every adapter"
    ):
        read(tiny_checkpoint, said, alpha=8)
    with pytest.raises(InvalidRequest, match="must be given with lora"):
        read(tiny_checkpoint, alpha=8)


def without_b(tensors: dict[str, Tensor]) -> None:
    del tensors[f"transformer.{QUERIES}.lora_B.weight"]


def misshapen_a(tensors: dict[str, Tensor]) -> None:
    tensors[f"transformer.{QUERIES}.lora_A.weight"] = torch.zeros(2, 3)


def misshapen_b(tensors: dict[str, Tensor]) -> None:
    tensors[f"transformer.{QUERIES}.lora_B.weight"] = torch.zeros(3, 2)


def other_rank(tensors: dict[str, Tensor]) -> None:
    tensors[f"transformer.{QUERIES}.lora_B.weight"] = torch.zeros(64, 5)


def unknown(tensors: dict[str, Tensor]) -> None:
    tensors["layers.99.self_attn.to_q.lora_A.weight"] = torch.zeros(2, 64)


def of_embedding(tensors: dict[str, Tensor]) -> None:
    tensors["embed_tokens.lora_embedding_A"] = torch.zeros(2, 64)


def with_bias(tensors: dict[str, Tensor]) -> None:
    tensors[f"{QUERIES}.bias"] = torch.zeros(64)


def twice(tensors: dict[str, Tensor]) -> None:
    tensors[f"base_model.model.{QUERIES}.lora_A.other.weight"] = torch.zeros(2, 64)


def nothing(tensors: dict[str, Tensor]) -> None:
    tensors.clear()
    tensors["x"] = torch.zeros(1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_b, f"lacks lora_B beside transformer.{QUERIES}.lora_A.weight"),
        (misshapen_a, r"lora_A.weight is \[2, 3\], must be \[2, "),
        (misshapen_b, r"lora_B.weight is \[3, 2\], must be \["),
        (other_rank, r"lora_B.weight is \[64, 5\], must be \["),
        (unknown, "changes what this checkpoint has not: layers.99.self_attn.to_q.lora_A.weight"),
        (of_embedding, "has tensors that LoRA has not: embed_tokens.lora_embedding_A"),
        (with_bias, f"has tensors that LoRA has not: {QUERIES}.bias"),
        (twice, "holds several adapters for a matrix"),
        (nothing, "holds no LoRA tensors"),
    ],
)
def test_tensors_that_are_wrong(
    tiny_checkpoint: Path, tmp_path: Path, change: Callable[..., None], words: str
) -> None:
    tensors = halves(tiny_checkpoint, QUERIES, DOWN)
    change(tensors)
    with pytest.raises(CheckpointError, match=words):
        read(tiny_checkpoint, saved(tmp_path / "wrong", tensors, **ALPHA))


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ({"peft_type": "LOHA"}, Unsupported, "peft_type is 'LOHA', must be 'LORA'"),
        ({"bias": "all"}, Unsupported, "bias is 'all', must be 'none'"),
        ({"init_lora_weights": "pissa"}, Unsupported, "init_lora_weights is 'pissa'"),
        ({"modules_to_save": ["proj_in"]}, Unsupported, r"modules_to_save is \['proj_in'\]"),
        ({"lora_alpha": "8"}, CheckpointError, "lora_alpha is '8', must be a number"),
        ({"alpha_pattern": [8]}, CheckpointError, "alpha_pattern is"),
    ],
)
def test_settings_that_are_wrong(
    tiny_checkpoint: Path, tmp_path: Path, config: Any, error: type[Cosmos3Error], words: str
) -> None:  # fmt: skip
    folder = saved(tmp_path / "wrong", halves(tiny_checkpoint, QUERIES), **{**ALPHA, **config})
    with pytest.raises(error, match=words):
        read(tiny_checkpoint, folder)


def test_files_that_are_none(
    tiny_checkpoint: Path, tiny_checkpoint_fp8: Path, tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequest, match="where PATH is a file or folder"):
        read(tiny_checkpoint, tmp_path / "absent")
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    for path in (tmp_path, tmp_path / "adapter_model.bin"):
        with pytest.raises(InvalidRequest, match="pickles are not read"):
            read(tiny_checkpoint, path)
    (tmp_path / "broken.safetensors").write_bytes(b"no header")
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        read(tiny_checkpoint, tmp_path / "broken.safetensors")
    folder = saved(tmp_path / "good", halves(tiny_checkpoint, QUERIES), **ALPHA)
    with pytest.raises(InvalidRequest, match=r"lora is .*, must be left out: this checkpoint holds FP8 weights"):  # fmt: skip
        read(tiny_checkpoint_fp8, folder)


def test_merge_lora_writes_a_checkpoint(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every index stays right, types and metadata too; what did not change is the same file."""
    one = saved(tmp_path / "one", halves(tiny_checkpoint, QUERIES), **ALPHA)
    two = saved(tmp_path / "two", halves(tiny_checkpoint, QUERIES, "layers.0.self_attn.to_v"))
    out = tmp_path / "merged"
    assert main(["merge-lora", str(tiny_checkpoint), str(one), f"{two}:-0.5", str(out)]) == 2
    assert "--lora-alpha is missing, must be given" in capsys.readouterr().err
    assert not out.exists()
    assert main(["merge-lora", str(tiny_checkpoint), str(one), f"{two}:-0.5", str(out), "--lora-alpha", "6"]) == 0  # fmt: skip
    files = {path.relative_to(tiny_checkpoint) for path in tiny_checkpoint.rglob("*")}
    assert {path.relative_to(out) for path in out.rglob("*")} == files
    before, after = ({n: t for f in sorted((folder / "transformer").glob("*.safetensors")) for n, t in load_file(f).items()} for folder in (tiny_checkpoint, out))  # fmt: skip
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{QUERIES}.weight", "layers.0.self_attn.to_v.weight"}
    assert all(after[name].dtype == before[name].dtype for name in before)
    a, b = (
        halves(tiny_checkpoint, QUERIES)[f"transformer.{QUERIES}.lora_{x}.weight"] for x in "AB"
    )
    c, d = (halves(tiny_checkpoint, QUERIES, "layers.0.self_attn.to_v")[f"transformer.{QUERIES}.lora_{x}.weight"] for x in "AB")  # fmt: skip
    exact = before[f"{QUERIES}.weight"].float() + 2 * (b @ a) - 1.5 * (d @ c)
    assert torch.equal(after[f"{QUERIES}.weight"], exact.bfloat16())
    assert (out / "vae/config.json").samefile(tiny_checkpoint / "vae/config.json")
    model = EngineConfig(model=out).read_model()
    check_files(model)
    check_folder(out, expected_tensors(json.loads((out / "config.json").read_text())))
    assert main(["merge-lora", str(tiny_checkpoint), str(one), str(out)]) == 2
    assert f"{out} exists" in capsys.readouterr().err


def test_plan_counts_and_names_adapters(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path / "snow", halves(tiny_checkpoint, QUERIES), **ALPHA)
    assert main(["plan", str(tiny_checkpoint), "--lora", f"{folder}:2", "--lora", str(folder)]) == 0
    assert f"{tiny_checkpoint} + snow:2 + snow:1, bfloat16" in capsys.readouterr().out


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    mesh = init_mesh(ParallelConfig())
    yield mesh
    close_mesh(mesh)


@pytest.mark.parametrize("options", [{}, {"quantization": "fp8"}, {"enable_layerwise_offload": True, "und_residency": "host"}], ids=str)  # fmt: skip
def test_merged_while_loading_as_before_it(
    options: dict[str, Any], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Bit by bit what the checkpoint that merge-lora writes gives, also in FP8 and from the host."""
    folder = saved(tmp_path / "snow", halves(tiny_checkpoint, QUERIES, DOWN), **ALPHA)
    assert main(["merge-lora", str(tiny_checkpoint), str(folder), str(tmp_path / "merged")]) == 0
    found, lists = [], []
    sources = (tiny_checkpoint, folder), (tmp_path / "merged", []), (tiny_checkpoint, [])
    for path, lora in sources:
        with Cosmos3(path, device="cpu", lora=lora, **options) as model:
            made = model.generate("a boat", size="64x64", num_frames=1, num_inference_steps=1, seed=1, output_type="latent")  # fmt: skip
        found.append(made.latents["vision"])
        lists.append([each["name"] for each in made.effective["adapters"]])
    merging, merged, without = found
    assert np.array_equal(merging, merged)
    assert not np.allclose(merging, without, atol=1e-2)
    assert lists == [["snow"], [], []]


def test_changes_that_the_generator_does_not_use(
    tiny_checkpoint: Path, tmp_path: Path, mesh: Mesh, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved(tmp_path / "snow", halves(tiny_checkpoint, QUERIES, "lm_head"), **ALPHA)
    config = EngineConfig(model=tiny_checkpoint, lora=folder)
    with caplog.at_level("WARNING", "vllm_cosmos3"):
        load_models(config.read_model(), config, mesh, torch.device("cpu"))
    assert "snow: the generator does not use lm_head.weight" in caplog.text
