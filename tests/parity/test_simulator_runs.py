"""A session against an implementation of its own that has no cache (`causal_reference`)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from causal_reference import pictures, reference
from rollouts import CASES, Case, checkpoints, rollout

from vllm_cosmos3.engine_options import EngineConfig, ParallelConfig
from vllm_cosmos3.generator.world import WorldPipeline
from vllm_cosmos3.parallel.mesh import close_mesh, init_mesh

pytestmark = pytest.mark.parity
BOUND = 1e-4  # of the largest absolute value


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, WorldPipeline]:
    found = {}
    for kind, folder in checkpoints(tmp_path_factory.mktemp("simulators")).items():
        mesh = init_mesh(ParallelConfig())
        config = EngineConfig(model=folder, dtype="float32", device="cpu")
        found[kind] = WorldPipeline.load(config, mesh, "cpu")
        close_mesh(mesh)
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_session_equals_the_whole_sequence(
    pipelines: dict[str, WorldPipeline], name: str
) -> None:
    case = CASES[name]
    pipeline = pipelines[case.kind]
    mine, frames = rollout(pipeline, case)
    with torch.inference_mode():
        theirs = reference(pipeline, case, mine[0])
        decoded = pictures(pipeline, mine)
    for ours, other in zip(mine, theirs, strict=True):
        assert ours.shape == other.shape
        assert np.abs(ours - other).max() <= BOUND * np.abs(other).max()
    assert np.array_equal(np.concatenate(frames), decoded)
    assert [len(part) for part in frames] == [1] + [4 * pipeline.model.causal.chunk_size] * len(case.steps)  # fmt: skip
    assert not pipeline.sessions


def test_what_is_done_matters(pipelines: dict[str, WorldPipeline]) -> None:
    case = CASES["camera, everything remembered"]
    idle = Case(kind=case.kind, fields=case.fields, steps=(None, None))
    acted, _ = rollout(pipelines[case.kind], case)
    still, _ = rollout(pipelines[case.kind], idle)
    assert np.array_equal(acted[0], still[0])
    assert np.abs(acted[1] - still[1]).max() > 1e-2
