"""Meshes whose ranks share one GPU: its kernels at the shapes of shares, against the whole.

NCCL refuses ranks that share a device, so they meet over gloo, by way of the host.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import Tensor
from vllm.platforms import current_platform

from vllm_cosmos3.engine_options import EngineConfig, ParallelConfig
from vllm_cosmos3.generator.pipeline import Pipeline
from vllm_cosmos3.parallel.mesh import close_mesh, init_mesh
from vllm_cosmos3.request.planner import make_plan
from vllm_cosmos3.request.request import GenerateRequest

pytestmark = pytest.mark.gpu

COMMON: dict[str, Any] = {
    "prompt_token_ids": list(range(10, 522)),
    "negative_prompt_token_ids": list(range(20, 532)),
    "num_inference_steps": 3,
    "guidance_scale": 6.0,
    "seed": 3,
}
REQUESTS: dict[str, dict[str, Any]] = {
    "image of 320x192": {"size": "320x192", "num_frames": 1},
    "image of 1280x720": {"size": "1280x720", "num_frames": 1},
    "video of 320x192": {"size": "320x192", "num_frames": 189},
    "video of 832x480": {"size": "832x480", "num_frames": 61},
}
MESHES = {  # cfg x ulysses
    "2x2": ParallelConfig(cfg_parallel_size=2, ulysses_degree=2),
    "1x4": ParallelConfig(ulysses_degree=4),
    "2x4": ParallelConfig(cfg_parallel_size=2, ulysses_degree=4),
    "1x8": ParallelConfig(ulysses_degree=8),
}


@pytest.fixture(scope="module")
def alone(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what one rank makes of each request."""
    folder = tmp_path_factory.mktemp("alone")
    for name in REQUESTS:
        latents, frames = made(pipeline, name)
        torch.save(latents, folder / f"{name}.pt")
        np.save(folder / f"{name}.npy", frames)
    return folder


@pytest.mark.parametrize("mesh", MESHES)
def test_latents_equal_those_of_one_rank(
    mesh: str, wide_checkpoint: Path, alone: Path, tmp_path: Path
) -> None:
    """On every rank, but for images on eight: cuBLAS divides the sums of a product with few rows.

    Decoded frames may differ: cuDNN chooses kernels by the shape of a strip.
    """
    parallel = MESHES[mesh]
    processes.spawn(
        one_rank, (parallel, wide_checkpoint, alone, tmp_path), nprocs=parallel.world_size
    )
    met = [json.loads((tmp_path / f"{r}.json").read_text()) for r in range(parallel.world_size)]
    print("", *map(json.dumps, met[0].items()), sep="\n")  # noqa: T201 pytest -rP
    for found in met:
        assert list(found) == list(REQUESTS)
        for name, each in found.items():
            few = name.startswith("image") and len(met) == 8
            assert each["apart"] <= (0.05 if few else 0), (name, found)
    assert all(each["levels"] < 2 for each in met[0].values())


def one_rank(rank: int, parallel: ParallelConfig, checkpoint: Path, alone: Path, out: Path) -> None:
    """What a rank makes of each request, against one rank."""
    device = torch.device("cuda", 0)
    found = {}
    with over_host():
        meeting = f"file://{out / 'meeting'}"
        mesh = init_mesh(parallel, rank=rank, local_rank=0, init_method=meeting)
        config = EngineConfig(
            model=checkpoint, device=str(device), load_format="dummy", **asdict(parallel)
        )
        pipeline = Pipeline.load(config, mesh, device)
        for name in REQUESTS:
            latents, frames = made(pipeline, name)
            expected = torch.load(alone / f"{name}.pt")
            found[name] = {"apart": float((latents - expected).norm() / expected.norm())}
            if rank == 0:  # the others have no frames
                levels = np.abs(frames - np.load(alone / f"{name}.npy"))
                found[name] |= {"levels": float(levels.mean()), "at most": float(levels.max())}
        close_mesh(mesh)
    (out / f"{rank}.json").write_text(json.dumps(found))


def made(pipeline: Pipeline, name: str) -> tuple[Tensor, Any]:
    """Latents on the host, and frames where this rank has them: int [T, H, W, 3]."""
    request = GenerateRequest(**COMMON, **REQUESTS[name])
    state = pipeline.encode(make_plan(request, pipeline.model, pipeline.tokenizer))
    while not state.done:
        pipeline.step(state)
    latents = state.denoised[0]["vision"].cpu()
    pipeline.decode(state)
    sample = pipeline.finish(state).samples[0]
    return latents, None if sample.empty else sample.frames.astype(int)


@contextmanager
def over_host() -> Iterator[None]:
    """The collectives that the generator calls, over gloo and copies of tensors on the host."""
    real = {name: getattr(dist, name) for name in ("all_to_all_single", "all_gather", "all_reduce")}
    exchange = dist.batch_isend_irecv

    def all_to_all_single(out: Tensor, x: Tensor, group: dist.ProcessGroup) -> None:
        received = torch.empty_like(out, device="cpu")
        real["all_to_all_single"](received, x.cpu(), group=group)
        out.copy_(received)

    def all_gather(parts: Sequence[Tensor], x: Tensor, group: dist.ProcessGroup) -> None:
        received = [torch.empty_like(part, device="cpu") for part in parts]
        real["all_gather"](received, x.cpu(), group=group)
        for part, values in zip(parts, received, strict=True):
            part.copy_(values)

    def all_reduce(x: Tensor, group: dist.ProcessGroup) -> None:
        summed = x.cpu()
        real["all_reduce"](summed, group=group)
        x.copy_(summed)

    def batch_isend_irecv(operations: Sequence[dist.P2POp]) -> list[dist.Work]:
        on_host = [dist.P2POp(o.op, o.tensor.cpu(), o.peer, o.group) for o in operations]
        for work in exchange(on_host):
            work.wait()
        for operation, copied in zip(operations, on_host, strict=True):
            if operation.op is dist.irecv:
                operation.tensor.copy_(copied.tensor)
        return []

    with (
        patch.object(type(current_platform), "dist_backend", "gloo"),
        patch.multiple(
            dist,
            all_to_all_single=all_to_all_single,
            all_gather=all_gather,
            all_reduce=all_reduce,
            batch_isend_irecv=batch_isend_irecv,
        ),
    ):
        yield
