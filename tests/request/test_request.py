"""Values of single fields and of fields that contradict each other."""

from __future__ import annotations

import json
import math
import pickle
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.request.request import MAX_SEED, OF_TRANSFER, SPECS, GenerateRequest, from_fields
from vllm_cosmos3.request.sizes import is_too_large

NOT_INTEGERS = [True, 1.5, "12", [12], b"1"]
NOT_NUMBERS = [True, "1", [1.0], float("nan"), float("inf"), 1j, 10**400, -(10**400)]
NOT_TEXT = [5, b"text", ["text"], True]
ROWS = [5, "[[1]]", [], [[]], [1.0], [[math.nan]], [[1, "a"]], [[1, 2], [1]], [[[1.0]]], {}]
WRONG: dict[str, list[Any]] = {
    "prompt": [*NOT_TEXT, "", "  \n", "a\0b", "\x1b[0m", "\ud800", "x" * (2**20 + 1)],
    "negative_prompt": [*NOT_TEXT, "a\0b"],
    "image": [5, 1.5, True, {}],
    "video": [5, 1.5, True, {}],
    "condition_frame_indexes_vision": [-1, [], [0, -1], "x", [0.5], {}, 1.5],
    "condition_video_keep": ["middle", 1, ""],
    "action_mode": ["fly", "wam", 1],
    "domain_name": [*NOT_TEXT, "x" * 101],
    "domain_id": [*NOT_INTEGERS, -1, 1001],
    "raw_action_dim": [*NOT_INTEGERS, 0, -9],
    "action_chunk_size": [*NOT_INTEGERS, 0, -1, 1001],
    "action": ROWS,
    "action_path": [*NOT_TEXT, "x" * 5000],
    "action_history": ROWS,
    "action_state": [5, "0,1", [], [math.nan], ["a"], [[1.0]], [True], {}],
    "action_stats_path": [*NOT_TEXT, "x" * 5000],
    "action_normalization": ["none", 1],
    "view_point": ["below", 0],
    "view_description": [*NOT_TEXT, "x" * 5000],
    "image_size": [*NOT_INTEGERS, 0, 512, [320, 576]],
    "edge": [5, 1.5],
    "blur": [0, 1.5],
    "depth": [5, 1.5],
    "seg": [5, 1.5],
    "wsm": [5, 1.5],
    "control_guidance": [*NOT_NUMBERS, -1, 21],
    "control_guidance_interval": [5, [1], [600, 400], [-1, 5], ["a", "b"]],
    "control_attention": ["mean", 1],
    "num_video_frames_per_chunk": [*NOT_INTEGERS, 0, 1, 500],
    "num_conditional_frames": [*NOT_INTEGERS, -1, 500],
    "num_first_chunk_conditional_frames": [*NOT_INTEGERS, -1, 500],
    "max_frames": [*NOT_INTEGERS, 0, 1, 10**6],
    "share_vision_temporal_positions": [0, "yes"],
    "emphasize_control_in_prompt": [0, "yes"],
    "show_control_condition": [0, "yes"],
    "show_input": [0, "yes"],
    "size": ["1280*720", "0x0", "x", "1280x", "-16x16", "1281x719", "²x16", 720, "99999999999x16"],
    "height": [*NOT_INTEGERS, 0, -16, 100, 2**20],
    "width": [*NOT_INTEGERS, 0, -16, 100, 2**20],
    "num_frames": [*NOT_INTEGERS, 0, -1, 10**9],
    "seconds": [*NOT_NUMBERS, 0, -1.0, 1e9],
    "num_chunks": [*NOT_INTEGERS, 0, -1, 101],
    "fps": [*NOT_NUMBERS, 0, -24, 1e9],
    "num_inference_steps": [*NOT_INTEGERS, 0, 201],
    "guidance_scale": [*NOT_NUMBERS, -1, 21],
    "guidance_interval": [5, "0,1", [1], [1, 2, 3], [600, 400], [-1, 5], [0, 1002], ["a", "b"]],
    "preset": ["best", "", 1],
    "step_cache": ["tea", "", True],
    "step_cache_threshold": [*NOT_NUMBERS, -0.1, 11],
    "step_cache_max_reused": [*NOT_INTEGERS, 0, 201],
    "step_cache_order": [*NOT_INTEGERS, -1, 2],
    "flow_shift": [*NOT_NUMBERS, -5, 0, 1e-50, 101],
    "schedule": ["linear", 1],
    "seed": [*NOT_INTEGERS, -1, 2**32, 2**70],
    "noise": ["cuda", 0],
    "n": [*NOT_INTEGERS, 0, 11],
    "generate_sound": [1, "false", "maybe"],
    "sound_duration": [*NOT_NUMBERS, 0, -1, 10**6],
    "sound_path": [5, 1.5, True, {}],
    "keep_sound": [1, "yes"],
    "use_resolution_template": [0, "yes"],
    "use_duration_template": [0, "yes"],
    "negative_metadata_mode": ["off", True],
    "use_system_prompt": [1, "true"],
    "prompt_format": ["xml", 1],
    "max_sequence_length": [*NOT_INTEGERS, 0, 63, 10**6],
    "prompt_token_ids": [[], [-1], "1,2", [1.5], [True]],
    "negative_prompt_token_ids": [[], [-1], "1,2", [1.5]],
    "allow_untrained_size": [1, "true"],
    "output_type": ["pil", 1],
    "latents": [5, [1], {}, np.zeros(3)],
}
EDGE = {"edge": True, "video": "a.mp4"}
# What a field needs beside it so that the field itself is what is wrong.
BESIDE: dict[str, dict[str, Any]] = {
    "height": {"width": 64},
    "width": {"height": 64},
    "sound_duration": {"generate_sound": True},
    "condition_frame_indexes_vision": {"video": np.zeros((5, 16, 16, 3), np.uint8)},
    "prompt_token_ids": {"prompt": None},
} | dict.fromkeys(OF_TRANSFER, EDGE)
WRONG_CASES = [(name, value) for name, values in WRONG.items() for value in values]
NOT_WEIGHTS = [-1, math.nan, math.inf, 10**400, "1", True, [1]]
OPTIONS = [
    1.5,
    (0, 900),
    "full",
    93,
    1,
    1,
    5,
    False,
    False,
    True,
    True,
]  # of OF_TRANSFER, in its order
CONFLICTS: list[tuple[str, dict[str, Any]]] = [
    ("prompt", {"prompt": None}),
    ("prompt", {"prompt_token_ids": [1]}),
    ("negative_prompt", {"negative_prompt": "a", "negative_prompt_token_ids": [1]}),
    ("size", {"size": "64x64", "width": 64, "height": 48}),
    ("height", {"width": 64}),
    ("width", {"height": 64}),
    ("video", {"image": "a.png", "video": "a.mp4"}),
    (
        "condition_frame_indexes_vision",
        {"image": "a.png", "condition_frame_indexes_vision": [0], "num_frames": 1},
    ),
    ("video", {"video": "a.mp4", "num_frames": 1}),
    ("seconds", {"seconds": 1, "num_frames": 1}),
    ("generate_sound", {"generate_sound": True, "num_frames": 1}),
    ("sound_duration", {"sound_duration": 2.0}),
    ("condition_frame_indexes_vision", {"condition_frame_indexes_vision": [0]}),
    ("condition_frame_indexes_vision", {"image": "a.png", "condition_frame_indexes_vision": [1]}),
    ("action_mode", EDGE | {"action_mode": "policy"}),
    ("image", {"depth": "a.mp4", "image": "a.png"}),
    ("num_frames", {"edge": "a.mp4", "num_frames": 1}),
    ("generate_sound", EDGE | {"generate_sound": True}),
    ("condition_frame_indexes_vision", EDGE | {"condition_frame_indexes_vision": [0]}),
    ("condition_video_keep", EDGE | {"condition_video_keep": "last"}),
    ("edge.control", {"edge": True}),
    ("depth.control", {"depth": True, "video": "a.mp4"}),
    ("seg.control", {"seg": {"control_weight": 2}}),
    ("edge.control_path", {"edge": {"control": "a.mp4", "control_path": "b.mp4"}}),
    ("edge.weight", {"edge": {"control": "a.mp4", "weight": 1}}),
    ("depth.preset_edge_threshold", {"depth": {"control": "a", "preset_edge_threshold": "low"}}),
    ("edge.preset_edge_threshold", {"edge": {"control": "a", "preset_edge_threshold": "odd"}}),
    ("blur.preset_blur_strength", {"blur": {"control": "a", "preset_blur_strength": 3}}),
    *(("edge.control", {"edge": {"control": x}}) for x in (5, 0.5, True, {"control": "a.mp4"})),
    *(("seg.control_weight", {"seg": {"control": "a", "control_weight": w}}) for w in NOT_WEIGHTS),
    ("depth.control_weight", {n: {"control": "a", "control_weight": 0} for n in ("seg", "depth")}),
    ("num_first_chunk_conditional_frames", {"seg": "a", "num_first_chunk_conditional_frames": 1}),
    ("show_input", {"seg": "a", "show_input": True}),
    *((name, {name: value}) for name, value in zip(OF_TRANSFER, OPTIONS, strict=True)),
    ("action_normalization", {"action_normalization": "meanstd"}),
    ("action_normalization", {"action_mode": "policy", "action_normalization": "quantile"}),
    ("seed", {"seed": MAX_SEED, "n": 2}),
    ("n", {"n": 2, "latents": {"vision": np.zeros(1)}}),
]


def test_every_field_has_wrong_values() -> None:
    assert WRONG.keys() == SPECS.keys()


@pytest.mark.parametrize(
    ("name", "value"), WRONG_CASES, ids=[f"{n}={str(v)[:20]!r}" for n, v in WRONG_CASES]
)
def test_wrong_value(name: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        GenerateRequest(**{"prompt": "a boat", **BESIDE.get(name, {}), name: value})
    assert caught.value.field == name
    assert str(caught.value).startswith(f"{name} is ")
    assert ", must be " in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(("name", "fields"), CONFLICTS, ids=[str(f) for _, f in CONFLICTS])
def test_conflict(name: str, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        GenerateRequest(**{"prompt": "a boat", **fields})
    assert caught.value.field == name


@pytest.mark.parametrize("name", [n for n, spec in SPECS.items() if spec.kind != "bool"])
def test_help_is_a_sentence_part(name: str) -> None:
    spec = SPECS[name]
    assert spec.help[0].islower() or spec.kind in ("choice", "size")
    assert not spec.help.endswith(".")


def test_unknown_field_names_the_nearest() -> None:
    with pytest.raises(InvalidRequest, match=r"did you mean guidance_scale\?") as caught:
        from_fields({"prompt": "a", "guidance_scal": 3})
    assert caught.value.code == "unknown_parameter"
    with pytest.raises(InvalidRequest, match=r"^unknown field zzz$"):
        from_fields({"prompt": "a", "zzz": 3})


@pytest.mark.parametrize(
    ("fields", "mode"),
    [
        ({}, "text2video"),
        ({"num_frames": 5}, "text2video"),
        ({"num_frames": 1}, "text2image"),
        ({"image": "a.png"}, "image2video"),
        ({"video": "a.mp4"}, "video2video"),
        ({"image": "a.png", "action_mode": "policy"}, "policy"),
        ({"video": "a.mp4", "edge": True}, "transfer"),
        ({"video": "a.mp4", "edge": False}, "video2video"),
    ],
)
def test_mode_follows_from_inputs(fields: dict[str, Any], mode: str) -> None:
    assert GenerateRequest(prompt="a", **fields).mode == mode


def test_numbers_take_their_normal_form() -> None:
    request = GenerateRequest(
        prompt="a", height=np.int64(64), width=32, fps=24, condition_frame_indexes_vision=[1, 0],
        video="a.mp4", guidance_interval=[400, 1000],
    )  # fmt: skip
    assert (type(request.height), type(request.fps)) == (int, float)
    assert request.condition_frame_indexes_vision == (1, 0)
    assert request.guidance_interval == (400.0, 1000.0)


def test_omitted_seed_is_drawn_once() -> None:
    first, second = GenerateRequest(prompt="a"), GenerateRequest(prompt="a")
    assert first.seed is not None
    assert first.seed != second.seed
    assert pickle.loads(pickle.dumps(first)) == first


@pytest.mark.parametrize("size", ["65552x16", "16x65552", "99999984x16"])
def test_a_size_has_the_limits_of_width_and_height(size: str) -> None:
    with pytest.raises(InvalidRequest, match="of sides up to 65536x65536") as caught:
        GenerateRequest(prompt="a", size=size)
    assert (caught.value.field, caught.value.code) == ("size", "too_large")
    assert GenerateRequest(prompt="a", size="65536x16").size == "65536x16"


@given(st.integers(1, 60_000), st.integers(1, 60_000))
def test_sizes_are_multiples_of_16(width: int, height: int) -> None:
    if width % 16 == 0 and height % 16 == 0:
        assert GenerateRequest(prompt="a", size=f"{width}x{height}").size == f"{width}x{height}"
        return
    with pytest.raises(InvalidRequest, match="multiples of 16, such as") as caught:
        GenerateRequest(prompt="a", size=f"{width}x{height}")
    nearest = caught.value.possible.rsplit(" ", 1)[1]
    assert GenerateRequest(prompt="a", size=nearest).size == nearest


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 9000), st.integers(1, 9000), st.booleans(), st.booleans())
def test_a_size_that_a_refusal_proposes_is_accepted(
    width: int, height: int, untrained: bool, whole: bool
) -> None:
    fields: dict[str, Any] = {"size": f"{width}x{height}"}
    if not whole and min(width, height) >= 16:
        fields = {"width": width, "height": height}
    fields |= {"prompt": "a", "allow_untrained_size": untrained}
    possible = ""
    try:
        GenerateRequest(**fields)
    except InvalidRequest as error:
        possible = error.possible
    for proposed in re.findall(r"(\d+)x(\d+)$", possible):
        sides = int(proposed[0]), int(proposed[1])
        GenerateRequest(**{**fields, "size": None, "width": sides[0], "height": sides[1]})
        assert untrained or not is_too_large(*sides)


@pytest.mark.parametrize(
    ("given_size", "proposed"),
    [
        ("1920x1080", "1360x768"),
        ("1080x1920", "768x1360"),
        ("854x480", "848x480"),
        ("0x0", "16x16"),
        ("2050x2050", "1024x1024"),
    ],
)
def test_sizes_that_are_proposed(given_size: str, proposed: str) -> None:
    with pytest.raises(InvalidRequest, match=f"such as {proposed}"):
        GenerateRequest(prompt="a", size=given_size)


@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
@pytest.mark.parametrize(
    "caption", [{"subjects": [{"description": "a paper boat"}]}, {"scène": "été"}, {"a": None}]
)
def test_a_structured_prompt_may_be_an_object(name: str, caption: dict[str, Any]) -> None:
    request = GenerateRequest(**{"prompt": "a", name: caption})
    assert json.loads(getattr(request, name)) == caption


@pytest.mark.parametrize(
    ("name", "meant"),
    [("duration", "seconds"), ("cfg_scale", "guidance_scale"), ("frames", "num_frames"),
     ("steps", "num_inference_steps"), ("num_images", "n"), ("negative_promt", "negative_prompt")],
)  # fmt: skip
def test_names_of_other_programs_are_understood(name: str, meant: str) -> None:
    with pytest.raises(InvalidRequest, match=f"did you mean {meant}"):
        from_fields({"prompt": "a", name: 4})
