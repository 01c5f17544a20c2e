"""Loading: the right values arrive, and everything wrong with a folder is said in one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vllm_cosmos3.checkpoint.config import read_config
from vllm_cosmos3.checkpoint.shards import STEM, Target, check_weights, identity_table
from vllm_cosmos3.checkpoint.tensors import transformer_tensors
from vllm_cosmos3.checkpoint.weights import load_dummy_weights, load_weights
from vllm_cosmos3.errors import CheckpointError
from vllm_cosmos3.generator.models.weight_tables import weight_table

SHAPES = {
    "proj.weight": (4, 3),
    "proj.bias": (4,),
    "norm.weight": (3,),
    "action_modality_embed": (3,),
    "lm_head.weight": (9, 3),
}
NEEDED = {name: Target(name) for name in SHAPES if name != "lm_head.weight"}


class Small(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.proj = nn.Linear(3, 4, dtype=dtype)
        self.norm = nn.LayerNorm(3, bias=False, dtype=dtype)
        self.action_modality_embed = nn.Parameter(torch.zeros(3, dtype=dtype))


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def write(folder: Path, *shards: dict[str, Tensor]) -> None:
    """One file, or several with an index, as published."""
    if len(shards) == 1:
        save_file(shards[0], folder / f"{STEM}.safetensors")
        return
    places = {}
    for number, shard in enumerate(shards, start=1):
        file = f"{STEM}-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file)
        places |= dict.fromkeys(shard, file)
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def halves(whole: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    names = sorted(whole)
    first = names[: len(names) // 2]
    return {n: whole[n] for n in first}, {n: whole[n] for n in names if n not in first}


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_arrive(tmp_path: Path, shards: int, dtype: torch.dtype) -> None:
    whole = tensors()
    write(tmp_path, *([whole] if shards == 1 else halves(whole)))
    module = Small(dtype)
    load_weights(module, NEEDED, tmp_path, SHAPES)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter.data, whole[name].to(dtype)), name


def test_both_spellings_and_known_leaks_are_accepted(tmp_path: Path) -> None:
    whole = tensors()
    whole["action_modality_embed.weight"] = whole.pop("action_modality_embed")
    whole["action_pos_embed.weight"] = torch.zeros(2)
    whole["layers.0.mlp.up_proj.weight_quantizer._scale"] = torch.zeros(2)
    write(tmp_path, whole)
    module = Small()
    load_weights(module, NEEDED, tmp_path, SHAPES)
    assert torch.equal(module.action_modality_embed, whole["action_modality_embed.weight"])


def test_what_is_not_needed_may_be_absent(tmp_path: Path) -> None:
    whole = tensors()
    del whole["lm_head.weight"]
    write(tmp_path, whole)
    module = Small()
    load_weights(module, NEEDED, tmp_path, SHAPES)
    assert torch.equal(module.proj.weight, whole["proj.weight"])


def test_everything_wrong_is_in_one_error(tmp_path: Path) -> None:
    whole = tensors()
    del whole["proj.bias"], whole["norm.weight"]
    whole["proj.weight"] = torch.zeros(3, 4)
    whole["vision.weight"] = torch.zeros(1)
    write(tmp_path, whole)
    module = Small()
    before = module.action_modality_embed.clone()
    with pytest.raises(CheckpointError) as caught:
        load_weights(module, NEEDED, tmp_path, SHAPES)
    assert str(caught.value) == (
        f"tensors in {tmp_path} are missing: norm.weight, proj.bias; unexpected: vision.weight; "
        "of another shape: proj.weight [3, 4] instead of [4, 3]"
    )
    assert torch.equal(module.action_modality_embed, before)


def test_many_problems_are_counted(tmp_path: Path) -> None:
    write(tmp_path, {f"extra.{i:02}": torch.zeros(1) for i in range(20)} | tensors())
    with pytest.raises(CheckpointError, match="and 12 more"):
        load_weights(Small(), NEEDED, tmp_path, SHAPES)


@pytest.mark.parametrize("keep", [0, 4, 100, -1], ids=["empty", "no header", "half header", "tail"])
def test_a_truncated_shard_is_named(tmp_path: Path, keep: int) -> None:
    write(tmp_path, *halves(tensors()))
    shard = tmp_path / f"{STEM}-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=f"{shard.name} is truncated or corrupt"):
        load_weights(Small(), NEEDED, tmp_path, SHAPES)


def test_a_corrupt_header_is_named(tmp_path: Path) -> None:
    write(tmp_path, tensors())
    file = tmp_path / f"{STEM}.safetensors"
    content = bytearray(file.read_bytes())
    content[10:20] = b"\xff" * 10
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{file.name} is truncated or corrupt"):
        load_weights(Small(), NEEDED, tmp_path, SHAPES)


@pytest.mark.parametrize("shards", [1, 2])
def test_an_absent_shard_is_named(tmp_path: Path, shards: int) -> None:
    write(tmp_path, *([tensors()] if shards == 1 else halves(tensors())))
    shard = sorted(tmp_path.glob("*.safetensors"))[-1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing in {tmp_path}"):
        load_weights(Small(), NEEDED, tmp_path, SHAPES)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {"proj.weight": 1}}'])
def test_an_index_without_map_is_named(index: str, tmp_path: Path) -> None:
    write(tmp_path, *halves(tensors()))
    (tmp_path / f"{STEM}.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match="has no weight_map"):
        load_weights(Small(), NEEDED, tmp_path, SHAPES)


def test_a_transformer_without_one_tensor_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The real table and the real layout: the name of the tensor reaches the user."""
    folder = tmp_path / "transformer"
    shutil.copytree(tiny_checkpoint / "transformer", folder)
    name = "layers.1.self_attn.add_q_proj.weight"
    for file in folder.glob("*.safetensors"):
        content = load_file(file)
        if content.pop(name, None) is not None:
            save_file(content, file)
    shapes = transformer_tensors(read_config(tiny_checkpoint).transformer)
    with pytest.raises(CheckpointError, match=f"missing: {name}"):
        load_weights(nn.Module(), identity_table(shapes), folder, shapes)


@pytest.mark.parametrize(
    "name",
    [
        "layers.0.self_attn.k_norm_und_for_gen.weight",
        "layers.2.self_attn.k_norm_und_for_gen.weight",
        "layers.1.mlp.up_proj.weight",
        "layers.1.mlp_moe_gen.down_proj.weight",
        "action_proj_in.fc.weight",
    ],
)
def test_tensors_of_edge_that_are_absent_renamed_or_misshapen(
    tiny_edge_fp32: Path, tmp_path: Path, name: str
) -> None:
    config = read_config(tiny_edge_fp32).transformer
    shapes, table = transformer_tensors(config), weight_table(config)

    def problem(change: Callable[[dict[str, Tensor]], None]) -> str:
        folder = tmp_path / "transformer"
        shutil.copytree(tiny_edge_fp32 / "transformer", folder, dirs_exist_ok=True)
        for file in folder.glob("*.safetensors"):
            content = load_file(file)
            if name in content:
                change(content)
                save_file(content, file)
        with pytest.raises(CheckpointError) as error:
            check_weights(table, folder, shapes)
        return str(error.value)

    def rename(content: dict[str, Tensor]) -> None:
        content[f"layers.{name}"] = content.pop(name)

    def cut(content: dict[str, Tensor]) -> None:
        content[name] = content[name][:-1].clone()

    assert problem(lambda content: content.__delitem__(name)).endswith(f"missing: {name}")
    assert problem(rename).endswith(f"missing: {name}; unexpected: layers.{name}")
    assert f"of another shape: {name} [{shapes[name][0] - 1}" in problem(cut)


def test_dummy_weights_are_reproducible() -> None:
    first, second, other = Small(), Small(), Small()
    load_dummy_weights(first, NEEDED, SHAPES, device=torch.device("cpu"), seed=1)
    load_dummy_weights(second, NEEDED, SHAPES, device=torch.device("cpu"), seed=1)
    load_dummy_weights(other, NEEDED, SHAPES, device=torch.device("cpu"), seed=2)
    assert torch.equal(first.proj.weight, second.proj.weight)
    assert not torch.equal(first.proj.weight, other.proj.weight)
    assert torch.equal(first.norm.weight.data, torch.ones(3))
    assert torch.equal(first.proj.bias.data, torch.zeros(4))
