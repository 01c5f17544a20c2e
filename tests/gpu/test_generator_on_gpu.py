"""Whole steps at Nano's width: precision, graphs, branches side by side, and no waiting."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from vllm_cosmos3.generator import prediction
from vllm_cosmos3.generator.pipeline import Pipeline, RequestState
from vllm_cosmos3.request.planner import make_plan
from vllm_cosmos3.request.request import from_fields

pytestmark = pytest.mark.gpu

IMAGE = {
    "prompt_token_ids": list(range(10, 138)),
    "negative_prompt_token_ids": list(range(20, 84)),
    "size": "320x192",
    "num_frames": 1,
    "num_inference_steps": 35,
    "guidance_scale": 6.0,
    "flow_shift": 10.0,
    "seed": 3,
    "allow_untrained_size": True,
}
POLICY = IMAGE | {  # what a robot asks for
    "action_mode": "policy",
    "domain_name": "droid_lerobot",
    "raw_action_dim": 8,
    "action_state": [0.1] * 8,
    "image": np.random.RandomState(0).randint(0, 256, (544, 640, 3), dtype=np.uint8),
    "size": "640x544",
    "num_frames": 33,
}
VIDEO = IMAGE | {"num_frames": 189}  # too many tokens for a graph, and for branches side by side


def started(pipeline: Pipeline, fields: dict[str, object]) -> RequestState:
    return pipeline.encode(make_plan(from_fields(fields), pipeline.model, pipeline.tokenizer))


def latents(pipeline: Pipeline, fields: dict[str, object], steps: int) -> Tensor:
    """The video's latents after so many of the request's steps."""
    state = started(pipeline, fields)
    for _ in range(steps):
        pipeline.step(state)
    x: Tensor = state.denoised[0]["vision"] if state.done else state.streams[0].x
    return x


def apart(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.mark.parametrize("fields", [IMAGE, VIDEO], ids=["image", "video"])
@pytest.mark.parametrize(
    ("steps", "guidance", "bound"),
    [
        (35, 6.0, 2e-3),  # the first four of the usual schedule: nearly all is noise yet
        (4, 1.0, 2e-2),  # a whole request
        (4, 6.0, 4e-2),  # guidance multiplies how differently two branches were rounded
    ],
)
def test_bfloat16_stays_near_float32(
    pipeline: Pipeline,
    reference: Pipeline,
    fields: dict[str, object],
    steps: int,
    guidance: float,
    bound: float,
) -> None:
    """Latents after four steps, with the same weights to the bit."""
    fields = fields | {"num_inference_steps": steps, "guidance_scale": guidance}
    rounded, precise = (latents(each, fields, 4) for each in (pipeline, reference))
    distance = apart(rounded, precise)
    print(f"{distance:.2e}")  # noqa: T201 pytest -rP shows it
    assert distance <= bound
    assert apart(rounded, latents(pipeline, fields, 3)) > 5 * distance


def test_actions_in_bfloat16_stay_near_float32(pipeline: Pipeline, reference: Pipeline) -> None:
    fields = POLICY | {"num_inference_steps": 4, "guidance_scale": 1.0}
    made = []
    for each in (pipeline, reference):
        state = started(each, fields)
        while not state.done:
            each.step(state)
        made.append(state.denoised[0]["action"])
    rounded, precise = made
    assert rounded.shape == (33, 64)
    assert torch.equal(rounded[0, :8], precise[0, :8])  # the state, which is given
    assert not rounded[:, 8:].any()
    assert apart(rounded[1:, :8], precise[1:, :8]) <= 2e-2


def test_bfloat16_velocities_stay_near_float32(pipeline: Pipeline, reference: Pipeline) -> None:
    """One evaluation of each branch, which the noise of the latents cannot hide."""
    pairs = []
    for each in (pipeline, reference):
        state = started(each, VIDEO)
        each.step(state)  # draws the noise
        with torch.inference_mode():
            context = state.contexts[0]
            timestep = state.timesteps[0]
            pairs.append(each.transformer(state.streams, context, timestep, 0)[0][0])
    assert apart(*pairs) <= 2e-2


def test_a_replayed_graph_equals_launched_kernels(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten steps, of which the last eight or more are replayed."""
    fields = IMAGE | {"num_inference_steps": 10}
    made: list[int] = []
    recording = prediction.Recording

    def counting(function: object) -> object:
        made.append(1)
        return recording(function)  # type: ignore[arg-type]

    monkeypatch.setattr(prediction, "Recording", counting)
    replayed = latents(pipeline, fields, 10)
    assert made  # few tokens: a graph was recorded
    monkeypatch.setattr(prediction, "launches_matter", lambda *_: False)
    launched = latents(pipeline, fields, 10)
    assert apart(replayed, launched) <= 5e-3
    other = latents(pipeline, fields | {"seed": 4}, 10)
    assert apart(other, launched) > 0.1


def test_every_chunk_of_a_transfer_has_its_own_graph(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second chunk knows its first frame, and has other controls: nothing of it is recorded."""
    clip = np.random.RandomState(0).randint(0, 256, (9, 192, 320, 3), dtype=np.uint8)
    fields = IMAGE | {
        "num_frames": None, "num_inference_steps": 10, "num_video_frames_per_chunk": 5,
        "depth": clip, "seg": {"control": clip[::-1].copy(), "control_weight": 3},
        "control_guidance": 2.0, "guidance_scale": 3.0,
    }  # fmt: skip
    replayed = chunks(pipeline, fields)
    monkeypatch.setattr(prediction, "launches_matter", lambda *_: False)
    launched = chunks(pipeline, fields)
    assert len(launched) == 2
    for one, other in zip(replayed, launched, strict=True):
        assert apart(one, other) <= 2e-2
    assert apart(launched[1], launched[0]) > 0.1


def chunks(pipeline: Pipeline, fields: dict[str, object]) -> list[Tensor]:
    """The latents of each chunk of a whole request."""
    state = started(pipeline, fields)
    while not state.done:
        pipeline.step(state)
    return [made["vision"] for made in state.denoised]


def test_the_next_request_is_not_answered_by_the_last_ones_graph(pipeline: Pipeline) -> None:
    fields = IMAGE | {"num_inference_steps": 10}
    first = latents(pipeline, fields, 10)
    latents(pipeline, fields | {"seed": 9, "prompt_token_ids": list(range(300, 428))}, 10)
    assert torch.equal(latents(pipeline, fields, 10), first)


def test_branches_side_by_side_equal_one_after_the_other(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other matrix shapes round otherwise, hence the margin."""
    together = latents(pipeline, IMAGE, 4)
    monkeypatch.setattr(prediction, "JOINED_TOKENS", 0)
    assert apart(together, latents(pipeline, IMAGE, 4)) <= 1e-2


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("fields", [IMAGE, VIDEO, POLICY], ids=["image", "video", "policy"])
def test_no_step_waits_for_the_device(pipeline: Pipeline, fields: dict[str, object]) -> None:
    """But for the pace between steps. The first ones draw noise, load kernels and record."""
    state = started(pipeline, fields)
    for _ in range(4):
        pipeline.step(state)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            pipeline.step(state)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(torch.isfinite(state.streams[0].x).all())


def test_thirty_five_steps_stay_finite_and_decode(pipeline: Pipeline) -> None:
    state = started(pipeline, IMAGE)
    while not state.done:
        pipeline.step(state)
    assert bool(torch.isfinite(state.denoised[0]["vision"]).all())
    pipeline.decode(state)
    (sample,) = pipeline.finish(state).samples
    assert sample.image is not None
    assert sample.image.shape == (192, 320, 3)
    assert sample.image.std() > 1
