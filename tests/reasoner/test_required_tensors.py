"""The reasoner's tensors are known by name and shape, and a folder that lacks any is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from vllm_cosmos3.checkpoint.config import (
    read_config,
    read_json,
    read_vision_config,
    siglip_config,
)
from vllm_cosmos3.checkpoint.tensors import siglip_tensors, transformer_tensors, vision_tensors
from vllm_cosmos3.errors import CheckpointError
from vllm_cosmos3.reasoner.required_tensors import (
    Expected,
    check_folder,
    expected_tensors,
    is_generator,
    only_expected,
)
from vllm_cosmos3.reasoner.root_config import assemble

NAME = "layers.0.self_attn.to_out.weight"


class Tensor:
    """Stands for a weight: only its shape is looked at."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "broken")


@pytest.fixture(scope="module")
def expected(tiny_checkpoint: Path) -> dict[str, Expected]:
    return expected_tensors(read_json(tiny_checkpoint / "config.json"))


def shard_of(folder: Path, name: str) -> Path:
    return folder / read_json(folder / "model.safetensors.index.json")["weight_map"][name]


def test_expected_are_the_inventory_without_the_generator(
    tiny_checkpoint: Path, expected: dict[str, Expected]
) -> None:
    both = transformer_tensors(read_config(tiny_checkpoint).transformer)
    wanted = {name: shape for name, shape in both.items() if not is_generator(name)}
    wanted |= vision_tensors(read_vision_config(tiny_checkpoint))
    assert {name: e.shape for name, e in expected.items()} == wanted
    assert not any(is_generator(name) for name in expected)


def test_expected_of_edge(tiny_edge_fp32: Path) -> None:
    """The text without the norms of the generator's keys, and SigLIP with its projector."""
    config = read_json(tiny_edge_fp32 / "config.json")
    both = transformer_tensors(read_config(tiny_edge_fp32).transformer)
    wanted = {name: shape for name, shape in both.items() if not is_generator(name)}
    wanted |= siglip_tensors(siglip_config(config))
    expected = expected_tensors(config)
    assert {name: e.shape for name, e in expected.items()} == wanted
    check_folder(tiny_edge_fp32, expected)
    assert not [name for name in expected if "k_norm" in name]


@pytest.mark.parametrize(
    "name", [NAME, "layers.2.mlp.up_proj.weight", "model.projector.linear_fc1.weight"]
)
def test_missing_and_misshapen_tensors_of_edge_are_named(
    tiny_edge_fp32: Path, tmp_path: Path, name: str
) -> None:
    folder = shutil.copytree(tiny_edge_fp32, tmp_path / "broken")
    expected = expected_tensors(read_json(folder / "config.json"))
    shard = shard_of(folder, name)
    tensors = load_file(shard)
    save_file(tensors | {name: tensors[name][:-1].clone()}, shard)
    with pytest.raises(CheckpointError, match=f"^{name} in {shard} has shape"):
        check_folder(folder, expected)
    save_file({n: t for n, t in tensors.items() if n != name}, shard)
    with pytest.raises(CheckpointError, match=f"^{name} is missing in {shard.parent}$"):
        check_folder(folder, expected)


def test_edge_without_its_root_config(tiny_edge_fp32: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_edge_fp32, tmp_path / "broken")
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="which describes Edge's reasoner, is missing"):
        assemble(folder)


def test_root_config_can_be_put_together_from_the_parts(
    tiny_checkpoint: Path, expected: dict[str, Expected]
) -> None:
    assembled = assemble(tiny_checkpoint)
    root = read_json(tiny_checkpoint / "config.json")
    assert expected_tensors(assembled) == expected
    for key in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        assert assembled[key] == root[key]
    for key in ("hidden_size", "rope_scaling", "rope_theta", "rms_norm_eps"):
        assert assembled["text_config"][key] == root["text_config"][key]


def test_whole_checkpoint_is_accepted(tiny_checkpoint: Path, expected: dict[str, Expected]) -> None:
    check_folder(tiny_checkpoint, expected)


def test_missing_tensor_is_named(checkpoint: Path, expected: dict[str, Expected]) -> None:
    shard = shard_of(checkpoint, NAME)
    save_file({n: t for n, t in load_file(shard).items() if n != NAME}, shard)
    with pytest.raises(CheckpointError, match=f"^{NAME} is missing in {checkpoint}/transformer$"):
        check_folder(checkpoint, expected)


def test_missing_shard_is_named(checkpoint: Path, expected: dict[str, Expected]) -> None:
    shard = shard_of(checkpoint, NAME)
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"^transformer/{shard.name} is missing in .* holds"):
        check_folder(checkpoint, expected)


@pytest.mark.parametrize("cut", [3, 100, -1])
def test_truncated_shard_is_named(
    checkpoint: Path, expected: dict[str, Expected], cut: int
) -> None:
    shard = checkpoint / "vision_encoder" / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=f"^{shard} is truncated"):
        check_folder(checkpoint, expected)


def test_other_file_is_named(checkpoint: Path, expected: dict[str, Expected]) -> None:
    shard = checkpoint / "vision_encoder" / "model.safetensors"
    shard.write_bytes((9).to_bytes(8, "little") + b'{"a": 1}\n')
    with pytest.raises(CheckpointError, match=f"^{shard} is not a safetensors file"):
        check_folder(checkpoint, expected)


def test_missing_folder_is_named(checkpoint: Path, expected: dict[str, Expected]) -> None:
    shutil.rmtree(checkpoint / "vision_encoder")
    with pytest.raises(CheckpointError, match=f"^vision_encoder/ is missing in {checkpoint}$"):
        check_folder(checkpoint, expected)


def test_wrong_shape_is_named(checkpoint: Path, expected: dict[str, Expected]) -> None:
    shard = shard_of(checkpoint, NAME)
    tensors = load_file(shard)
    save_file(tensors | {NAME: tensors[NAME][:-1].clone()}, shard)
    rows, columns = expected[NAME].shape
    sentence = f"{NAME} in {shard} has shape [{rows - 1}, {columns}], must be [{rows}, {columns}]"
    with pytest.raises(CheckpointError) as error:
        check_folder(checkpoint, expected)
    assert str(error.value) == sentence


def test_missing_key_of_the_configuration_is_named(tiny_checkpoint: Path) -> None:
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    del config["vision_config"]["depth"]
    with pytest.raises(CheckpointError, match="'depth'"):
        expected_tensors(config)


def test_tensors_are_sorted_as_they_arrive() -> None:
    expected = {"a": Expected("transformer", (2,)), "b": Expected("transformer", (3,))}
    stream = {"a": (2,), "proj_in.weight": (9,), "zzz": (1,), "b": (3,)}
    unknown: list[str] = []
    weights = ((name, Tensor(shape)) for name, shape in stream.items())
    assert [name for name, _ in only_expected(weights, expected, unknown)] == ["a", "b"]
    assert unknown == ["zzz"]


def test_stream_that_ends_early_is_refused() -> None:
    expected = {name: Expected("transformer", (2,)) for name in ("a", "b", "c")}
    with pytest.raises(
        CheckpointError, match=r"^b is missing in transformer/ .* and 1 more tensor$"
    ):
        list(only_expected([("a", Tensor((2,)))], expected, []))
