"""Batch files of the Cosmos Framework, as records under our names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_cosmos3.batch.files import read_batch
from vllm_cosmos3.batch.records import KNOWN, Entry, Record, make_record
from vllm_cosmos3.request import prompts
from vllm_cosmos3.request.request import from_fields
from vllm_cosmos3.request.sizes import ASPECT_RATIOS, TRAINED_SIZES


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Inputs beside a batch file."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").touch()
    (tmp_path / "in" / "b.mp4").touch()
    (tmp_path / "in" / "prompt.txt").write_text("a boat\n")
    (tmp_path / "in" / "prompt.json").write_text('{"temporal_caption": "it floats"}')
    return tmp_path / "in"


def record(folder: Path, **values: Any) -> Record:
    entry = Entry(where="FILE", folder=folder, name="x", values=values)
    return make_record(entry, {})


def problems(folder: Path, text: str, name: str = "x.jsonl") -> list[str]:
    (folder / name).write_text(text)
    return [str(error) for error in read_batch([str(folder / name)], {}).problems]


def test_a_documented_record(folder: Path) -> None:
    made = record(
        folder, name="t2v", model_mode="image2video", prompt="a boat", negative_prompt="", num_steps=35,
        guidance=6.0, shift=10.0, fps=24, num_frames=189, resolution="720", aspect_ratio="16,9",
        enable_sound=False, seed=0, vision_path="a.png", video_save_quality=8, image_save_quality=90,
        extra={"prompt": "short"}, model="", sigma_max=200.0, normalize_cfg=False, sound_path=None,
        duration_template=prompts.DURATION, resolution_template="", num_outputs=2,
        negative_metadata_mode="none", negative_prompt_keep_metadata=True,
    )  # fmt: skip
    assert made.fields == {
        "prompt": "a boat", "negative_prompt": "", "num_inference_steps": 35, "guidance_scale": 6.0,
        "flow_shift": 10.0, "fps": 24, "num_frames": 189, "size": "1280x720", "seed": 0, "n": 2,
        "generate_sound": False, "image": str(folder / "a.png"), "use_duration_template": True,
        "use_resolution_template": False, "negative_metadata_mode": "same",
    }  # fmt: skip
    assert (made.name, made.crf, made.quality) == ("t2v", 10, 90)
    assert made.warnings == ("sigma_max has no effect: it belongs to another solver",)
    assert from_fields(made.fields).mode == "image2video"


@pytest.mark.parametrize("tier", TRAINED_SIZES)
@pytest.mark.parametrize("ratio", [*ASPECT_RATIOS, None])
def test_resolutions(tier: int, ratio: str | None, folder: Path) -> None:
    made = record(folder, prompt="a", resolution=str(tier), aspect_ratio=ratio)
    width, height = TRAINED_SIZES[tier][ASPECT_RATIOS.index(ratio or "16,9")]
    assert made.fields["size"] == f"{width}x{height}"


def test_the_ratio_alone_and_pictures(folder: Path) -> None:
    assert record(folder, prompt="a", aspect_ratio="9:16").fields["size"] == "720x1280"
    square = record(folder, prompt="a", resolution=480, model_mode="text2image").fields
    assert square == {"prompt": "a", "size": "640x640", "num_frames": 1}


def test_edits_and_sounds(folder: Path) -> None:
    edit = record(folder, prompt="a", model_mode="image2image", vision_path="a.png").fields
    assert edit == {"prompt": "a", "image": str(folder / "a.png"), "num_frames": 1}
    assert from_fields(edit).mode == "image2image"
    for ratio in (None, "4,3"):  # without it the edit is as large as the picture
        sized = record(
            folder, prompt="a", model_mode="image2image", vision_path="a.png", resolution="480", aspect_ratio=ratio
        ).fields  # fmt: skip
        assert sized.get("size") == ("736x544" if ratio else None)
    heard = record(
        folder, prompt="a", model_mode="audio_image2video", vision_path="a.png", sound_path="prompt.txt", enable_sound=True
    ).fields  # fmt: skip
    assert heard["sound_path"] == str(folder / "prompt.txt")
    assert from_fields(heard).mode == "image2video"


def test_prompts_from_files_and_objects(folder: Path) -> None:
    assert record(folder, prompt_path="prompt.txt").fields["prompt"] == "a boat"
    compact = '{"temporal_caption":"it floats"}'
    assert record(folder, prompt_path="prompt.json").fields["prompt"] == compact
    assert record(folder, prompt={"temporal_caption": "it floats"}).fields["prompt"] == compact
    fields = record(folder, prompt="a", negative_prompt_file="prompt.json").fields
    assert fields["negative_prompt"] == compact
    assert read_batch([str(folder / "prompt.json")], {}).records[0].fields == {"prompt": compact}


@pytest.mark.parametrize(
    ("source", "mode", "kind"),
    [
        ("a.png", None, "image"),
        ("b.mp4", None, "video"),
        ("b.mp4", "video2video", "video"),
        ("https://x.org/c.JPG?w=1", None, "image"),
        ("https://x.org/files/17", "video2video", "video"),
    ],
)
def test_vision_paths(source: str, mode: str | None, kind: str, folder: Path) -> None:
    fields = record(folder, prompt="a", vision_path=source, model_mode=mode).fields
    assert fields[kind] == (source if ":" in source else str(folder / source))


def test_actions(folder: Path) -> None:
    (folder / "traj.json").write_text("[[0, 0, 0, 0, 0, 0, 0, 0, 0]]")
    shared = {
        "domain_name": "av", "view_point": "ego_view", "action_chunk_size": 60, "fps": 10,
        "image_size": 480, "prompt": "drive", "seed": 0, "action_path": "traj.json",
    }  # fmt: skip
    forward = record(folder, model_mode="forward_dynamics", vision_path="a.png", **shared).fields
    expected = shared | {"image": str(folder / "a.png"), "action_mode": "forward_dynamics"}
    assert forward == expected | {"action_path": str(folder / "traj.json")}
    inverse = record(folder, model_mode="inverse_dynamics", vision_path="b.mp4", **shared).fields
    assert "action_path" not in inverse  # what to compare with
    assert from_fields(inverse).mode == "inverse_dynamics"
    policy = record(
        folder, model_mode="wam", vision_path="a.png", resolution="256", prompt="a"
    ).fields
    assert policy["action_mode"] == "policy"
    assert policy["image_size"] == 256


def test_controls(folder: Path) -> None:
    made = record(
        folder, prompt="a", model_mode="video2video", resolution="480", control_guidance=1.5,
        edge={"control_path": None, "weight": 0.5, "preset_edge_threshold": "low"}, blur=True,
        depth={"control_path": "b.mp4"}, seg="https://x.org/c.mp4",
    )  # fmt: skip
    assert made.fields == {
        "prompt": "a", "image_size": 480, "control_guidance": 1.5, "blur": True,
        "edge": {"control_weight": 0.5, "preset_edge_threshold": "low"},
        "depth": {"control_path": str(folder / "b.mp4")}, "seg": "https://x.org/c.mp4",
    }  # fmt: skip


def test_a_control_that_is_false_is_none(folder: Path) -> None:
    made = record(folder, prompt="a", edge=False, resolution="480", aspect_ratio="16,9")
    assert made.fields == {"prompt": "a", "edge": False, "size": "832x480"}
    assert from_fields(made.fields).mode == "text2video"
    assert record(folder, prompt="a", edge=False, aspect_ratio="9,16").fields["size"] == "720x1280"
    assert record(folder, prompt="a", edge={}, resolution="480").fields["image_size"] == 480


def test_records_as_other_documents_write_them(folder: Path) -> None:
    av = {"prompt": "a", "domain_name": "av", "view_point": 0, "image_size": [320, 576]}
    made = record(folder, model_mode="forward_dynamics", vision_path="b.mp4", sampler="unipc", **av)
    assert made.fields["video"] == str(folder / "b.mp4")  # of which the first frame is taken
    assert (made.fields["height"], made.fields["width"]) == (320, 576)
    assert made.fields["view_point"] == "ego_view"
    made = record(folder, prompt="a", autoregressive=True, num_outputs=3)
    assert made.fields["n"] == 3
    assert made.warnings == ("autoregressive has no effect: a long video is made with num_chunks",)


def test_files_of_defaults_are_seen_from_them(folder: Path) -> None:
    below = folder / "defaults"
    below.mkdir()
    (below / "negative.json").write_text('{"blurry": 1}')
    (below / "d.json").write_text('{"negative_prompt_file": "negative.json"}')
    made = record(folder, prompt="a", defaults_file="defaults/d.json")
    assert made.fields["negative_prompt"] == '{"blurry":1}'


def test_fields_from_outside_replace_those_of_a_record(folder: Path) -> None:
    entry = Entry(where="FILE", folder=folder, name="x", values={"prompt": "a", "size": "64x64"})
    made = make_record(entry, {}, {"model_mode": "text2video", "resolution": "256"})
    assert made.fields["size"] == "320x192"


def test_defaults_lie_under_the_record(folder: Path) -> None:
    defaults = {"num_steps": 9, "guidance": 3.0, "of_another_version": 1, "shift": None}
    (folder / "d.json").write_text(json.dumps(defaults))
    made = record(folder, prompt="a", defaults_file="d.json", guidance=5.0)
    assert made.fields == {"prompt": "a", "num_inference_steps": 9, "guidance_scale": 5.0}
    assert made.warnings == ("of_another_version in d.json is no field",)


@pytest.mark.parametrize(
    ("below", "given", "fields"),
    [
        ({"num_steps": 9}, {"num_inference_steps": 4}, {"num_inference_steps": 4}),
        ({"num_inference_steps": 9}, {"num_steps": 4}, {"num_inference_steps": 4}),
        ({"resolution": "480", "aspect_ratio": "9,16"}, {"size": "64x64"}, {"size": "64x64"}),
        ({"size": "64x64"}, {"width": 32, "height": 48}, {"width": 32, "height": 48}),
        ({"width": 32, "height": 48}, {"width": 64}, {"width": 64, "height": 48}),
        ({"aspect_ratio": "1,1"}, {"resolution": "480"}, {"size": "640x640"}),
        ({"resolution": "480"}, {"aspect_ratio": "1,1"}, {"size": "640x640"}),
        ({"prompt": "other"}, {"prompt_path": "prompt.txt"}, {"prompt": "a boat"}),
        ({"prompt_path": "prompt.txt"}, {"prompt": "a"}, {"prompt": "a"}),
        ({"num_frames": 9}, {"seconds": 2}, {"seconds": 2}),
        ({"vision_path": "a.png"}, {"video": "https://b"}, {"video": "https://b"}),
    ],
)
def test_a_record_wins_over_defaults_in_other_words(
    below: dict[str, Any], given: dict[str, Any], fields: dict[str, Any], folder: Path
) -> None:
    (folder / "d.json").write_text(json.dumps(below))
    assert record(folder, defaults_file="d.json", **given).fields == fields


def test_flags_win_over_records(folder: Path) -> None:
    line = {"prompt": "a", "resolution": "256", "num_steps": 4, "vision_path": "a.png", "seed": 1}
    (folder / "x.jsonl").write_text(json.dumps(line))
    overrides = {"height": 64, "width": 64, "seed": 2, "video": "c.mp4"}
    (made,) = read_batch([str(folder / "x.jsonl")], overrides).records
    assert made.fields == {"prompt": "a", "num_inference_steps": 4, **overrides}


def test_reasoner_records(folder: Path) -> None:
    made = record(
        folder, model_mode="reasoner", prompt="What?", vision_path="a.png", enable_sound=False,
        max_new_tokens=9, do_sample=True, temperature=0.6, seed=1, resolution="480", fps=4,
    )  # fmt: skip
    assert made.kind == "reasoner"
    assert made.fields == {
        "prompt": "What?", "image": str(folder / "a.png"), "max_new_tokens": 9, "do_sample": True,
        "temperature": 0.6, "seed": 1,
    }  # fmt: skip


def test_upsampling(folder: Path) -> None:
    assert record(folder, prompt="a").upsample is None
    assert record(folder, prompt="a", prompt_upsampler_seed=1).upsample is None
    made = record(folder, prompt="a", prompt_upsampling=True, prompt_upsampler_max_tokens=99)
    assert made.upsample == {"max_tokens": 99}
    assert record(folder, prompt="a", upsample_prompt=True).upsample == {}


def test_names_order_and_globs(folder: Path) -> None:
    (folder / "two.jsonl").write_text('{"prompt": "a"}\n\n{"prompt": "b", "name": "own"}\n')
    (folder / "one.json").write_text('{"prompt": "c"}')
    (folder / "list.yaml").write_text("- prompt: d\n- prompt: e\n  num_steps: 3\n")
    (folder / "single.yml").write_text("prompt: f\nfps: 12\n")
    batch = read_batch([str(folder / "t*.jsonl"), str(folder / "[lo]*"), str(folder / "single.yml")], {})  # fmt: skip
    assert not batch.problems
    assert [made.name for made in batch.records] == [
        "two_0", "own", "list_0", "list_1", "one", "single",
    ]  # fmt: skip
    places = [made.where.removeprefix(f"{folder}/") for made in batch.records]
    assert places == [
        "two.jsonl line 1", "two.jsonl line 3 (own)", "list.yaml record 1", "list.yaml record 2",
        "one.json", "single.yml",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": "a", "num_stpes": 3}, "unknown field num_stpes; did you mean num_steps?"),
        ({"prompt": "a", "zzzz": 3}, "unknown field zzzz"),
        ({"prompt": "a", "model_mode": "text2music"}, "model_mode is 'text2music', must be one of text2image"),
        ({"prompt": "a", "model_mode": "image2image"}, "vision_path is missing, must be the image of image2image"),
        ({"prompt": "a", "model_mode": "image2video"}, "vision_path is missing, must be the image of image2video"),
        ({"prompt": "a", "model_mode": "video2video", "edge": False}, "vision_path is missing, must be the video of video2video"),
        ({"prompt": "a", "model_mode": "text2video", "vision_path": "a.png"}, "must be left out for text2video"),
        ({"prompt": "a", "model_mode": "video2video", "vision_path": "a.png"}, "must be the video of video2video"),
        ({"prompt": "a", "model_mode": "text2image", "num_frames": 9}, "num_frames is 9, must be 1 for text2image"),
        ({"prompt": "a", "vision_path": "none.png"}, "vision_path is 'none.png', must be a file that exists"),
        ({"prompt": "a", "vision_path": "~nosuchuser/a.png"}, "vision_path is '~nosuchuser/a.png', must be a file that exists"),
        ({"prompt": "a", "vision_path": 3}, "vision_path is 3, must be a file or a URL"),
        ({"prompt": "a", "vision_path": "prompt.txt"}, "must be a name that ends in"),
        ({"prompt": "a", "prompt_path": "prompt.txt"}, "prompt_path is 'prompt.txt', must be left out, as prompt"),
        ({"prompt_path": "none.txt"}, "prompt_path is 'none.txt', must be a file that exists"),
        ({"prompt_path": "b\0"}, "prompt_path is"),
        ({"prompt": "a", "guidance": 1, "guidance_scale": 2}, "guidance_scale is 2, must be left out, as guidance"),
        ({"prompt": "a", "resolution": "1080"}, "resolution is '1080', must be one of 256, 480, 704"),
        ({"prompt": "a", "aspect_ratio": "2,1"}, "aspect_ratio is '2,1', must be one of '1,1'"),
        ({"prompt": "a", "duration_template": "for {duration}"}, "must be \"\" for none, or 'The video is"),
        ({"prompt": "a", "inverse_resolution_template": "no"}, "inverse_resolution_template is 'no'"),
        ({"prompt": "a", "sampler": "edm"}, "sampler is 'edm', must be unipc"),
        ({"prompt": "a", "normalize_cfg": True}, "normalize_cfg is True, must be false"),
        ({"prompt": "a", "video_save_quality": 11}, "video_save_quality is 11, must be an integer from 0 to 10"),
        ({"prompt": "a", "temperature": 0.5}, "temperature is 0.5, must be left out: it is of model_mode reasoner"),
        ({"prompt": "a", "model_mode": "reasoner", "enable_sound": True}, "enable_sound is True, must be false"),
        ({"prompt": "a", "prompt_upsampling": "yes"}, "prompt_upsampling is 'yes', must be true or false"),
        ({"prompt": "a", "prompt_upsampler_top_p": 2}, "prompt_upsampler_top_p is 2, must be"),
        ({"prompt": "a", "name": "../up"}, "name is '../up', must be one folder name"),
        ({"model_mode": "image2image", "prompt": "a", "vision_path": "a.png", "num_frames": 5}, "num_frames is 5, must be 1 for image2image"),
        ({"model_mode": "audio_image2video", "prompt": "a", "vision_path": "a.png"}, "sound_path is missing, must be the sound of audio_image2video"),
        ({"prompt": "a", "name": "é" * 101}, "must be one folder name without separators, printable, of at most 200 bytes"),
        ({"prompt": "a", "name": "a\nb"}, "name is 'a\\nb', must be one folder name"),
        ({"prompt": "a", "name": "\ud800"}, "name is '\\ud800', must be one folder name"),
        ({"prompt": "a", "continue_from": "later"}, "continue_from is 'later', must be the name of a record before"),
        ({"prompt": "a", "continue_from": "b", "vision_path": "a.png"}, "continue_from is 'b', must be left out, as vision_path is given"),
        ({"prompt": "a", "continue_from": "b", "video": "b.mp4"}, "continue_from is 'b', must be left out, as video is given"),
        ({"prompt": "a", "continue_from": "b", "edge": True}, "continue_from is 'b', must be left out, as edge is given"),
        ({"prompt": "a", "depth": {"control_path": "none.mp4"}}, "depth.control_path is 'none.mp4', must be a file"),
        ({"prompt": "a", "defaults_file": "prompt.txt"}, "defaults_file is 'prompt.txt', must be a file with a JSON object"),
    ],
)  # fmt: skip
def test_mistakes_name_file_record_and_field(
    values: dict[str, Any], message: str, folder: Path
) -> None:
    (found,) = problems(folder, f"\n{json.dumps(values)}\n")
    assert found.startswith(f"{folder}/x.jsonl line 2: ")
    assert message in found
    assert "\n" not in found


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "x.jsonl",
            '{"prompt": ',
            """line 1 is '{"prompt":', must be a JSON object (Expecting value at column 11)""",
        ),
        (
            "x.json",
            '[\n{"seed": 1',
            "must be a JSON object (Expecting ',' delimiter at line 2 column 11)",
        ),
        ("x.json", "3", "x.json is 3, must be an object"),
        ("x.jsonl", f'{{"seed": {"1" * 5000}}}', "..., must be a JSON object (Exceeds the limit"),
        ("x.yaml", f"seed: {'1' * 5000}", "..., must be a YAML object (Exceeds the limit"),
        (
            "x.yaml",
            "seed: 2020-13-45",
            "x.yaml is 'seed: 2020-13-45', must be a YAML object (month must be in 1..12",
        ),
        ("x.yaml", "[" * 99_999, "..., must be a YAML object (nested too deeply)"),
        ("x.json", "[" * 99_999, "..., must be a JSON object (nested too deeply)"),
        ("x.json", '[{"prompt": "a"}, 7]', "x.json record 2 is 7, must be an object"),
        ("x.yaml", "a: [", "x.yaml is 'a: [', must be a YAML object (while parsing"),
        ("x.toml", "", ", must be a file of type .json, .jsonl, .yaml, .yml"),
    ],
)
def test_broken_files(name: str, text: str, message: str, folder: Path) -> None:
    (found,) = problems(folder, text, name)
    assert message in found


def test_every_mistake_is_found(folder: Path) -> None:
    (folder / "y.json").write_bytes(b'"\xff"')
    (folder / "x.jsonl").write_text('{"name": "n"}\n{"name": "n"}\n{"fsp": 2}\n')
    patterns = [str(folder / name) for name in ("x.jsonl", "y.json", "none.json", "*.none")]
    patterns.append("~nosuchuser/x.json")
    batch = read_batch(patterns, {})
    assert [made.name for made in batch.records] == ["n"]
    words = ["another one, as", "did you mean fps?", "UTF-8", "no such file", "a pattern that matches", "no such file"]  # fmt: skip
    for word, problem in zip(words, batch.problems, strict=True):
        assert word in str(problem)


@given(
    st.dictionaries(
        st.sampled_from(sorted(KNOWN)) | st.text(max_size=5),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.text(max_size=8), inner, max_size=3)
            ),
        ),
        max_size=6,
    )
)
def test_any_object_is_a_record_or_one_sentence(values: dict[str, Any]) -> None:
    entry = Entry(where="FILE", folder=Path("/nowhere"), name="x", values=values)
    try:
        made = make_record(entry, {})
    except ValueError as error:
        assert "\n" not in str(error)  # noqa: PT017 - either way is right
    else:
        assert not made.fields.keys() - KNOWN
