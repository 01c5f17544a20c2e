"""Who may be denoised with whom, and how many of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_cosmos3.checkpoint.config import ModelConfig, read_config
from vllm_cosmos3.request.batching import ROWS, rows, with_batch
from vllm_cosmos3.request.plan import Plan
from vllm_cosmos3.request.planner import make_plan
from vllm_cosmos3.request.prompts import Tokenizer, load_tokenizer
from vllm_cosmos3.request.request import from_fields

PICTURE = np.zeros((64, 96, 3), dtype=np.uint8)
IMAGE = {"prompt": "A boat", "size": "320x192", "num_frames": 1, "seed": 1}
FIELDS = st.fixed_dictionaries(
    {
        "size": st.sampled_from(["320x192", "192x320", "256x256"]),
        "num_frames": st.just(1),
        "num_inference_steps": st.sampled_from([4, 35]),
        "guidance_scale": st.sampled_from([1.0, 4.0]),
        "flow_shift": st.sampled_from([3.0, 5.0]),
        "prompt": st.sampled_from(["A boat", "A paper boat on a stream"]),
        "seed": st.integers(0, 3),
    }
)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> ModelConfig:
    return read_config(tiny_checkpoint)


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    return load_tokenizer(tiny_checkpoint)


def planned(
    model: ModelConfig, tokenizer: Tokenizer, fields: dict[str, Any], limit: int = 8
) -> Plan:
    plan = make_plan(from_fields(fields), model, tokenizer)
    return with_batch(plan, patch=model.transformer.latent_patch_size, limit=limit)


def test_small_pictures_share_a_forward_of_few_rows(
    model: ModelConfig, tokenizer: Tokenizer
) -> None:
    """A 320x192 picture has 60 tokens in each branch: eight have 960 rows."""
    plan = planned(model, tokenizer, IMAGE)
    assert rows(plan, model.transformer.latent_patch_size) == 2 * 60
    assert plan.batch is not None
    assert plan.batch.size == 8
    assert planned(model, tokenizer, IMAGE, limit=64).batch.size == ROWS // 120
    assert planned(model, tokenizer, IMAGE, limit=3).batch.size == 3
    unguided = planned(model, tokenizer, {**IMAGE, "guidance_scale": 1}, limit=64)
    assert unguided.batch.size == ROWS // 60
    assert planned(model, tokenizer, IMAGE, limit=1).batch is None
    assert planned(model, tokenizer, {**IMAGE, "size": "1280x720"}).batch is None


def test_samples_of_one_request_are_together(model: ModelConfig, tokenizer: Tokenizer) -> None:
    alone = planned(model, tokenizer, {**IMAGE, "n": 10, "num_inference_steps": 35}, limit=1)
    assert (alone.together, alone.steps) == (1, 350)
    plan = planned(model, tokenizer, {**IMAGE, "n": 10, "num_inference_steps": 35})
    assert (plan.together, plan.steps, plan.batch) == (8, 70, None)
    assert planned(model, tokenizer, {**IMAGE, "n": 3}).together == 3


@pytest.mark.parametrize(
    "fields",
    [
        {"step_cache": "sea"},
        {"num_frames": 5, "generate_sound": True, "size": "64x64"},
        {"num_frames": 9, "image": PICTURE, "num_chunks": 2, "size": "64x64"},
        {"num_frames": 9, "edge": True, "video": np.stack([PICTURE] * 9), "size": "64x64"},
        {
            "action_mode": "policy",
            "domain_name": "droid",
            "raw_action_dim": 8,
            "action_chunk_size": 8,
            "image": PICTURE,
            "size": "96x64",
        },
    ],
    ids=["step cache", "sound", "chunks", "control", "action"],
)
def test_others_are_made_alone(
    fields: dict[str, Any], model: ModelConfig, tokenizer: Tokenizer
) -> None:
    plan = planned(model, tokenizer, {"prompt": "A boat", "seed": 1, **fields}, limit=64)
    assert (plan.batch, plan.together) == (None, 1)


@settings(max_examples=60, deadline=None)
@given(one=FIELDS, other=FIELDS)
def test_a_batch_is_of_equal_sizes_steps_and_schedules(
    model: ModelConfig, tokenizer: Tokenizer, one: dict[str, Any], other: dict[str, Any]
) -> None:
    batches = [planned(model, tokenizer, fields).batch for fields in (one, other)]
    own = {"prompt", "seed"}
    alike = all(one[name] == other[name] for name in one.keys() - own)
    assert (batches[0] == batches[1]) == alike
