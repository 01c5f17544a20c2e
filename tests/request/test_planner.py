"""From requests to plans: defaults, sizes, lengths, and which latent frames are known."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_cosmos3.checkpoint.config import ModelConfig, read_config
from vllm_cosmos3.checkpoint.latents import round_frames
from vllm_cosmos3.checkpoint.synthetic import write_checkpoint
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.request import parameters, planner, prompts, sizes
from vllm_cosmos3.request.plan import Plan
from vllm_cosmos3.request.request import GenerateRequest, from_fields

PICTURE = np.full((48, 80, 3), 128, np.uint8)
CLIP = np.arange(9, dtype=np.uint8)[:, None, None, None].repeat(48, 1).repeat(80, 2).repeat(3, 3)


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint without any weights: plans must not miss them."""
    folder = tmp_path_factory.mktemp("no-weights") / "tiny"
    shutil.copytree(tiny_checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> ModelConfig:
    return read_config(folder)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> prompts.Tokenizer:
    return prompts.load_tokenizer(folder)


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = tmp_path_factory.mktemp("distilled") / "tiny"
    write_checkpoint(folder, kind="distilled-t2i", weights=False)
    return read_config(folder)


def plan(model: ModelConfig, tokenizer: prompts.Tokenizer, **fields: Any) -> Plan:
    return planner.make_plan(from_fields({"prompt": "a boat", **fields}), model, tokenizer)


def refusal(model: ModelConfig, **fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parameters.prompt_parameters(from_fields({"prompt": "a boat", **fields}), model)
    return caught.value


# Defaults are those of the models' own framework.
@pytest.mark.parametrize(
    ("fields", "size", "frames", "steps", "guidance", "shift", "known"),
    [
        ({"num_frames": 1}, "960x960", 1, 50, 4.0, 3.0, ()),
        ({}, "1280x720", 189, 35, 6.0, 10.0, ()),
        ({"image": PICTURE}, "1280x720", 189, 35, 6.0, 10.0, (0,)),
        ({"video": CLIP}, "1280x720", 189, 35, 6.0, 10.0, (0, 1)),
    ],
)
def test_defaults(
    model: ModelConfig,
    fields: dict[str, Any],
    size: str,
    frames: int,
    steps: int,
    guidance: float,
    shift: float,
    known: tuple[int, ...],
) -> None:
    p = parameters.prompt_parameters(from_fields({"prompt": "a", **fields}), model)
    assert (f"{p.width}x{p.height}", p.num_frames, p.fps) == (size, frames, 24.0)
    assert (p.num_inference_steps, p.guidance_scale, p.flow_shift) == (steps, guidance, shift)
    assert p.condition_frame_indexes_vision == known
    assert p.warnings == ()


def test_karras_needs_the_numbers_of_the_checkpoint(
    model: ModelConfig, tokenizer: prompts.Tokenizer
) -> None:
    without = replace(model, scheduler=replace(model.scheduler, sigma_min=None, sigma_max=None))
    clip = np.zeros((5, 64, 96, 3), np.uint8)
    robot = {"action_mode": "policy", "domain_name": "umi", "image": PICTURE}
    for fields in ({}, {"num_frames": 1}, {"edge": clip}, robot):
        given = {"size": "96x64", "schedule": "karras", **fields}
        assert plan(model, tokenizer, **given).parameters.schedule == "karras"
        with pytest.raises(InvalidRequest, match="must be native or diffusers") as refusal:
            plan(without, tokenizer, **given)
        assert (refusal.value.field, refusal.value.code) == ("schedule", "unsupported_by_model")


def test_plan_of_a_default_video(model: ModelConfig, tokenizer: prompts.Tokenizer) -> None:
    p = plan(model, tokenizer, generate_sound=True, seed=7, n=3)
    vision, sound = p.streams
    assert (vision.shape, vision.known, vision.source) == ((1, 48, 48, 45, 80), (), None)
    assert (sound.shape, sound.rate) == ((64, 197), 25)  # 378,000 samples / 1,920
    assert (p.seeds, p.steps, len(p.token_ids)) == ((7, 8, 9), 105, 2)
    again = pickle.loads(pickle.dumps(p))
    assert again.effective == p.effective


@pytest.mark.parametrize(
    ("frames", "fps", "latents"), [(189, 24, 197), (93, 30, 78), (121, 24, 127)]
)
def test_sound_length(
    model: ModelConfig, tokenizer: prompts.Tokenizer, frames: int, fps: float, latents: int
) -> None:
    p = plan(model, tokenizer, num_frames=frames, fps=fps, generate_sound=True)
    assert p.streams[1].shape == (64, latents)


def test_own_sound_duration(model: ModelConfig, tokenizer: prompts.Tokenizer) -> None:
    p = plan(model, tokenizer, num_frames=25, generate_sound=True, sound_duration=2.0)
    assert p.streams[1].shape == (64, 50)
    assert p.effective["sound_duration"] == 2.0


def test_effective_is_complete_json(model: ModelConfig, tokenizer: prompts.Tokenizer) -> None:
    noise = np.zeros((1, 48, 3, 4, 6), np.float32)
    p = plan(model, tokenizer, size="96x64", seconds=0.3, image=PICTURE, latents={"vision": noise})
    effective = json.loads(json.dumps(p.effective))
    assert GenerateRequest.__dataclass_fields__.keys() <= effective.keys()
    assert effective["mode"] == "image2video"
    assert (effective["width"], effective["height"], effective["num_frames"]) == (96, 64, 9)
    assert effective["seconds"] == 9 / 24
    assert effective["negative_prompt"].startswith('{"subjects"')
    assert (effective["image"], effective["latents"]) == ("ndarray", ["vision"])


def test_effective_makes_the_same_plan(model: ModelConfig, tokenizer: prompts.Tokenizer) -> None:
    first = plan(model, tokenizer, num_frames=26, size="320x192", guidance_scale=3)
    fields = {
        name: value
        for name, value in first.effective.items()
        if name in GenerateRequest.__dataclass_fields__ and value not in (None, ())
    }
    second = planner.make_plan(from_fields(fields), model, tokenizer)
    assert second.effective == first.effective
    assert second.token_ids == first.token_ids


def test_image_becomes_the_first_frame(model: ModelConfig, tokenizer: prompts.Tokenizer) -> None:
    vision = plan(model, tokenizer, image=PICTURE, size="96x64").streams[0]
    assert vision.known == (0,)
    assert (vision.source == np.full((1, 64, 96, 3), 128)).all()


@pytest.mark.parametrize(
    ("keep", "indexes", "levels"),
    [
        ("first", None, [0, 1, 2, 3, 4]),
        ("last", None, [4, 5, 6, 7, 8]),
        ("last", [0], [8]),
        ("first", [2], range(9)),
        ("first", [1, 1, 0], [0, 1, 2, 3, 4]),
    ],
)
def test_video_gives_the_frames_that_known_latents_need(
    model: ModelConfig, tokenizer: prompts.Tokenizer, keep: str, indexes: Any, levels: Any
) -> None:
    more = {} if indexes is None else {"condition_frame_indexes_vision": indexes}
    p = plan(model, tokenizer, video=CLIP, size="80x48", condition_video_keep=keep, **more)
    vision = p.streams[0]
    assert vision.known == tuple(sorted(set(indexes or (0, 1))))
    assert [int(frame.mean()) for frame in vision.source] == list(levels)


def test_too_short_a_video(model: ModelConfig, tokenizer: prompts.Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="at least 5 frames") as caught:
        plan(model, tokenizer, video=CLIP[:4], size="80x48")
    assert caught.value.field == "video"


@pytest.mark.parametrize(
    ("field", "source"),
    [
        ("image", b"not an image"),
        ("image", "/nowhere/a.png"),
        ("image", np.zeros((4, 4), np.uint8)),
        ("video", b"not a video"),
        ("video", "/nowhere/a.mp4"),
        ("video", np.zeros((5, 16, 16, 3), np.int64)),
        ("video", np.full((5, 16, 16, 3), np.nan, np.float32)),
    ],
)
def test_unreadable_media(
    model: ModelConfig, tokenizer: prompts.Tokenizer, field: str, source: object
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        plan(model, tokenizer, **{field: source})
    assert caught.value.field == field


def test_a_cropped_input_is_reported(model: ModelConfig, tokenizer: prompts.Tokenizer) -> None:
    upright = PICTURE.transpose(1, 0, 2)
    (warning,) = plan(model, tokenizer, image=upright, size="320x192").warnings
    assert warning == "the 48x80 input loses 64% of its area to fill 320x192"


# Sizes and lengths.


@given(
    st.integers(1, 120).map(lambda i: 16 * i),
    st.integers(1, 120).map(lambda i: 16 * i),
    st.booleans(),
)
def test_any_size_up_to_the_largest_area(
    model: ModelConfig, width: int, height: int, allow: bool
) -> None:
    fields = {"width": width, "height": height, "num_frames": 29, "allow_untrained_size": allow}
    trained = any((width, height) in each for each in sizes.TRAINED_SIZES.values())
    if sizes.is_too_large(width, height) and not allow:
        error = refusal(model, **fields)
        assert (error.field, error.code) == ("size", "too_large")
        return
    p = parameters.prompt_parameters(from_fields({"prompt": "a", **fields}), model)
    assert (p.width, p.height) == (width, height)
    assert any("not a trained one" in warning for warning in p.warnings) != trained


def test_super_text2image_makes_images_of_its_own_size(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, kind="text2image", weights=False)
    p = parameters.prompt_parameters(
        GenerateRequest(prompt="a", num_frames=1), read_config(tmp_path)
    )
    assert (p.width, p.height) == (1024, 1024)
    assert p.warnings == ()


@pytest.mark.parametrize("size", ["1024x1536", "1536x1024", "1792x1024", "1024x1792"])
@pytest.mark.parametrize("frames", [1, 49])
def test_sizes_that_openai_lists_are_made_with_a_warning(
    model: ModelConfig, size: str, frames: int
) -> None:
    p = parameters.prompt_parameters(
        GenerateRequest(prompt="a", size=size, num_frames=frames), model
    )
    assert f"{p.width}x{p.height}" == size
    assert any(f"size {size} is not a trained one" in warning for warning in p.warnings)


@given(st.integers(2, 500), st.sampled_from([(320, 192), (832, 480), (1280, 720)]))
def test_frame_limits(model: ModelConfig, frames: int, size: tuple[int, int]) -> None:
    limit = {(320, 192): 400, (832, 480): 300, (1280, 720): 300}[size]
    trained = {(1280, 720): 200}.get(size, limit)
    fields = {"num_frames": frames, "width": size[0], "height": size[1]}
    if frames > limit:
        # What rounding would lead to anyway is not refused.
        if round_frames(frames, model.vae) > round_frames(limit, model.vae):
            assert refusal(model, **fields).field == "num_frames"
        fields["allow_untrained_size"] = True
    p = parameters.prompt_parameters(from_fields({"prompt": "a", **fields}), model)
    assert p.num_frames == round_frames(frames, model.vae)
    warned = any("is above the trained" in warning for warning in p.warnings)
    assert warned == (p.num_frames > round_frames(trained, model.vae))
    assert any("rounded up" in warning for warning in p.warnings) == (frames % 4 != 1)


@given(st.floats(0.05, 8.0), st.floats(5, 30))
def test_seconds(model: ModelConfig, seconds: float, fps: float) -> None:
    request = from_fields(
        {"prompt": "a", "seconds": seconds, "fps": fps, "allow_untrained_size": True}
    )
    p = parameters.prompt_parameters(request, model)
    assert p.num_frames % 4 == 1
    assert p.num_frames >= max(5, seconds * fps - 1e-3)
    assert p.num_frames <= max(5, math.ceil(seconds * fps) + 3)


def test_seconds_and_frames_must_agree(model: ModelConfig) -> None:
    agreed = from_fields({"prompt": "a", "seconds": 4, "num_frames": 97})
    assert parameters.prompt_parameters(agreed, model).num_frames == 97
    error = refusal(model, seconds=4, num_frames=25)
    assert (error.field, error.code) == ("seconds", "conflict")
    assert refusal(model, seconds=60).field == "seconds"


@pytest.mark.parametrize(("fps", "warned"), [(9.9, True), (10, False), (30, False), (31, True)])
def test_fps_outside_the_trained_range_warns(model: ModelConfig, fps: float, warned: bool) -> None:
    request = from_fields({"prompt": "a", "fps": fps, "num_frames": 29})
    assert any("fps" in w for w in parameters.prompt_parameters(request, model).warnings) == warned


def test_known_frames_must_fit(model: ModelConfig) -> None:
    base = {"video": CLIP, "num_frames": 9}
    assert refusal(model, **base, condition_frame_indexes_vision=[3]).possible.startswith("below 3")
    assert "fewer than all" in str(refusal(model, **base, condition_frame_indexes_vision=[0, 1, 2]))


# What the checkpoint can do.


def test_sound_needs_a_sound_tokenizer(model: ModelConfig) -> None:
    error = refusal(replace(model, sound=None), generate_sound=True)
    assert (error.field, error.code) == ("generate_sound", "unsupported_by_model")


def test_distilled_checkpoint_fixes_steps(
    distilled: ModelConfig, tokenizer: prompts.Tokenizer
) -> None:
    p = plan(distilled, tokenizer, num_frames=1)
    assert (p.solver, p.parameters.num_inference_steps, p.parameters.guidance_scale) == (
        "sde",
        4,
        1.0,
    )
    assert len(p.token_ids) == 1
    assert (
        plan(distilled, tokenizer, num_frames=1, num_inference_steps=4, guidance_scale=1).steps == 4
    )
    for name, value in (("num_inference_steps", 35), ("guidance_scale", 6.0)):
        error = refusal(distilled, num_frames=1, **{name: value})
        assert (error.field, error.code) == (name, "unsupported_parameter")


def test_token_ids_replace_the_text(model: ModelConfig, tokenizer: prompts.Tokenizer) -> None:
    p = plan(model, tokenizer, prompt=None, prompt_token_ids=[5, 6], negative_prompt_token_ids=[7])
    assert p.token_ids == ((5, 6), (7,))
    assert p.effective["negative_prompt"] is None
    vocabulary = model.transformer.vocab_size
    for field, ids, possible in (
        ("prompt_token_ids", [vocabulary], "the vocabulary"),
        ("prompt_token_ids", [1] * 65, "at most max_sequence_length"),
    ):
        with pytest.raises(InvalidRequest, match=possible) as caught:
            plan(model, tokenizer, prompt=None, max_sequence_length=64, **{field: ids})
        assert caught.value.field == field


def test_long_prompt_is_cut_with_a_warning(
    model: ModelConfig, tokenizer: prompts.Tokenizer
) -> None:
    p = plan(model, tokenizer, prompt="boat " * 500, negative_prompt="", max_sequence_length=128)
    assert len(p.token_ids[0]) == 128
    assert len(p.warnings) == 1
    assert "max_sequence_length=128" in p.warnings[0]


OF_GUIDANCE: list[tuple[str, Any]] = [
    ("negative_prompt", "fog"),
    ("negative_prompt", ""),
    ("negative_prompt_token_ids", [7]),
    ("negative_metadata_mode", "inverse"),
    ("guidance_interval", (400, 1000)),
]
UNGUIDED = {"prompt": {"num_frames": 25}, "policy": {"action_mode": "policy", "domain_name": "umi", "image": PICTURE}, "transfer": {"wsm": CLIP}}  # fmt: skip


@pytest.mark.parametrize("inputs", UNGUIDED)
@pytest.mark.parametrize(("name", "value"), OF_GUIDANCE)
def test_what_needs_guidance_is_told_without_it(
    model: ModelConfig, tokenizer: prompts.Tokenizer, inputs: str, name: str, value: Any
) -> None:
    fields = {"size": "320x192", **UNGUIDED[inputs]}
    # The defaults of policies and of wsm are no guidance.
    scale = {"guidance_scale": 1} if inputs == "prompt" else {}
    assert not any("no effect" in w for w in plan(model, tokenizer, **fields, **scale).warnings)
    fields[name] = value
    warnings = plan(model, tokenizer, **fields, **scale).warnings
    assert [w for w in warnings if "no effect" in w] == [
        f"{name} has no effect with guidance_scale 1"
    ]
    for other in (0.0, 3.0):
        guided = plan(model, tokenizer, **fields, guidance_scale=other)
        assert not any("no effect" in w for w in guided.warnings)


def test_no_guidance_needs_no_negative(model: ModelConfig, tokenizer: prompts.Tokenizer) -> None:
    assert len(plan(model, tokenizer, guidance_scale=1).token_ids) == 1


@pytest.mark.parametrize(
    ("latents", "field"),
    [
        ({"sound": np.zeros((64, 9))}, "latents['sound']"),
        ({"vision": np.zeros((1, 48, 2, 4, 6))}, "latents['vision']"),
        ({"vision": np.full((1, 48, 3, 4, 6), np.nan)}, "latents['vision']"),
    ],
)
def test_wrong_latents(
    model: ModelConfig, tokenizer: prompts.Tokenizer, latents: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        plan(model, tokenizer, size="96x64", num_frames=9, latents=latents)
    assert caught.value.field == field
