"""Every mesh makes what one rank makes: latents, pixels, sound and actions, float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from ranks import Ranks

from vllm_cosmos3.engine_options import EngineConfig, ParallelConfig
from vllm_cosmos3.generator.output import Sample
from vllm_cosmos3.generator.pipeline import Pipeline, RequestState
from vllm_cosmos3.parallel.mesh import Mesh
from vllm_cosmos3.request.batching import with_batch
from vllm_cosmos3.request.planner import make_plan
from vllm_cosmos3.request.request import GenerateRequest

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
    "rollout": {"num_frames": 5, "height": 64, "width": 64, "image": IMAGE, "num_chunks": 2},
    "transfer of two controls in two chunks": {
        "depth": {"control": CLIP, "control_weight": 3},
        "seg": CLIP[::-1],
        "size": "64x80",
        "num_video_frames_per_chunk": 5,
        "control_guidance": 2.0,
    },
    "transfer that goes on from a chunk of the video": {
        "edge": True,
        "video": CLIP,
        "size": "64x64",
        "num_video_frames_per_chunk": 5,
        "num_first_chunk_conditional_frames": 5,
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


def run_all(
    mesh: Mesh, folder: Path, parallel: ParallelConfig, names: Sequence[str] = tuple(REQUESTS)
) -> dict[str, tuple[Sample, Sample]]:
    """The latents and the decoded result of each request."""
    config = EngineConfig(model=folder, dtype="float32", device="cpu", **asdict(parallel))
    pipeline = Pipeline.load(config, mesh, "cpu")
    requests = {name: GenerateRequest(**COMMON, **REQUESTS[name]) for name in names}
    return {name: made_twice(pipeline, request) for name, request in requests.items()}


def made_twice(pipeline: Pipeline, request: GenerateRequest) -> tuple[Sample, Sample]:
    """What a request comes to with ``output_type`` latent, and decoded, after the same steps."""
    state = stepped(pipeline, request)
    plan, denoised, frames = state.plan, [*state.denoised], [*state.frames]
    state.plan = replace(plan, decoded=False)
    pipeline.decode(state)
    latents = state.samples.pop()
    state.plan, state.denoised, state.frames = plan, denoised, frames
    pipeline.decode(state)
    return latents, pipeline.finish(state).samples[0]


def run(pipeline: Pipeline, request: GenerateRequest) -> Sample:
    state = stepped(pipeline, request)
    pipeline.decode(state)
    return pipeline.finish(state).samples[0]


def stepped(pipeline: Pipeline, request: GenerateRequest) -> RequestState:
    """The state of a request whose steps are made."""
    state = pipeline.encode(make_plan(request, pipeline.model, pipeline.tokenizer))
    while not state.done:
        pipeline.step(state)
    return state


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
    check_equal(alone, *ranks(MESHES[mesh], run_all, tiny_checkpoint_fp32, MESHES[mesh]))


@pytest.mark.parametrize("mesh", ["1x1x2", "1x2x2"])
def test_a_mesh_equals_one_rank_with_the_layers_of_edge(
    mesh: str, ranks: Ranks, tiny_edge_fp32: Path
) -> None:
    """Whose text has keys that only the generation tower sees, shared like the others."""
    names = ("odd latent size", "image to video", "policy with a state")
    (alone,) = ranks(ParallelConfig(), run_all, tiny_edge_fp32, ParallelConfig(), names)
    check_equal(alone, *ranks(MESHES[mesh], run_all, tiny_edge_fp32, MESHES[mesh], names))


def check_equal(
    alone: dict[str, tuple[Sample, Sample]],
    results: dict[str, tuple[Sample, Sample]],
    *others: dict[str, tuple[Sample, Sample]],
) -> None:
    """What the ranks of a mesh made is what one rank made."""
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


PROMPTS = ("A boat", "A paper boat on a stream", "Snow")


def batched(mesh: Mesh, folder: Path, parallel: ParallelConfig, limit: int) -> dict[str, Sample]:
    """The latents of pictures of PROMPTS, which share their steps as far as ``limit`` lets them."""
    config = EngineConfig(model=folder, dtype="float32", device="cpu", **asdict(parallel))
    pipeline, states = Pipeline.load(config, mesh, "cpu"), []
    for seed, prompt in enumerate(PROMPTS):
        fields = {"num_frames": 1, "height": 96, "width": 96, "output_type": "latent"}
        request = GenerateRequest(**COMMON | {"prompt": prompt, "seed": seed}, **fields)
        plan = make_plan(request, pipeline.model, pipeline.tokenizer)
        states.append(pipeline.encode(with_batch(plan, patch=2, limit=limit)))
    size = 1 if states[0].plan.batch is None else states[0].plan.batch.size
    while not states[-1].done:
        for first in range(0, len(states), size):
            pipeline.step_together(states[first : first + size])
    results = {}
    for state, prompt in zip(states, PROMPTS, strict=True):
        pipeline.decode(state)
        output = pipeline.finish(state)
        assert output.batch_size == min(size, len(PROMPTS))
        results[prompt] = output.samples[0]
    return results


def test_a_batch_on_a_mesh_is_what_each_is_alone(ranks: Ranks, tiny_checkpoint_fp32: Path) -> None:
    """Of nine tokens, which Ulysses cannot divide evenly."""
    one = ParallelConfig()
    (alone,) = ranks(one, batched, tiny_checkpoint_fp32, one, 1)
    for mesh in (one, MESHES["2x1x1"], MESHES["1x2x1"], MESHES["1x1x2"]):
        first, *others = ranks(mesh, batched, tiny_checkpoint_fp32, mesh, 8)
        for prompt, sample in alone.items():
            made = first[prompt].latents["vision"]
            assert relative(made, sample.latents["vision"]) < BOUND, (mesh, prompt)
            assert all(np.array_equal(each[prompt].latents["vision"], made) for each in others)


def work_of(
    mesh: Mesh, folder: Path, parallel: ParallelConfig
) -> list[tuple[int, int, tuple[str, ...]]]:
    """Of each of UNGUIDED and GUIDED: texts read, forwards made, and warnings beyond the plan's."""
    config = EngineConfig(model=folder, dtype="float32", device="cpu", **asdict(parallel))
    pipeline = Pipeline.load(config, mesh, "cpu")
    calls: list[str] = []
    pipeline.transformer.understanding.register_forward_hook(lambda *_: calls.append("text"))
    pipeline.transformer.register_forward_hook(lambda *_: calls.append("step"))
    found = []
    for fields in (*UNGUIDED, *GUIDED):
        calls.clear()
        pipeline.texts.clear()
        size = {"num_frames": 1, "height": 64, "width": 64, "output_type": "latent"}
        plan = make_plan(
            GenerateRequest(**COMMON, **size, **fields), pipeline.model, pipeline.tokenizer
        )
        state = pipeline.encode(plan)
        while not state.done:
            pipeline.step(state)
        pipeline.decode(state)
        output = pipeline.finish(state)
        assert output.warnings[: len(plan.warnings)] == plan.warnings
        new = output.warnings[len(plan.warnings) :]
        found.append((calls.count("text"), calls.count("step"), new))
    return found


@pytest.mark.parametrize("mesh", ["2x1x1", "1x2x1"])
def test_ranks_that_guidance_leaves_idle_compute_nothing(
    mesh: str, ranks: Ranks, tiny_checkpoint_fp32: Path
) -> None:
    shares_branches = MESHES[mesh].cfg_parallel_size == 2
    results = ranks(MESHES[mesh], work_of, tiny_checkpoint_fp32, MESHES[mesh])
    for rank, found in enumerate(results):
        unguided, guided = found[: len(UNGUIDED)], found[len(UNGUIDED) :]
        idle = shares_branches and rank == 1
        for texts, steps, warnings in unguided:
            assert (texts, steps) == ((0, 0) if idle else (1, 3))
            assert len(warnings) == shares_branches
            assert all("cfg_parallel_size=2" in text for text in warnings)
        always, once = guided
        joined = 1 if shares_branches else 2
        assert always == (joined, 3, ())
        assert once == (joined, 1 if idle else 3, ())


@pytest.mark.parametrize("mesh", ["1x1x2", "1x2x1"])
def test_weights_that_rest_on_the_host_change_no_bit(
    mesh: str, ranks: Ranks, tiny_checkpoint_fp32: Path
) -> None:
    results = ranks(MESHES[mesh], placed, tiny_checkpoint_fp32, MESHES[mesh])
    for plain, *others in results:
        assert all(np.array_equal(other, plain) for other in others)


def placed(mesh: Mesh, folder: Path, parallel: ParallelConfig) -> list[np.ndarray]:
    """Latents with the weights on the device, the text tower on the host, and both on the host."""
    found = []
    for settings in (
        {"und_residency": "gpu"},
        {"und_residency": "host"},
        {"und_residency": "host", "enable_layerwise_offload": True},
    ):
        config = EngineConfig(
            model=folder, dtype="float32", device="cpu", **asdict(parallel), **settings
        )
        pipeline = Pipeline.load(config, mesh, "cpu")
        size = {"num_frames": 5, "height": 64, "width": 96, "output_type": "latent"}
        found.append(run(pipeline, GenerateRequest(**COMMON, **size)).latents["vision"])
    return found


def test_a_failure_of_the_first_rank_leaves_none_waiting(
    ranks: Ranks, tiny_checkpoint_fp32: Path
) -> None:
    """The next request of the same ranks is made as if nothing had been."""
    parallel = MESHES["1x2x1"]
    (said, again), (other, _) = ranks(parallel, failing, tiny_checkpoint_fp32, parallel)
    assert (said, other) == ("no sound", None)
    assert np.array_equal(*again)


def failing(
    mesh: Mesh, folder: Path, parallel: ParallelConfig
) -> tuple[str | None, list[np.ndarray | None]]:
    """What the decoding of two results says when their sound fails; a video before and after it."""
    config = EngineConfig(model=folder, dtype="float32", device="cpu", **asdict(parallel))
    pipeline = Pipeline.load(config, mesh, "cpu")
    request = GenerateRequest(
        **COMMON, num_frames=5, height=64, width=64, generate_sound=True, n=2
    )  # fmt: skip
    videos, said = [run(pipeline, request).video], None
    state = pipeline.encode(make_plan(request, pipeline.model, pipeline.tokenizer))
    while not state.done:
        pipeline.step(state)
    pipeline.coders["sound"].decode = broken
    try:
        pipeline.decode(state)
    except OSError as error:
        said = str(error)
    del pipeline.coders["sound"].decode
    return said, [*videos, run(pipeline, request).video]


def broken(_: object) -> None:
    raise OSError("no sound")


def relative(x: np.ndarray, reference: np.ndarray) -> float:
    assert x.shape == reference.shape
    return float(np.abs(x - reference).max() / np.abs(reference).max())
