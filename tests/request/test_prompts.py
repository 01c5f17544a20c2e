"""The text around a prompt, and its token ids."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_cosmos3.errors import CheckpointError, InvalidRequest
from vllm_cosmos3.request import prompts

FACTS = prompts.Facts(num_frames=189, fps=24.0, height=720, width=1280, aspect_ratio="16,9")
IMAGE = prompts.Facts(num_frames=1, fps=24.0, height=960, width=960, aspect_ratio="1,1")
LENGTH = "The video is 7.9 seconds long and is of 24 FPS."
SIZE = "This video is of 720x1280 resolution."
TOP_LEVEL = [
    "subjects",
    "background_setting",
    "lighting",
    "aesthetics",
    "cinematography",
    "style_medium",
    "artistic_style",
    "context",
    "actions",
    "text_and_signage_elements",
    "segments",
    "transitions",
    "temporal_caption",
    "audio_description",
    "physical_realism",
]


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> prompts.Tokenizer:
    return prompts.load_tokenizer(tiny_checkpoint)


def positive(prompt: str, facts: prompts.Facts = FACTS, **more: object) -> str:
    choices = {"style": "auto", "duration": True, "resolution": True, **more}
    return prompts.positive_text(prompt, facts, **choices)


def negative(prompt: str, facts: prompts.Facts = FACTS, **more: object) -> str:
    choices = {"metadata": "same", "duration": True, "resolution": True, **more}
    return prompts.negative_text(prompt, facts, **choices)


@pytest.mark.parametrize("prompt", ["A boat", "A boat.", "  A boat. ", "A boat.."])
def test_plain_prompt_ends_with_sentences(prompt: str) -> None:
    assert positive(prompt) == f"A boat. {LENGTH} {SIZE}"


def test_sentences_can_be_left_out() -> None:
    assert positive("A boat.", duration=False) == f"A boat. {SIZE}"
    assert positive("A boat.", resolution=False) == f"A boat. {LENGTH}"
    assert positive("A boat. ", duration=False, resolution=False) == "A boat. "


def test_image_has_no_length() -> None:
    assert positive("A boat", IMAGE) == "A boat. This image is of 960x960 resolution."


def test_json_caption_gets_keys() -> None:
    caption = {"fps": 3, "subjects": ["é"], "aspect_ratio": "1,1"}
    text = positive(json.dumps(caption))
    assert text == (
        '{"fps": 24.0, "subjects": ["\\u00e9"], "aspect_ratio": "16,9", "duration": "7s",'
        ' "resolution": {"H": 720, "W": 1280}}'
    )


def test_json_caption_of_an_image_loses_its_length() -> None:
    text = positive('{"duration": "9s", "fps": 10, "context": "a"}', IMAGE)
    assert text == '{"context": "a", "resolution": {"H": 960, "W": 960}, "aspect_ratio": "1,1"}'


def test_unusual_size_leaves_the_aspect_ratio_alone() -> None:
    facts = replace(FACTS, aspect_ratio=None)
    assert json.loads(positive('{"aspect_ratio": "3,2"}', facts))["aspect_ratio"] == "3,2"


def test_formats() -> None:
    assert positive('{"a": 1}', style="plain") == f'{{"a": 1}}. {LENGTH} {SIZE}'
    assert positive("[1]") == f"[1]. {LENGTH} {SIZE}"
    assert positive("[" * 100_000, duration=False, resolution=False) == "[" * 100_000
    with pytest.raises(InvalidRequest, match="a JSON object") as caught:
        positive("A boat", style="json")
    assert caught.value.field == "prompt"


def test_negative_metadata() -> None:
    assert negative("blurry") == f"blurry. {LENGTH} {SIZE}"
    assert negative('{"a": 1}') == f'{{"a": 1}}. {LENGTH} {SIZE}'
    assert negative("") == f"{LENGTH} {SIZE}"
    assert negative("", IMAGE) == "This image is of 960x960 resolution."
    assert negative("blurry. ", metadata="none") == "blurry. "
    inverse = (
        "blurry. The video is not 7.9 seconds long and is not of 24 FPS."
        " This video is not of 720x1280 resolution."
    )
    assert negative("blurry", metadata="inverse") == inverse
    assert negative("", IMAGE, metadata="inverse") == "This image is not of 960x960 resolution."


def test_default_negative_is_structured(tiny_checkpoint: Path) -> None:
    text = prompts.default_negative(tiny_checkpoint, ["negative_prompt.json"])
    assert list(json.loads(text)) == TOP_LEVEL
    assert "\n" not in text


def test_checkpoint_brings_its_own_negative(tiny_checkpoint: Path, tmp_path: Path) -> None:
    names = ["negative_prompt_i2v.json", "negative_prompt.json"]
    assets = tmp_path / "assets"
    assets.mkdir()
    (assets / names[1]).write_text('{"b":\n1}')
    assert prompts.default_negative(tmp_path, names) == '{"b": 1}'
    (assets / names[0]).write_text('{"a": "é"}')
    assert prompts.default_negative(tmp_path, names) == '{"a": "\\u00e9"}'
    (assets / names[0]).write_text("{")
    with pytest.raises(CheckpointError, match=r"negative_prompt_i2v\.json cannot be read"):
        prompts.default_negative(tmp_path, names)


def test_chat_frame(tokenizer: prompts.Tokenizer) -> None:
    ids, length = prompts.encode("A boat", tokenizer, system=prompts.SYSTEM_VIDEO, limit=4096)
    assert length == len(ids)
    assert tokenizer.decode(ids) == (
        f"<|im_start|>system\n{prompts.SYSTEM_VIDEO}<|im_end|>\n<|im_start|>user\nA boat<|im_end|>\n"
        "<|im_start|>assistant\n<|im_end|><|vision_start|>"
    )


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc"])), st.integers(64, 90))
@settings(deadline=None)
def test_cut_keeps_the_frame(tokenizer: prompts.Tokenizer, text: str, limit: int) -> None:
    whole, length = prompts.encode(text, tokenizer, system=None, limit=10**6)
    ids, before = prompts.encode(text, tokenizer, system=None, limit=limit)
    assert before == length == len(whole)
    assert len(ids) == min(limit, length)
    tail = tokenizer.encode("<|im_end|>\n<|im_start|>assistant\n<|im_end|><|vision_start|>")
    assert list(ids[-len(tail) :]) == tail
    assert ids[: len(ids) - len(tail)] == whole[: len(ids) - len(tail)]


def test_foreign_tokenizer_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"text_tokenizer cannot be read"):
        prompts.load_tokenizer(tmp_path)
    shutil.copytree(tiny_checkpoint / "text_tokenizer", tmp_path / "text_tokenizer")
    (tmp_path / "text_tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"text_tokenizer cannot be read"):
        prompts.load_tokenizer(tmp_path)
