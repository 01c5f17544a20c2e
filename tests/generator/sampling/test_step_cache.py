"""Which steps are reused, on one rank and on several."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import Ranks

from vllm_cosmos3.engine_options import EngineConfig, ParallelConfig
from vllm_cosmos3.generator.output import Output
from vllm_cosmos3.generator.pipeline import Pipeline
from vllm_cosmos3.generator.sampling.step_cache import Reuse, filtered, mean_change
from vllm_cosmos3.parallel.mesh import Mesh
from vllm_cosmos3.request.planner import make_plan
from vllm_cosmos3.request.request import GenerateRequest
from vllm_cosmos3.request.step_cache import StepCache

BOTH = [(0,), (1,)]
JOINED = [(0, 1)]


def moving(changes: list[float]) -> list[list[torch.Tensor]]:
    """Latents that grow by these shares, step by step; the filter is linear."""
    x, found = torch.randn(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0)), []
    for change in [0.0, *changes]:
        x = x * (1 + change)
        found.append([x])
    return found


def decisions(
    policy: StepCache, changes: list[float], groups: list[list[tuple[int, ...]]]
) -> list[set[int]]:
    reuse = Reuse(policy=policy, steps=len(changes) + 1)
    steps = zip(moving(changes), groups, strict=True)
    return [set(reuse.decide(i, 0.5, x, group)) for i, (x, group) in enumerate(steps)]


def test_changes_add_up_until_a_step_is_computed() -> None:
    policy = StepCache(threshold=0.25, max_reused=10)
    made = decisions(policy, [0.1, 0.1, 0.1, 0.01, 0.3, 0.01], [BOTH] * 7)
    assert made == [set(), {0, 1}, {0, 1}, set(), {0, 1}, set(), set()]


def test_at_most_so_many_in_a_row() -> None:
    made = decisions(StepCache(), [0.001] * 8, [BOTH] * 9)
    assert [bool(step) for step in made] == [
        False,
        True,
        True,
        False,
        True,
        True,
        False,
        True,
        False,
    ]


def test_a_branch_that_was_left_out_starts_again() -> None:
    """The second branch is not in steps 2 and 3; the first goes on, unless the two are joined."""
    groups = [BOTH, BOTH, [(0,)], [(0,)], BOTH, BOTH, BOTH]
    policy = StepCache(threshold=1, max_reused=10)
    made = decisions(policy, [0.01] * 6, groups)
    assert made == [set(), {0, 1}, {0}, {0}, {0}, {0, 1}, set()]
    joined = [JOINED, JOINED, [(0,)], [(0,)], JOINED, JOINED, JOINED]
    made = decisions(policy, [0.01] * 6, joined)
    assert made == [set(), {0, 1}, {0}, {0}, set(), {0, 1}, set()]


def test_nothing_is_reused_without_video_or_with_broken_numbers() -> None:
    reuse = Reuse(policy=StepCache(threshold=10), steps=9)
    assert not any(reuse.decide(index, 0.5, [], BOTH) for index in range(9))
    x = torch.full((1, 4, 3, 4, 4), torch.nan)
    reuse = Reuse(policy=StepCache(threshold=10), steps=9)
    assert not any(reuse.decide(index, 0.5, [x], BOTH) for index in range(9))


@pytest.mark.parametrize(("order", "expected"), [(0, 3.0), (1, 5.0)])
def test_residuals_go_on_by_the_index(order: int, expected: float) -> None:
    """1 in step 0 and 3 in step 2: in step 4 it is 3 as it was, or 5."""
    reuse = Reuse(policy=StepCache(order=order), steps=9)
    for index, value in ((0, 1.0), (2, 3.0)):
        reuse.record(0, index, torch.full((2, 2), value))
    assert torch.equal(reuse.residual(0, 4), torch.full((2, 2), expected))


MESHES = [
    ParallelConfig(ulysses_degree=2),
    ParallelConfig(cfg_parallel_size=2),
    ParallelConfig(tensor_parallel_size=2),
    ParallelConfig(cfg_parallel_size=2, ulysses_degree=2),
]
COMMON = {
    "prompt": "A paper boat",
    "negative_prompt": "blurry",
    "num_inference_steps": 8,
    "seed": 7,
    "output_type": "latent",
    "step_cache": "sea",
    "flow_shift": 3.0,
}
IMAGE = np.random.RandomState(0).randint(0, 256, (48, 80, 3), dtype=np.uint8)
CLIP = np.random.RandomState(1).randint(0, 256, (5, 64, 80, 3), dtype=np.uint8)
REQUESTS = {
    "video with sound": {"num_frames": 9, "size": "96x64", "generate_sound": True},
    "interval": {"num_frames": 5, "size": "64x64", "guidance_interval": (300.0, 900.0)},
    "image": {"num_frames": 9, "size": "80x64", "image": IMAGE},
    "rollout": {"num_frames": 5, "size": "64x64", "image": IMAGE, "num_chunks": 2},
    "transfer": {"edge": {"control": CLIP}, "size": "64x80", "control_guidance": 2.0},
    "transfer with an interval": {
        "edge": {"control": CLIP},
        "size": "64x80",
        "control_guidance": 2.0,
        "guidance_interval": (300.0, 900.0),
    },
    "policy": {
        "action_mode": "policy",
        "domain_name": "droid",
        "raw_action_dim": 8,
        "action_chunk_size": 8,
        "image": IMAGE,
        "size": "96x64",
        "guidance_scale": 3.0,
    },
}


def on_mesh(mesh: Mesh, folder: Path, parallel: ParallelConfig, knife: float) -> dict[str, Output]:
    config = EngineConfig(model=folder, dtype="float32", device="cpu", **asdict(parallel))
    pipeline = Pipeline.load(config, mesh, "cpu")
    cases = {
        name: {**COMMON, "step_cache_threshold": 0.5, **more} for name, more in REQUESTS.items()
    }
    cases["knife"] = {**COMMON, **REQUESTS["image"], "step_cache_threshold": knife}
    return {name: run(pipeline, GenerateRequest(**fields)) for name, fields in cases.items()}


def run(pipeline: Pipeline, request: GenerateRequest) -> Output:
    state = pipeline.encode(make_plan(request, pipeline.model, pipeline.tokenizer))
    while not state.done:
        pipeline.step(state)
    pipeline.decode(state)
    return pipeline.finish(state)


def first_change(mesh: Mesh, folder: Path) -> float:
    """How much the filtered latents of the picture's request change in its first step."""
    pipeline = Pipeline.load(EngineConfig(model=folder, dtype="float32"), mesh, "cpu")
    request = GenerateRequest(**COMMON, **REQUESTS["image"])
    state = pipeline.encode(make_plan(request, pipeline.model, pipeline.tokenizer))
    seen = []
    for index in range(2):
        pipeline.step(state)
        before = state.predictor._reuse._seen
        seen.append(before)
        assert len(before) == 1, index
    return mean_change(seen[1], seen[0])


@pytest.fixture(scope="module")
def knife(ranks: Ranks, tiny_checkpoint_fp32: Path) -> float:
    """A threshold that the first change meets to the last bit: the smallest difference tips it."""
    (change,) = ranks(ParallelConfig(), first_change, tiny_checkpoint_fp32)
    return change


@pytest.fixture(scope="module")
def alone(ranks: Ranks, tiny_checkpoint_fp32: Path, knife: float) -> dict[str, Output]:
    (found,) = ranks(ParallelConfig(), on_mesh, tiny_checkpoint_fp32, ParallelConfig(), knife)
    return found


@pytest.mark.parametrize("parallel", MESHES, ids=lambda p: "x".join(map(str, p.degrees.values())))
def test_ranks_decide_alike(
    ranks: Ranks,
    tiny_checkpoint_fp32: Path,
    knife: float,
    alone: dict[str, Output],
    parallel: ParallelConfig,
) -> None:
    """A rank that decided otherwise would wait for the others for ever."""
    every = ranks(parallel, on_mesh, tiny_checkpoint_fp32, parallel, knife)
    for name, expected in alone.items():
        first, *others = (found[name] for found in every)
        assert first.reused_steps == expected.reused_steps, name
        x, y = first.latents["vision"], expected.latents["vision"]
        assert np.abs(x - y).max() <= 1e-4 * np.abs(y).max(), name
        for other in others:
            assert other.reused_steps == first.reused_steps, name
            assert np.array_equal(other.latents["vision"], x), name


def test_every_kind_of_request_reuses_steps(alone: dict[str, Output]) -> None:
    for name, output in alone.items():
        assert 0 < output.reused_steps < output.effective["num_inference_steps"] * 2, name
        assert output.effective["step_cache"] == "sea"


def test_a_given_video_has_no_cache(tiny_checkpoint_fp32: Path) -> None:
    from vllm_cosmos3 import Cosmos3

    with Cosmos3(tiny_checkpoint_fp32, dtype="float32", device="cpu") as model:
        plan = model.plan(
            prompt="x", action_mode="inverse_dynamics", domain_name="agibotworld", step_cache="sea",
            action_chunk_size=4, video=CLIP, size="80x64",
        )  # fmt: skip
        other = model.plan(prompt="x", step_cache_order=0)
    assert plan.parameters.reuse is None
    assert "step_cache has no effect, as the whole video is given" in plan.warnings
    assert plan.effective["step_cache"] == "none"
    assert other.warnings[-1] == "step_cache_order has no effect without step_cache=sea"


def test_the_filter_keeps_what_does_not_change() -> None:
    """The mean over all frames and places is signal at every level, up to a common factor."""
    x = torch.randn(1, 3, 4, 6, 8, generator=torch.Generator().manual_seed(1))
    noisy, clean = filtered(x, 0.95), filtered(x, 0.05)
    assert (
        noisy.std(dim=(0, 1, 2)).max()
        < clean.std(dim=(0, 1, 2)).max() * noisy.mean().abs() / clean.mean().abs()
    )
