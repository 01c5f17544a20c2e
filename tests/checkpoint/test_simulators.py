"""Causal simulators: what their files say, and which of them are served."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from vllm_cosmos3.checkpoint.config import read_config, read_json, read_kind
from vllm_cosmos3.checkpoint.shards import check_weights
from vllm_cosmos3.checkpoint.simulators import BLOCK
from vllm_cosmos3.checkpoint.synthetic import write_checkpoint
from vllm_cosmos3.checkpoint.tensors import transformer_tensors
from vllm_cosmos3.errors import CheckpointError, Unsupported
from vllm_cosmos3.generator.models.components import components


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {
        name: tmp_path_factory.mktemp("sim") / "real"
        for name in ("sim-bimanual", "sim-bimanual-camera")
    }
    for kind, folder in folders.items():
        write_checkpoint(folder, size="nano", kind=kind, weights=False)
    return folders


def changed(folder: Path, to: Path, change: dict[str, Any], file: str = "transformer") -> Path:
    """A copy with other values in one of its files: None takes a key away."""
    copy = Path(shutil.copytree(folder, to / "copy"))
    path = copy / "model_index.json" if file == "index" else copy / file / "config.json"
    values = read_json(path)
    for dotted, value in change.items():
        *outer, name = dotted.split(".")
        place = values
        for key in outer:
            place = place[key]
        place[name] = value
        if value is None:
            del place[name]
    path.write_text(json.dumps(values))
    return copy


def test_the_numbers_of_both_exports(exports: dict[str, Path]) -> None:
    camera = read_config(exports["sim-bimanual-camera"]).causal
    unified = read_config(exports["sim-bimanual"]).causal
    assert camera is not None
    assert unified is not None
    assert (camera.chunk_size, camera.window_frames, camera.sink_frames) == (4, 96, 0)
    assert (unified.chunk_size, unified.window_frames, unified.sink_frames) == (2, None, 0)
    assert camera.sigmas_at(0) == (1.0, 0.9375, 0.8333333333333334, 0.625)
    assert camera.sigmas_at(1) == camera.sigmas_at(9) == (1.0, 0.8333333333333334)
    assert unified.sigmas_at(0) == unified.sigmas_at(3) == (1.0, 0.8333333333333334)
    assert [(s.name, s.domain_id, s.width) for s in camera.spaces.values()] == [
        ("camera_pose", 2, 9)
    ]
    assert {s.name: (s.domain_id, s.width, s.slots) for s in unified.spaces.values()} == {
        "agibotworld": (15, 59, 59),
        "agibot_gear_gripper": (15, 59, 59),
        "camera_pose": (2, 59, 9),
        "hand_pose": (3, 59, 59),
    }
    assert (camera.json, unified.json) == (True, False)


def test_the_tensors_are_those_of_nano(exports: dict[str, Path], tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "nano", size="nano", weights=False)
    nano = transformer_tensors(read_config(tmp_path / "nano").transformer)
    silent = {name: shape for name, shape in nano.items() if not name.startswith("audio_")}
    for folder in exports.values():
        assert transformer_tensors(read_config(folder).transformer) == silent
    with_sound = changed(exports["sim-bimanual"], tmp_path, {"sound_gen": True})
    model = read_config(with_sound)  # its files may have the tensors: they are loaded, and not used
    assert transformer_tensors(model.transformer) == nano
    assert model.sound is None


def test_every_tensor_of_the_files_is_checked(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "tiny", kind="sim-bimanual")
    model = read_config(tmp_path / "tiny")
    (part,) = (part for part in components(model) if part.folder == "transformer")
    check_weights(part.table, model.path / part.folder, part.shapes)
    missing = part.shapes | {"rig_view_embed.weight": (12, 64)}
    table = part.table | {"rig_view_embed.weight": part.table["proj_in.weight"]}
    with pytest.raises(CheckpointError, match=r"rig_view_embed\.weight"):
        check_weights(table, model.path / part.folder, missing)


@pytest.mark.parametrize(
    ("change", "file", "kind", "reason"),
    [
        ({f"{BLOCK}.conditioning": {"mode": "control_video"}}, "transformer", "sim-transfer", "control video"),
        ({"_class_name": "Cosmos3NanoSimTransferPipeline"}, "index", "sim-transfer", "control video"),
        ({"cosmos3_nano_sim_auto": {}}, "transformer", "sim-auto", "LiDAR"),
        ({"_class_name": "Cosmos3NanoSimAutoPipeline"}, "index", "sim-auto", "LiDAR"),
        ({BLOCK: None, "multiview": {}}, "transformer", "transfer-auto", "LiDAR"),
        ({BLOCK: None, "backbone_type": "cosmos3_multiview"}, "transformer", "transfer-auto", "cameras"),
        ({BLOCK: None, "cosmos_dreams": {}}, "transformer", "sim-legacy", "export it again"),
    ],
)  # fmt: skip
def test_others_are_recognised_and_refused(
    exports: dict[str, Path], tmp_path: Path, change: dict[str, Any], file: str, kind: str, reason: str
) -> None:  # fmt: skip
    folder = changed(exports["sim-bimanual"], tmp_path, change, file)
    assert read_kind(folder) == kind
    with pytest.raises(Unsupported, match=reason):
        read_config(folder)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({BLOCK: [1]}, f"{BLOCK} is .1., must be a JSON object"),
        ({f"{BLOCK}.conditioning": "action"}, "conditioning is 'action', must be dict"),
        ({f"{BLOCK}.chunk_size": 0}, "chunk_size is 0, must be at least 1"),
        ({f"{BLOCK}.sink_frames": None}, "sink_frames is None, must be int"),
        ({f"{BLOCK}.window_frames": "all"}, "window_frames is 'all', must be int"),
        ({f"{BLOCK}.base_fps": 30}, "base_fps is 30, and 24 outside of the block, must be equal"),
        ({f"{BLOCK}.attention_mode": "two_way"}, "runs only 'three_way'"),
        ({f"{BLOCK}.fixed_step_sampler_config.t_list": [1.0, 1.0]}, "must fall from 1"),
        ({f"{BLOCK}.fixed_step_sampler_config.t_list": [1.0]}, "the scheduler are .* must be equal"),
        ({f"{BLOCK}.conditioning.schema_version": [5]}, "runs only 3 and 5"),
        ({f"{BLOCK}.conditioning.default_embodiment": "cat"}, "must be one of agibotworld"),
        ({f"{BLOCK}.conditioning.embodiments.hand_pose.domain_id": "3"}, "domain_id is '3'"),
    ],
)  # fmt: skip
def test_a_block_that_cannot_be_run(
    exports: dict[str, Path], tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    folder = changed(exports["sim-bimanual"], tmp_path, change)
    with pytest.raises((CheckpointError, Unsupported), match=reason):
        read_config(folder)
