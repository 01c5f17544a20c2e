"""The inventory against the counts of the released models."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_cosmos3.checkpoint.config import (
    ModelConfig,
    VisionConfig,
    read_config,
    read_json,
    read_vision_config,
    siglip_config,
)
from vllm_cosmos3.checkpoint.synthetic import write_checkpoint
from vllm_cosmos3.checkpoint.tensors import (
    parameters,
    siglip_tensors,
    sound_tensors,
    transformer_tensors,
    vae_tensors,
    vision_tensors,
)

Released = dict[str, tuple[ModelConfig, VisionConfig]]


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Released:
    """Configurations with the released dimensions, read back from their JSON files."""
    found = {}
    for size in ("nano", "super"):
        folder = tmp_path_factory.mktemp(size)
        write_checkpoint(folder, size=size, weights=False)
        found[size] = read_config(folder), read_vision_config(folder)
    return found


@pytest.mark.parametrize(
    ("size", "tensors", "count"), [("nano", 814, 15_173_669_120), ("super", 1430, 64_019_736_832)]
)
def test_transformer(released: Released, size: str, tensors: int, count: int) -> None:
    found = transformer_tensors(released[size][0].transformer)
    assert (len(found), parameters(found)) == (tensors, count)


@pytest.mark.parametrize(("size", "count"), [("nano", 576_388_336), ("super", 595_266_800)])
def test_vision_encoder(released: Released, size: str, count: int) -> None:
    found = vision_tensors(released[size][1])
    assert (len(found), parameters(found)) == (351, count)


def test_autoencoders(released: Released) -> None:
    model = released["nano"][0]
    assert model.sound is not None
    vae, sound = vae_tensors(model.vae), sound_tensors(model.sound)
    assert (len(vae), parameters(vae)) == (196, 704_688_668)
    assert (len(sound), parameters(sound)) == (249, 496_287_362)


def test_root_index_of_nano_has_1165_tensors(released: Released) -> None:
    model, vision = released["nano"]
    assert len(transformer_tensors(model.transformer) | vision_tensors(vision)) == 1165


def test_super_has_more_query_width_than_hidden_width(released: Released) -> None:
    shapes = transformer_tensors(released["super"][0].transformer)
    assert shapes["layers.63.self_attn.add_q_proj.weight"] == (8192, 5120)
    assert shapes["layers.63.self_attn.to_add_out.weight"] == (5120, 8192)


def test_edge(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "edge", size="edge", kind="edge", weights=False)
    found = transformer_tensors(read_config(tmp_path / "edge").transformer)
    assert (len(found), parameters(found)) == (549, 3_369_657_024)
    assert found["layers.27.self_attn.k_norm_und_for_gen.weight"] == (128,)
    assert not [name for name in found if "gate_proj" in name or ".norm_q." in name]
    root = read_json(tmp_path / "edge" / "config.json")
    seen = siglip_tensors(siglip_config(root))
    assert (len(seen), parameters(seen)) == (443, 489_342_704)
    del root["projector_config"]  # which transformers does not write
    assert siglip_tensors(siglip_config(root)) == seen


def test_tiny_has_every_tensor_of_its_layers(tiny_checkpoint: Path) -> None:
    config = read_config(tiny_checkpoint)
    assert config.sound is not None
    assert len(transformer_tensors(config.transformer)) == 22 * 3 + 22
    assert len(vae_tensors(config.vae)) == 196
    assert len(sound_tensors(config.sound)) == 249
