"""Pictures that share their steps on a GPU: what they are alone but for rounding, as a graph and launched."""

from __future__ import annotations

import pytest
import torch
from test_generator_on_gpu import IMAGE, apart
from torch import Tensor

from vllm_cosmos3.generator import prediction
from vllm_cosmos3.generator.pipeline import Pipeline
from vllm_cosmos3.request.batching import with_batch
from vllm_cosmos3.request.planner import make_plan
from vllm_cosmos3.request.request import from_fields

pytestmark = pytest.mark.gpu
STEPS = 12


def made(
    pipeline: Pipeline, seeds: list[int], leaving: dict[int, int] | None = None
) -> list[Tensor]:
    """Latents of pictures of these seeds, each with a prompt of another length; some leave at a step."""
    states = []
    for seed in seeds:
        ids = [10 + (7 * at + seed) % 400 for at in range(100 + 30 * seed)]
        fields = IMAGE | {"seed": seed, "num_inference_steps": STEPS, "prompt_token_ids": ids}
        plan = make_plan(from_fields(fields), pipeline.model, pipeline.tokenizer)
        states.append(pipeline.encode(with_batch(plan, patch=2, limit=8)))
    stay = list(states)
    for step in range(STEPS):
        stay = [state for state in stay if (leaving or {}).get(state.plan.seeds[0]) != step]
        pipeline.step_together(stay)
    return [state.denoised[0]["vision"] for state in stay]


@pytest.mark.parametrize("count", [2, 8])
def test_batching_changes_rounding_alone(pipeline: Pipeline, count: int) -> None:
    together = made(pipeline, list(range(count)))
    alone = [made(pipeline, [seed])[0] for seed in range(count)]
    distances = [apart(one, other) for one, other in zip(together, alone, strict=True)]
    print("equal bits:", [torch.equal(*pair) for pair in zip(together, alone, strict=True)])  # noqa: T201
    print("apart:", " ".join(f"{each:.1e}" for each in distances))  # noqa: T201
    assert (
        max(distances) <= 3e-2
    )  # two roundings to bfloat16, which guidance multiplies, are 2e-2 apart
    assert apart(together[0], together[1]) > 0.1


def test_a_graph_of_a_batch_equals_launched_kernels_and_is_made_anew_when_one_leaves(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    replayed = made(pipeline, [1, 2, 3, 4], leaving={3: 5})
    monkeypatch.setattr(prediction, "launches_matter", lambda *_: False)
    launched = made(pipeline, [1, 2, 3, 4], leaving={3: 5})
    assert len(replayed) == 3
    for one, other in zip(replayed, launched, strict=True):
        assert apart(one, other) <= 5e-3


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_no_shared_step_waits_for_the_device(pipeline: Pipeline) -> None:
    states = []
    for seed in range(4):
        fields = IMAGE | {"seed": seed, "num_inference_steps": STEPS}
        plan = make_plan(from_fields(fields), pipeline.model, pipeline.tokenizer)
        states.append(pipeline.encode(with_batch(plan, patch=2, limit=8)))
    for _ in range(4):
        pipeline.step_together(states)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            pipeline.step_together(states)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(bool(torch.isfinite(state.streams[0].x).all()) for state in states)
