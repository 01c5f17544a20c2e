"""One mesh over two nodes of a Ray cluster, of which one is killed."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import ray_platform
from ranks import Ranks
from ray_nodes import cluster, join, kill, node
from vllm.platforms import current_platform

from vllm_cosmos3 import Cosmos3
from vllm_cosmos3.engine_options import EngineConfig, ParallelConfig
from vllm_cosmos3.errors import WorkerDied
from vllm_cosmos3.generator.pipeline import Pipeline
from vllm_cosmos3.parallel.mesh import Mesh
from vllm_cosmos3.progress import Progress
from vllm_cosmos3.request.planner import make_plan
from vllm_cosmos3.request.request import GenerateRequest
from vllm_cosmos3.stage.client import start_interpreter

REQUEST = {"prompt": "A paper boat", "num_frames": 5, "size": "64x64", "seed": 3}
REQUEST |= {"num_inference_steps": 3}
LONG = {"size": "256x256", "num_inference_steps": 200}
MESH = {"dtype": "float32", "device": "cpu", "ulysses_degree": 2}
ONE = ("--num-cpus", 1, "--num-gpus", 1)


@pytest.fixture
def start_second(
    vllm_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Starts the second node of a cluster, in which each has one device for Ray."""
    ray_platform.install(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    # This process has chosen its platform already, and so has the one from which stages are forked.
    monkeypatch.setattr(current_platform, "ray_device_key", "GPU")
    monkeypatch.setattr("vllm_cosmos3.stage.client.start_interpreter", start_interpreter)
    noticed_later = {"RAY_health_check_period_ms": "1000"}  # than by the ranks, but soon
    with ExitStack() as stack, cluster(vllm_cache, *ONE, **noticed_later) as settings:
        join(settings, monkeypatch)
        second = ("--address", settings["RAY_ADDRESS"], *ONE)
        yield lambda: stack.enter_context(node(settings, *second))


def made(mesh: Mesh, folder: Path) -> np.ndarray | None:
    """The video of a rank of a mesh on one host."""
    pipeline = Pipeline.load(EngineConfig(model=folder, **MESH), mesh, "cpu")
    request = GenerateRequest(**REQUEST)
    state = pipeline.encode(make_plan(request, pipeline.model, pipeline.tokenizer))
    while not state.done:
        pipeline.step(state)
    pipeline.decode(state)
    return pipeline.finish(state).samples[0].video


def test_a_mesh_over_two_hosts_gives_what_one_gives_and_survives_the_loss_of_one(
    tiny_checkpoint_fp32: Path, ranks: Ranks, start_second: Callable[[], subprocess.Popen[bytes]]
) -> None:
    second = start_second()
    local, _ = ranks(ParallelConfig(ulysses_degree=2), made, tiny_checkpoint_fp32)

    def lose_the_second(progress: Progress) -> None:
        if progress.step == 1:
            kill(second)

    with Cosmos3(tiny_checkpoint_fp32, **MESH, distributed_executor_backend="ray") as model:
        assert np.array_equal(model.generate(**REQUEST).video, local)
        reason = r"a worker process ended in step: the Ray cluster has lost \S+, the host of rank 1"
        with pytest.raises(WorkerDied, match=reason):
            model.generate(**REQUEST | LONG, progress=lose_the_second)
        start_second()
        assert np.array_equal(model.generate(**REQUEST).video, local)
