"""Prompt upsampling without a reasoner: the question, the schema, the reading of the answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from vllm_cosmos3.checkpoint.config import read_config
from vllm_cosmos3.cli import main
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.reasoner.offline import sampling_params
from vllm_cosmos3.request.plan import Plan
from vllm_cosmos3.request.planner import make_plan
from vllm_cosmos3.request.prompts import Facts, load_tokenizer, positive_text
from vllm_cosmos3.request.questions import Question, question_of
from vllm_cosmos3.request.request import GenerateRequest, from_fields
from vllm_cosmos3.request.upsample import (
    UpsamplingFailed,
    caption_of,
    question_about,
    schema_of,
    upsampling_question,
)

VIDEO = Facts(num_frames=189, fps=24, height=720, width=1280, aspect_ratio="16,9")
IMAGE = Facts(num_frames=1, fps=24, height=960, width=960, aspect_ratio="1,1")


@pytest.fixture(scope="module")
def planned(tiny_checkpoint: Path) -> Callable[[GenerateRequest], Plan]:
    model, tokenizer = read_config(tiny_checkpoint), load_tokenizer(tiny_checkpoint)
    return lambda request: make_plan(request, model, tokenizer)


def example(schema: dict[str, Any]) -> Any:
    """The smallest value that a schema allows."""
    if "enum" in schema:
        return schema["enum"][0]
    if schema["type"] == "object":
        return {name: example(part) for name, part in schema.get("properties", {}).items()}
    if schema["type"] == "array":
        return [example(schema["items"])] * schema["minItems"]
    return {"string": "word", "integer": 0}[schema["type"]]


@pytest.mark.parametrize("facts", [IMAGE, VIDEO], ids=["image", "video"])
def test_the_schema_is_one_and_allows_no_other_keys(facts: Facts) -> None:
    schema = schema_of(facts)
    Draft202012Validator.check_schema(schema)
    caption = example(schema)
    validator = Draft202012Validator(schema)
    validator.validate(caption)
    assert not validator.is_valid(caption | {"resolution": {"H": 1, "W": 1}})
    assert not validator.is_valid(caption | {"mood": "calm"})
    assert not validator.is_valid({k: v for k, v in caption.items() if k != "lighting"})


def test_the_keys_are_those_of_the_published_prompts() -> None:
    shared = ["background_setting", "lighting", "aesthetics", "cinematography", "style_medium", "artistic_style", "context"]  # fmt: skip
    schemas = {
        kind: schema_of(facts)["properties"] for kind, facts in (("image", IMAGE), ("video", VIDEO))
    }
    assert list(schemas["image"]) == ["scene_imagination", "comprehensive_t2i_caption", "subjects", "subject_details", *shared, "text_and_signage_elements", "quadrant_scan", "resolution", "aspect_ratio"]  # fmt: skip
    assert list(schemas["video"]) == ["scene_imagination", "temporal_caption", "audio_description", "subjects", *shared, "actions", "text_and_signage_elements", "segments", "transitions", "resolution", "aspect_ratio", "duration", "fps"]  # fmt: skip
    subject = {kind: list(schemas[kind]["subjects"]["items"]["properties"]) for kind in schemas}
    assert subject["video"][6:9] == ["pose", "action", "state_changes"]
    assert subject["image"][6:8] == ["pose", "clothing"]
    assert subject["image"][-2:] == ["number_of_hands", "number_of_fingers"]
    assert schemas["image"]["subject_details"]["additionalProperties"]["type"] == "string"


def test_the_question_and_the_documented_sampling() -> None:
    question = upsampling_question("a {boat}", VIDEO)
    assert "Request: a {boat}" in question.prompt
    assert (
        "1280 pixels wide and 720 high, 7.9 seconds long at 24 frames a second" in question.prompt
    )
    assert "none is later than 0:08:" in question.prompt
    assert "picture above" not in question.prompt
    assert "picture above" in upsampling_question("a", VIDEO, image="a.png").prompt
    picture = upsampling_question("a", IMAGE).prompt
    assert "seconds" not in picture
    assert "comprehensive_t2i_caption" in picture
    drawn = sampling_params(question)
    assert (drawn.max_tokens, drawn.temperature, drawn.top_p, drawn.top_k) == (20000, 0.7, 0.8, 20)
    assert (drawn.repetition_penalty, drawn.presence_penalty, drawn.seed) == (1.0, 1.5, 3407)
    assert drawn.structured_outputs.json == schema_of(VIDEO)


@pytest.mark.parametrize("facts", [IMAGE, VIDEO], ids=["image", "video"])
def test_the_generator_reads_the_keys_in_the_order_of_the_published_prompts(facts: Facts) -> None:
    """The facts stay where they are in a caption; one without them gets them in another order."""
    caption = caption_of(json.dumps(example(schema_of(facts))), complete=True)
    read = positive_text(caption, facts, style="auto", duration=True, resolution=True)
    assert list(json.loads(read)) == list(schema_of(facts)["properties"])
    assert json.loads(read) == json.loads(caption)


def test_sampling_can_be_chosen() -> None:
    drawn = sampling_params(upsampling_question("a", VIDEO, sampling={"temperature": 0.0, "max_tokens": 9}))  # fmt: skip
    assert (drawn.temperature, drawn.max_tokens) == (0.0, 9)
    with pytest.raises(InvalidRequest, match="top_p is 3"):
        upsampling_question("a", VIDEO, sampling={"top_p": 3})


def test_answers_become_compact_prompts() -> None:
    caption = caption_of('{"subjects": [],\x12 "context": "caf\u00e9\x00\ufffd"}', complete=True)
    assert caption == '{"subjects":[],"context":"caf\\u00e9"}'
    written = json.loads(
        positive_text(caption, VIDEO, style="auto", duration=True, resolution=True)
    )
    assert list(written) == ["subjects", "context", "duration", "fps", "resolution", "aspect_ratio"]
    for text, complete, words in (('{"a', False, "was cut"), ("[1]", True, "is not JSON")):
        with pytest.raises(UpsamplingFailed, match=words):
            caption_of(text, complete=complete)


def test_what_a_request_is_asked_for(planned: Callable[[GenerateRequest], Plan]) -> None:
    picture = np.zeros((64, 64, 3), np.uint8)
    request = GenerateRequest(prompt="a", image=picture, size="64x64", num_frames=25)
    question = question_about(request, planned(request), {})
    assert question is not None
    assert question.image is picture
    clip = np.arange(9, dtype=np.uint8)[:, None, None, None] * np.ones((1, 64, 64, 3), np.uint8)
    request = replace(request, image=None, video=clip, condition_video_keep="last")
    question = question_about(request, planned(request), {})
    assert question is not None
    assert (np.asarray(question.image) == 4).all()  # the first of the last five
    request = GenerateRequest(prompt='{"context": "x"}')
    plan = planned(request)
    assert question_about(request, plan, {}) is None
    for fields in (
        {"prompt_token_ids": [1]},
        {"prompt": "a", "action_mode": "policy", "image": picture, "domain_name": "av"},
        {"prompt": "a", "image": picture, "num_frames": 1},
    ):
        with pytest.raises(InvalidRequest, match="upsample_prompt"):
            question_about(GenerateRequest(**fields), plan, {})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "seconds"),
    [
        ({"size": "832x480", "num_chunks": 4}, "7.9"),
        ({"size": "64x48", "depth": np.zeros((200, 48, 64, 3), np.uint8)}, "3.9"),
        ({"size": "64x48", "num_frames": 25}, "1.0"),
    ],
)
def test_the_reasoner_is_told_the_length_that_the_model_is_told(
    fields: dict[str, Any], seconds: str, tiny_checkpoint: Path
) -> None:
    tokenizer = load_tokenizer(tiny_checkpoint)
    request = from_fields({"prompt": "a boat", **fields})
    plan = make_plan(request, read_config(tiny_checkpoint), tokenizer)
    question = question_about(request, plan, {})
    assert question is not None
    assert f"{seconds} seconds long at 24 frames a second" in question.prompt
    assert f"The video is {seconds} seconds long and is of 24 FPS." in tokenizer.decode(
        plan.token_ids[0]
    )


@pytest.mark.parametrize("taken", [None, 5])
def test_of_a_transfer_the_frames_that_it_takes_over_are_shown(
    taken: int | None, tiny_checkpoint: Path
) -> None:
    ramp = np.arange(1, 10, dtype=np.uint8)[:, None, None, None]
    request = from_fields({
        "prompt": "a boat", "video": ramp * np.ones((1, 48, 64, 3), np.uint8), "edge": True,
        "size": "64x48", "num_first_chunk_conditional_frames": taken,
    })  # fmt: skip
    plan = make_plan(request, read_config(tiny_checkpoint), load_tokenizer(tiny_checkpoint))
    question = question_about(request, plan, {})
    assert question is not None
    if taken is None:  # nothing of the result is known
        assert question.image is None
    else:
        assert (np.asarray(question.image) == 1).all()


def test_a_prompt_of_brackets_is_a_text(planned: Callable[[GenerateRequest], Plan]) -> None:
    request = GenerateRequest(prompt="[" * 100_000)
    question = question_about(request, planned(request), {})
    assert question is not None
    assert "[" * 100_000 in question.prompt


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": " "}, "prompt is ' '"),
        ({"prompt": "a", "top_p": 0}, "top_p is 0, must be a number above 0 up to 1"),
        ({"prompt": "a", "max_new_tokens": "9"}, "max_new_tokens is '9', must be an integer"),
        ({"prompt": "a", "image": "a", "video": "b"}, "video is 'b', must be left out"),
        ({"prompt": "a", "temprature": 1}, "did you mean temperature?"),
    ],
)
def test_mistakes_in_questions(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        question_of(fields)
    assert message in str(error.value)


def test_answers_are_greedy_unless_they_are_drawn() -> None:
    assert sampling_params(Question(prompt="a", temperature=0.6)).temperature == 0
    drawn = sampling_params(Question(prompt="a", do_sample=True, seed=1))
    assert (drawn.temperature, drawn.presence_penalty, drawn.seed) == (0.7, 1.5, 1)


def test_structured_prompts_stay(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ['{"context": "x"}', '{"context": "y"}']
    assert main(["upsample", str(tiny_checkpoint), "--prompt", *prompts]) == 0
    assert capsys.readouterr().out == '{"context":"x"}\n{"context":"y"}\n'
    file = tmp_path / "prompts.jsonl"
    assert main(["upsample", str(tiny_checkpoint), "--prompt", prompts[0], "--out", str(file)]) == 0
    assert file.read_text() == '{"context":"x"}\n'


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "a", "--top-p", "3"], "--top-p is 3.0, must be a number above 0 up to 1"),
        (["--prompt", "a", "--size", "1x1"], "size is '1x1'"),
        (["--prompt", "a", "--image", "/none.png"], "image is '/none.png'"),
        (["--prompt", " "], "prompt is ' '"),
        (["--prompt", "a", "--out", "/none/here"], "out is '/none/here'"),
        (["--prompt", "a", "--out", "/tmp"], "out is '/tmp', must be a file that can be written"),
        (["--prompt", "a", "--out", "/proc/here"], "out is '/proc/here', must be a file that"),
    ],
)
def test_mistakes_on_the_command_line(
    flags: list[str], message: str, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["upsample", str(tiny_checkpoint), *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vllm-cosmos3 upsample: ")
    assert message in line


def test_limits_in_the_help_are_whole_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["upsample", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "(default: 20,000)" in said
    assert "e+0" not in said
