"""Image edits: the picture before the one that is made, its size, and the trained words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from media_files import picture

from vllm_cosmos3.checkpoint.config import ModelConfig, read_config
from vllm_cosmos3.checkpoint.synthetic import write_checkpoint
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.request import prompts
from vllm_cosmos3.request.edits import edit_size
from vllm_cosmos3.request.plan import Plan
from vllm_cosmos3.request.planner import make_plan
from vllm_cosmos3.request.request import from_fields

WIDE = picture(1280, 720)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> ModelConfig:
    return read_config(tiny_checkpoint)


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> prompts.Tokenizer:
    return prompts.load_tokenizer(tiny_checkpoint)


def planned(model: ModelConfig, tokenizer: prompts.Tokenizer, **fields: Any) -> Plan:
    edit = {"prompt": "make it red", "image": WIDE, "num_frames": 1}
    return make_plan(from_fields(edit | fields), model, tokenizer)


@pytest.mark.parametrize(
    ("picture", "edit"),
    [((1280, 720), (512, 288)), ((720, 1280), (288, 512)), ((100, 100), (512, 512)), ((2000, 100), (512, 32)), ((640, 427), (512, 320))],
)  # fmt: skip
def test_sizes_are_those_of_the_framework(picture: tuple[int, int], edit: tuple[int, int]) -> None:
    assert edit_size(*picture) == edit


def test_the_picture_is_a_stream_before_the_edit(
    model: ModelConfig, tokenizer: prompts.Tokenizer
) -> None:
    plan = planned(model, tokenizer)
    given, made = plan.streams
    assert given.shape == made.shape == (1, 48, 1, 18, 32)
    assert (given.known, made.known) == ((0,), ())
    assert (given.positions_after, made.positions_after) == (False, True)
    assert given.source is not None
    assert given.source.shape == (1, 288, 512, 3)
    assert np.abs(given.source[0].mean((0, 1)) - np.asarray(WIDE).mean((0, 1))).max() < 2
    assert given.hidden_in_branches == made.hidden_in_branches == ()
    numbers = plan.parameters
    assert (numbers.mode, numbers.num_inference_steps) == ("image2image", 35)
    assert (numbers.guidance_scale, numbers.flow_shift, numbers.num_frames) == (6.0, 5.0, 1)
    assert plan.warnings == ()


def test_both_branches_have_the_words_of_edits(
    model: ModelConfig, tokenizer: prompts.Tokenizer
) -> None:
    plan = planned(model, tokenizer)
    texts = [tokenizer.decode(list(ids), skip_special_tokens=True) for ids in plan.token_ids]
    assert len(texts) == 2
    for text in texts:
        assert prompts.SYSTEM_EDIT in text
        assert "This image is of 288x512 resolution." in text
    assert "make it red. This image" in texts[0]
    assert "make it red" not in texts[1]


def test_another_size_is_covered(model: ModelConfig, tokenizer: prompts.Tokenizer) -> None:
    plan = planned(model, tokenizer, size="256x256")
    assert plan.streams[0].source is not None
    assert plan.streams[0].source.shape == (1, 256, 256, 3)
    middle = np.asarray(WIDE)[:, 280:1000].mean((0, 1))
    assert np.abs(plan.streams[0].source.mean((0, 1, 2)) - middle).max() < 2


def test_kinds_that_were_not_trained_for_it(tmp_path: Path, tokenizer: prompts.Tokenizer) -> None:
    write_checkpoint(tmp_path / "tiny", kind="distilled-t2i", weights=False)
    with pytest.raises(InvalidRequest, match="mode is 'image2image', must be text2image"):
        planned(read_config(tmp_path / "tiny"), tokenizer)
