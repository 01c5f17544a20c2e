"""Every mesh makes what one rank makes: latents, pixels, sound and actions, float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ranks import Ranks

from vllm_cosmos3.config import EngineConfig, ParallelConfig
from vllm_cosmos3.output import Sample
from vllm_cosmos3.pipeline import Pipeline
from vllm_cosmos3.request import GenerateRequest
from vllm_cosmos3.runtime.mesh import Mesh

UNGUIDED = ({"guidance_scale": 1.0}, {"guidance_interval": (0.0, 1.0)})
GUIDED = ({}, {"guidance_interval": (990.0, 1000.0)})  # the latter at its first step alone
BOUND = 1e-5  # of the largest absolute value

COMMON = {
    "prompt": "A paper boat",
    "negative_prompt": "blurry",
    "num_inference_steps": 3,
    "seed": 7,
}
IMAGE = np.random.RandomState(0).randint(0, 256, (48, 80, 3), dtype=np.uint8)
CLIP = np.random.RandomState(1).randint(0, 256, (8, 64, 80, 3), dtype=np.uint8)
REQUESTS = {
    "video with sound": {"num_frames": 9, "height": 64, "width": 96, "generate_sound": True},
    "odd latent size": {"num_frames": 5, "height": 80, "width": 112},
    # 3 x 3 patches and a sound latent: an odd number of tokens
    "tokens that do not divide": {"num_frames": 1, "height": 96, "width": 96},
    "image to video": {"num_frames": 9, "height": 64, "width": 80, "image": IMAGE},
    "transfer of two controls in two chunks": {
        "depth": {"control": CLIP, "control_weight": 3},
        "seg": CLIP[::-1],
        "size": "64x80",
        "num_video_frames_per_chunk": 5,
        "control_guidance": 2.0,
    },
    "without guidance": {"num_frames": 5, "height": 64, "width": 64, "guidance_scale": 1.0},
    "policy with a state": {
        "action_mode": "policy",
        "domain_name": "droid",
        "raw_action_dim": 8,
        "action_chunk_size": 8,
        "action_state": [0.5] * 8,
        "image": IMAGE,
        "size": "96x64",
        "guidance_scale": 3.0,
    },
    "inverse dynamics": {
        "action_mode": "inverse_dynamics",
        "domain_name": "agibotworld",
        "action_chunk_size": 8,
        "video": np.stack([IMAGE, IMAGE[::-1], IMAGE[:, ::-1]] * 3),
        "size": "112x48",
    },
    "forward dynamics": {
        "action_mode": "forward_dynamics",
        "domain_name": "av",
        "action": np.random.RandomState(1).standard_normal((4, 9)),
        "image": IMAGE,
        "size": "80x80",
    },
}
MESHES = {  # cfg x ulysses x tp
    "1x1x2": ParallelConfig(tensor_parallel_size=2),
    "1x2x1": ParallelConfig(ulysses_degree=2),
    "2x1x1": ParallelConfig(cfg_parallel_size=2),
    "2x2x1": ParallelConfig(cfg_parallel_size=2, ulysses_degree=2),
    "1x2x2": ParallelConfig(ulysses_degree=2, tensor_parallel_size=2),
    "2x2x2": ParallelConfig(cfg_parallel_size=2, ulysses_degree=2, tensor_parallel_size=2),
}


def run_all(mesh: Mesh, folder: Path, parallel: ParallelConfig) -> dict[str, tuple[Sample, Sample]]:
    """The latents and the decoded result of each request."""
    config = EngineConfig(model=folder, dtype="float32", device="cpu", parallel=parallel)
    pipeline = Pipeline.load(config, mesh, "cpu")
    return {
        name: (
            run(pipeline, GenerateRequest(**COMMON, **fields, output_type="latent")),
            run(pipeline, GenerateRequest(**COMMON, **fields)),
        )
        for name, fields in REQUESTS.items()
    }


def run(pipeline: Pipeline, request: GenerateRequest) -> Sample:
    state = pipeline.encode(pipeline.plan(request))
    while not state.done:
        pipeline.step(state)
    pipeline.decode(state)
    return pipeline.finish(state).samples[0]


@pytest.fixture(scope="module")
def alone(ranks: Ranks, tiny_checkpoint_fp32: Path) -> dict[str, tuple[Sample, Sample]]:
    (results,) = ranks(ParallelConfig(), run_all, tiny_checkpoint_fp32, ParallelConfig())
    return results


@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_equals_one_rank(
    mesh: str,
    ranks: Ranks,
    tiny_checkpoint_fp32: Path,
    alone: dict[str, tuple[Sample, Sample]],
) -> None:
    results, *others = ranks(MESHES[mesh], run_all, tiny_checkpoint_fp32, MESHES[mesh])
    for name, (latents, made) in results.items():
        expected_latents, expected = alone[name]
        for stream, reference in expected_latents.latents.items():
            assert relative(latents.latents[stream], reference) < BOUND, (name, stream)
            for other in others:  # every rank ends with the same
                assert np.array_equal(other[name][0].latents[stream], latents.latents[stream])
        pixels = made.image if made.video is None else made.video
        reference = expected.image if expected.video is None else expected.video
        assert np.abs(pixels.astype(int) - reference.astype(int)).max() <= 1, name
        assert (made.action is None) == (expected.action is None)
        if expected.action is not None:
            assert relative(made.action, expected.action) < BOUND, name
        if expected.sound is not None:
            assert relative(made.sound, expected.sound) < 10 * BOUND


def warnings_of(mesh: Mesh, folder: Path, parallel: ParallelConfig) -> list[tuple[str, ...]]:
    """What each of UNGUIDED and guided requests warns of beyond its plan."""
    config = EngineConfig(model=folder, dtype="float32", device="cpu", parallel=parallel)
    pipeline = Pipeline.load(config, mesh, "cpu")
    new = []
    for fields in (*UNGUIDED, *GUIDED):
        size = {"num_frames": 1, "height": 64, "width": 64, "output_type": "latent"}
        plan = pipeline.plan(GenerateRequest(**COMMON, **size, **fields))
        state = pipeline.encode(plan)
        while not state.done:
            pipeline.step(state)
        pipeline.decode(state)
        output = pipeline.finish(state)
        assert output.warnings[: len(plan.warnings)] == plan.warnings
        new.append(output.warnings[len(plan.warnings) :])
    return new


@pytest.mark.parametrize("mesh", ["2x1x1", "1x2x1"])
def test_ranks_that_guidance_leaves_idle_are_told_of(
    mesh: str, ranks: Ranks, tiny_checkpoint_fp32: Path
) -> None:
    shares_branches = MESHES[mesh].cfg_parallel_size == 2
    for warnings in ranks(MESHES[mesh], warnings_of, tiny_checkpoint_fp32, MESHES[mesh]):
        unguided, guided = warnings[: len(UNGUIDED)], warnings[len(UNGUIDED) :]
        assert all(len(new) == shares_branches for new in unguided)
        assert all("cfg_parallel_size=2" in text for new in unguided for text in new)
        assert guided == [()] * len(GUIDED)


def relative(x: np.ndarray, reference: np.ndarray) -> float:
    assert x.shape == reference.shape
    return float(np.abs(x - reference).max() / np.abs(reference).max())
