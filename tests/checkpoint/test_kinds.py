"""What a checkpoint was made for: told by its files, and kept to when requests are checked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm_cosmos3.checkpoint.config import read_config, read_kind
from vllm_cosmos3.checkpoint.kinds import KINDS, base_kind
from vllm_cosmos3.checkpoint.synthetic import write_checkpoint
from vllm_cosmos3.engine_options import EngineConfig
from vllm_cosmos3.errors import CheckpointError, InvalidRequest
from vllm_cosmos3.request.parameters import prompt_parameters
from vllm_cosmos3.request.planner import make_plan
from vllm_cosmos3.request.prompts import load_tokenizer
from vllm_cosmos3.request.request import GenerateRequest
from vllm_cosmos3.stage.runners import make_runner

PICTURE = np.zeros((64, 96, 3), np.uint8)
CLIP = np.zeros((17, 64, 96, 3), np.uint8)
AV = {"domain_name": "av", "action_chunk_size": 16}
ASKED: dict[str, dict[str, Any]] = {
    "text2image": {"num_frames": 1},
    "text2video": {},
    "image2video": {"image": PICTURE},
    "video2video": {"video": CLIP},
    "transfer": {"video": CLIP, "edge": True},
    "forward_dynamics": AV | {"image": PICTURE, "action": np.zeros((16, 9)).tolist()},
    "inverse_dynamics": AV | {"video": CLIP},
    "policy": AV | {"image": PICTURE},
}
for _mode in ("forward_dynamics", "inverse_dynamics", "policy"):
    ASKED[_mode]["action_mode"] = _mode


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The files of each kind, in folders whose names say nothing."""
    where = {kind: tmp_path_factory.mktemp("kind") for kind in KINDS}
    for kind, folder in where.items():
        write_checkpoint(folder, kind=kind, weights=False)
    return where


@pytest.mark.parametrize("kind", KINDS)
def test_files_tell_the_kind(folders: dict[str, Path], kind: str) -> None:
    assert read_kind(folders[kind]) == kind
    config = read_config(folders[kind])
    assert config.kind == kind
    assert config.transformer.backbone is KINDS[kind].backbone


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        ("Cosmos3-Nano-Policy-DROID", "policy-droid"),
        ("models--a--B-policy/snapshots/0f", "policy-droid"),
        ("Cosmos3-Super-Text2Image", "text2image"),
        ("Cosmos3-Edge-Policy-DROID", "edge-policy-droid"),
    ],
)
def test_the_name_of_a_repository_tells_the_kind(
    folders: dict[str, Path], tmp_path: Path, place: str, kind: str
) -> None:
    usual = base_kind(kind)
    folder = Path(shutil.copytree(folders[usual], tmp_path / place))
    assert read_kind(folder) == kind
    assert read_config(folder, usual).kind == usual  # the user knows better


@pytest.mark.parametrize(
    ("found", "chosen", "reason"),
    [
        ("base", "distilled-t2i", "no fixed steps"),
        ("base", "edge", "no fixed steps and Qwen3's layers"),
        ("edge", "base", "edge, edge-policy-droid: .* no fixed steps and Nemotron's layers"),
        ("distilled-i2v", "base", "this checkpoint has fixed steps"),
        ("distilled-i2v", "nano", "distilled-t2i, distilled-i2v"),
    ],
)
def test_a_kind_that_the_files_contradict(
    folders: dict[str, Path], found: str, chosen: str, reason: str
) -> None:
    with pytest.raises(InvalidRequest, match=reason) as refusal:
        read_config(folders[found], chosen)
    assert refusal.value.field == "checkpoint_kind"


def test_diffusers_and_the_scheduler_name_the_same_steps(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders["distilled-t2i"], tmp_path / "copy"))
    scheduler, index = (
        folder / "scheduler/scheduler_config.json",
        folder / "modular_model_index.json",
    )
    values = json.loads(scheduler.read_text())
    scheduler.write_text(json.dumps({**values, "fixed_step_sampler_config": None}))
    assert read_config(folder).scheduler.t_list == tuple(
        json.loads(index.read_text())["distilled_sigmas"]
    )
    scheduler.write_text(
        json.dumps({**values, "fixed_step_sampler_config": {"t_list": [1.0, 0.5]}})
    )
    with pytest.raises(CheckpointError, match=r"modular_model_index\.json .* must be equal"):
        read_config(folder)


@pytest.mark.parametrize("mode", ASKED)
@pytest.mark.parametrize("kind", KINDS)
def test_a_mode_is_served_or_refused_at_once(
    folders: dict[str, Path], kind: str, mode: str
) -> None:
    model, tokenizer = read_config(folders[kind]), load_tokenizer(folders[kind])
    request = GenerateRequest(prompt="a", size="96x64", **ASKED[mode])
    if mode in KINDS[kind].modes:
        known = make_plan(request, model, tokenizer).effective
        assert (known["mode"], known["checkpoint_kind"]) == (mode, kind)
        return
    with pytest.raises(InvalidRequest) as refusal:
        make_plan(request, model, tokenizer)
    assert refusal.value.code == "unsupported_by_model"
    assert f"as the kind of this checkpoint is {kind}" in str(refusal.value)
    if refusal.value.field == "image":  # which nobody gave: a mode would be news
        assert (mode, KINDS[kind].modes) == ("text2video", ("image2video",))
    else:
        assert all(served in str(refusal.value) for served in KINDS[kind].modes)


@pytest.mark.parametrize("kind", [name for name in KINDS if KINDS[name].distilled])
def test_distilled_checkpoints_have_no_guidance_to_share(
    folders: dict[str, Path], kind: str
) -> None:
    config = EngineConfig(model=folders[kind], cfg_parallel_size=2)
    with pytest.raises(InvalidRequest, match="a distilled checkpoint has no guidance"):
        make_runner(config, print)


@pytest.mark.parametrize("field", ["num_inference_steps", "guidance_scale"])
def test_distilled_checkpoints_have_their_own_steps_and_scale(
    folders: dict[str, Path], field: str
) -> None:
    model = read_config(folders["distilled-i2v"])
    parameters = prompt_parameters(GenerateRequest(prompt="a", image=PICTURE), model)
    assert (parameters.num_inference_steps, parameters.guidance_scale) == (4, 1.0)
    with pytest.raises(InvalidRequest, match="distilled to 4 steps") as refusal:
        prompt_parameters(GenerateRequest(prompt="a", image=PICTURE, **{field: 7}), model)
    assert refusal.value.field == field


def test_what_a_distilled_checkpoint_does_not_use_is_told(folders: dict[str, Path]) -> None:
    model = read_config(folders["distilled-t2i"])
    plain = {"prompt": "a", "num_frames": 1}
    assert prompt_parameters(GenerateRequest(**plain), model).warnings == ()
    unused = {"flow_shift": 5.0, "negative_prompt": "b", "schedule": "karras", "negative_metadata_mode": "none"}  # fmt: skip
    warnings = prompt_parameters(GenerateRequest(**plain, **unused), model).warnings
    assert {warning.split()[0] for warning in warnings} == unused.keys()
    base = read_config(folders["base"])
    assert prompt_parameters(GenerateRequest(**plain, **unused), base).warnings == ()


VIDEO = {"num_frames": 121, "num_inference_steps": 35, "guidance_scale": 5.0, "flow_shift": 3.0}
DEFAULTS: dict[str, dict[str, Any]] = {  # of Edge
    "text2image": {"size": "640x640", "num_inference_steps": 50, "guidance_scale": 7.0, "flow_shift": 3.0},
    "text2video": {"size": "832x480", **VIDEO},
    "image2video": {"size": "832x480", **VIDEO},
    "video2video": {"size": "832x480", **VIDEO},
    "policy": {"num_inference_steps": 30, "guidance_scale": 1.0, "flow_shift": 5.0, "guidance_interval": None},
}  # fmt: skip


@pytest.mark.parametrize("mode", DEFAULTS)
def test_defaults_of_edge(folders: dict[str, Path], mode: str) -> None:
    model = read_config(folders["edge"])
    plan = make_plan(GenerateRequest(prompt="a", **ASKED[mode]), model, load_tokenizer(model.path))
    assert {name: plan.effective[name] for name in DEFAULTS[mode]} == DEFAULTS[mode]


def test_the_policy_of_edge_is_guided_at_its_first_step(folders: dict[str, Path]) -> None:
    model = read_config(folders["edge-policy-droid"])
    tokenizer = load_tokenizer(model.path)
    asked = {"prompt": "a", **ASKED["policy"]}
    known = make_plan(GenerateRequest(**asked), model, tokenizer).effective
    names = ("num_inference_steps", "guidance_scale", "guidance_interval", "flow_shift")
    assert [known[name] for name in names] == [4, 3.0, (960.0, 1001.0), 5.0]
    mine = GenerateRequest(**asked, guidance_interval=(0, 1001))
    assert make_plan(mine, model, tokenizer).effective["guidance_interval"] == (0.0, 1001.0)


def test_edge_was_trained_for_small_videos_without_sound(folders: dict[str, Path]) -> None:
    model = read_config(folders["edge"])
    large = GenerateRequest(prompt="a", size="1280x720", num_frames=189)
    assert prompt_parameters(large, model).warnings == (
        "size 1280x720 is not a trained one; the nearest is 832x480",
        "num_frames 189 is above the trained 150 at 1280x720",
    )
    short = GenerateRequest(prompt="a", num_frames=25)
    assert prompt_parameters(short, model).warnings == ("num_frames 25 is below the trained 50",)
    with pytest.raises(InvalidRequest, match="this checkpoint makes no sound"):
        prompt_parameters(GenerateRequest(prompt="a", generate_sound=True), model)


@pytest.mark.parametrize("karras", [True, False])
@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "Cosmos3EdgeUniPCMultistepScheduler"])
def test_the_schedule_is_not_that_of_the_file(
    folders: dict[str, Path], tmp_path: Path, name: str, *, karras: bool
) -> None:
    """Readers of the published file disagree on what it says; either way the default is native."""
    folder = Path(shutil.copytree(folders["edge"], tmp_path / "copy"))
    file = folder / "scheduler" / "scheduler_config.json"
    said = {"_class_name": name, "use_karras_sigmas": karras}
    file.write_text(json.dumps(json.loads(file.read_text()) | said))
    assert prompt_parameters(GenerateRequest(prompt="a"), read_config(folder)).schedule == "native"
