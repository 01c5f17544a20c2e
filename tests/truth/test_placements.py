"""Several ranks, and weights that rest on the host, make the demo checkpoint's clip: latents, float32."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from ranks import Ranks

from training.captions import draw_caption
from training.scenes import draw_scene
from training.yardstick import Prompt
from vllm_cosmos3.checkpoint.hub import resolve
from vllm_cosmos3.engine_options import EngineConfig, ParallelConfig
from vllm_cosmos3.generator.pipeline import Pipeline
from vllm_cosmos3.parallel.mesh import Mesh
from vllm_cosmos3.request.planner import make_plan
from vllm_cosmos3.request.request import GenerateRequest

BOUND = 1e-4  # of the largest absolute value
SEED = 60_000_004
FIELDS = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"}
HOSTED = {"und_residency": "host", "enable_layerwise_offload": True}
MESHES = {
    "guidance": ParallelConfig(cfg_parallel_size=2),
    "Ulysses": ParallelConfig(ulysses_degree=2),
    "tensors": ParallelConfig(tensor_parallel_size=2),
}


def latents(mesh: Mesh, parallel: ParallelConfig, **engine: Any) -> np.ndarray:
    """The video latents of a held-out prompt on this rank."""
    config = EngineConfig(
        model=resolve("demo"), dtype="float32", device="cpu", **asdict(parallel), **engine
    )
    pipeline = Pipeline.load(config, mesh, "cpu")
    scene = draw_scene(SEED)
    request = GenerateRequest(**Prompt(scene, draw_caption(scene)).fields | FIELDS)
    state = pipeline.encode(make_plan(request, pipeline.model, pipeline.tokenizer))
    while not state.done:
        pipeline.step(state)
    pipeline.decode(state)
    found = pipeline.finish(state).samples[0].latents
    assert found is not None
    return found["vision"]


def hosted_latents(mesh: Mesh, parallel: ParallelConfig) -> np.ndarray:
    return latents(mesh, parallel, **HOSTED)


@pytest.fixture(scope="module")
def alone(ranks: Ranks) -> np.ndarray:
    (found,) = ranks(ParallelConfig(), latents, ParallelConfig())
    return found


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_makes_the_clip_of_one_rank(name: str, ranks: Ranks, alone: np.ndarray) -> None:
    for found in ranks(MESHES[name], latents, MESHES[name]):
        assert np.abs(found - alone).max() <= BOUND * np.abs(alone).max()


def test_weights_on_the_host_change_no_bit(ranks: Ranks, alone: np.ndarray) -> None:
    (found,) = ranks(ParallelConfig(), hosted_latents, ParallelConfig())
    assert np.array_equal(found, alone)
