"""Samples that are denoised in one forward are what they are alone: float32, to 1e-5 of the largest value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_pipeline import load

from vllm_cosmos3.checkpoint.synthetic import write_checkpoint
from vllm_cosmos3.generator.output import Output
from vllm_cosmos3.generator.pipeline import Pipeline, RequestState
from vllm_cosmos3.request.batching import with_batch
from vllm_cosmos3.request.planner import make_plan
from vllm_cosmos3.request.request import from_fields

BOUND = 1e-5
PICTURE = np.random.RandomState(0).randint(0, 256, (64, 96, 3), dtype=np.uint8)
PROMPTS = [
    "A boat",
    "A paper boat on a stream, seen from far above, at dusk",
    "Snow",
    "A robot waves at a train that has left",
    "Rain",
    "Two cats on a roof",
    "A mill",
    "A red balloon over a town by the sea",
]
IMAGE = {"size": "96x64", "num_frames": 1, "num_inference_steps": 4, "output_type": "latent"}


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint_fp32: Path) -> Pipeline:
    return load(tiny_checkpoint_fp32)


def encoded(pipeline: Pipeline, fields: dict[str, Any], limit: int = 8) -> RequestState:
    plan = make_plan(from_fields(fields), pipeline.model, pipeline.tokenizer)
    patch = pipeline.model.transformer.latent_patch_size
    return pipeline.encode(with_batch(plan, patch=patch, limit=limit))


def ended(pipeline: Pipeline, state: RequestState) -> Output:
    pipeline.decode(state)
    return pipeline.finish(state)


def alone(pipeline: Pipeline, fields: dict[str, Any]) -> Output:
    state = encoded(pipeline, fields, limit=1)
    while not state.done:
        pipeline.step(state)
    return ended(pipeline, state)


def check_equal(made: Output, expected: Output) -> None:
    for one, other in zip(made.samples, expected.samples, strict=True):
        assert one.seed == other.seed
        latents, reference = one.latents["vision"], other.latents["vision"]
        assert np.abs(latents - reference).max() <= BOUND * np.abs(reference).max()


def requests(count: int, **fields: Any) -> list[dict[str, Any]]:
    return [{**IMAGE, "prompt": PROMPTS[at], "seed": at, **fields} for at in range(count)]


@pytest.mark.parametrize(
    ("count", "fields"),
    [
        (2, {}),
        (5, {"guidance_interval": [400, 1000]}),
        (8, {"guidance_scale": 1}),
        (8, {"negative_prompt": "blurry"}),
        (3, {"image": PICTURE}),
        (3, {"num_frames": 5}),
    ],
    ids=["two", "guided at times", "unguided", "eight", "edits", "videos"],
)
def test_batching_changes_nothing(pipeline: Pipeline, count: int, fields: dict[str, Any]) -> None:
    asked = requests(count, **fields)
    states = [encoded(pipeline, each) for each in asked]
    assert len({state.plan.batch for state in states}) == 1
    forwards: list[int] = []
    hook = pipeline.transformer.register_forward_hook(lambda *_: forwards.append(1))
    while not states[0].done:
        assert pipeline.step_together(states) == [0] * count
    hook.remove()
    assert len(forwards) == IMAGE["num_inference_steps"]
    for state, each in zip(states, asked, strict=True):
        made = ended(pipeline, state)
        assert made.batch_size == count
        check_equal(made, alone(pipeline, each))


def test_those_that_leave_change_nothing_for_the_others(pipeline: Pipeline) -> None:
    asked = requests(4)
    states = [encoded(pipeline, each) for each in asked]
    for step in range(IMAGE["num_inference_steps"]):
        pipeline.step_together(states[: 4 - step])
    last = states[0]
    assert last.predictor is not states[1].predictor
    assert (last.done, last.batch_size) == (True, 4)
    check_equal(ended(pipeline, last), alone(pipeline, asked[0]))


def test_samples_of_one_request_share_its_steps(pipeline: Pipeline) -> None:
    """Five seeds in forwards of three: two rounds, of three samples and of two."""
    fields = {**IMAGE, "prompt": PROMPTS[0], "seed": 3, "n": 5}
    state, steps = encoded(pipeline, fields, limit=3), 0
    assert state.plan.steps == 2 * IMAGE["num_inference_steps"]
    while not state.done:
        pipeline.step(state)
        steps += 1
    made = ended(pipeline, state)
    assert (steps, made.batch_size) == (state.plan.steps, 3)
    check_equal(made, alone(pipeline, fields))


def test_fresh_noise_is_each_samples_own(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "tiny", dtype="float32", kind="distilled-t2i")
    pipeline = load(tmp_path / "tiny")
    asked = [{**each, "num_inference_steps": None} for each in requests(3)]
    states = [encoded(pipeline, each) for each in asked]
    while not states[0].done:
        pipeline.step_together(states)
    for state, each in zip(states, asked, strict=True):
        check_equal(ended(pipeline, state), alone(pipeline, each))
