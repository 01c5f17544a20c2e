"""Every mesh makes what one rank makes of the sessions of a simulator, float32."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import Ranks
from rollouts import CASES, checkpoints, rollout

from vllm_cosmos3.engine_options import EngineConfig, ParallelConfig
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.generator.world import WorldPipeline
from vllm_cosmos3.parallel.checks import check_degrees
from vllm_cosmos3.parallel.mesh import Mesh

BOUND = 1e-5  # of the largest absolute value
MESHES = {
    "tp 2": ParallelConfig(tensor_parallel_size=2),
    "ulysses 2 x tp 2": ParallelConfig(ulysses_degree=2, tensor_parallel_size=2),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return checkpoints(tmp_path_factory.mktemp("simulators"))


def run_all(mesh: Mesh, folders: dict[str, Path], parallel: ParallelConfig) -> dict[str, Any]:
    """Latents and frames of each case."""
    made = {}
    for name, case in list(CASES.items())[1:]:
        folder = folders[case.kind]
        config = EngineConfig(model=folder, dtype="float32", device="cpu", **asdict(parallel))
        made[name] = rollout(WorldPipeline.load(config, mesh, "cpu"), case)
    return made


@pytest.fixture(scope="module")
def alone(ranks: Ranks, folders: dict[str, Path]) -> dict[str, Any]:
    (results,) = ranks(ParallelConfig(), run_all, folders, ParallelConfig())
    return results


@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_equals_one_rank(
    mesh: str, ranks: Ranks, folders: dict[str, Path], alone: dict[str, Any]
) -> None:
    first, *others = ranks(MESHES[mesh], run_all, folders, MESHES[mesh])
    for name, (latents, frames) in alone.items():
        for mine, theirs in zip(first[name][0], latents, strict=True):
            assert np.abs(mine - theirs).max() <= BOUND * np.abs(theirs).max()
        for mine, theirs in zip(first[name][1], frames, strict=True):
            assert np.abs(mine.astype(int) - theirs.astype(int)).max() <= 1
        for other in others:
            assert other[name][1] == (None,) * len(frames)


def test_there_is_no_guidance_to_share(folders: dict[str, Path]) -> None:
    model = EngineConfig(model=folders["sim-bimanual"]).read_model()
    with pytest.raises(InvalidRequest, match="has no guidance"):
        check_degrees(
            ParallelConfig(cfg_parallel_size=2), model.transformer, guided=not model.distilled
        )
