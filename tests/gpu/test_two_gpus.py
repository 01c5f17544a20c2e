"""What one GPU cannot show: the second one by name, and ranks of a launcher over NCCL."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from launched import assert_failed_together, launch

from vllm_cosmos3 import Cosmos3

pytestmark = pytest.mark.gpu

REQUEST = {
    "prompt_token_ids": list(range(10, 138)),
    "negative_prompt_token_ids": list(range(20, 84)),
    "size": "320x192",
    "num_frames": 29,
    "num_inference_steps": 3,
    "guidance_scale": 6.0,
    "seed": 3,
}


def test_the_second_gpu_by_name(wide_checkpoint: Path) -> None:
    """The same video, and nothing of it on the first GPU."""
    with Cosmos3(wide_checkpoint, device="cuda:0", load_format="dummy") as model:
        expected = model.generate(**REQUEST).video
    torch.cuda.empty_cache()
    taken = torch.cuda.memory_allocated(0)
    torch.cuda.reset_peak_memory_stats(0)
    with Cosmos3(wide_checkpoint, device="cuda:1", load_format="dummy") as model:
        video = model.generate(**REQUEST).video
        assert torch.cuda.memory_allocated(1) > 2**30
    assert torch.cuda.max_memory_allocated(0) == taken
    assert np.array_equal(video, expected)


@pytest.mark.parametrize(
    ("axis", "levels"),
    [
        ("ulysses_degree", 1),
        ("cfg_parallel_size", 1),
        ("tensor_parallel_size", 4),  # sums rounded in two parts, which guidance multiplies
    ],
)
def test_a_stage_on_two_gpus_is_near_one(wide_checkpoint: Path, axis: str, levels: float) -> None:
    """Levels of 255, on the average."""
    with Cosmos3(wide_checkpoint, device="cuda:0", load_format="dummy") as model:
        expected = model.generate(**REQUEST).video.astype(float)
    with Cosmos3(wide_checkpoint, device="cuda", load_format="dummy", **{axis: 2}) as model:
        video = model.generate(**REQUEST).video.astype(float)
    assert np.abs(video - expected).mean() < levels


@pytest.mark.parametrize("axis", ["ulysses_degree", "cfg_parallel_size"])
def test_only_the_shared_decoding_may_differ_from_one(wide_checkpoint: Path, axis: str) -> None:
    """cuDNN chooses kernels by shape: a strip of the plane may be rounded otherwise than the whole."""
    with Cosmos3(wide_checkpoint, device="cuda:0", load_format="dummy") as model:
        expected = model.generate(**REQUEST).video.astype(int)
        latents = model.generate(**REQUEST, output_type="latent").latents["vision"]
    common = {"device": "cuda", "load_format": "dummy", axis: 2}
    with Cosmos3(wide_checkpoint, **common, vae_parallel="off") as model:
        assert np.array_equal(
            model.generate(**REQUEST, output_type="latent").latents["vision"], latents
        )
        assert np.array_equal(model.generate(**REQUEST).video, expected)
    with Cosmos3(wide_checkpoint, **common) as model:
        apart = np.abs(model.generate(**REQUEST).video.astype(int) - expected)
    print(f"{axis}: {apart.max()} levels at most, {apart.mean():.3f} on average")  # noqa: T201 pytest -rP
    assert apart.mean() < 1


def test_launched_ranks_fail_a_request_together_and_go_on(
    wide_checkpoint: Path, tmp_path: Path
) -> None:
    status, met = launch("gpus", wide_checkpoint, tmp_path)
    assert status == 0
    assert_failed_together(met)


def test_graphs_over_collectives_equal_launched_kernels(
    wide_checkpoint: Path, tmp_path: Path
) -> None:
    """Of pictures and a short video; none is recorded unless the environment asks for it."""
    status, met = launch("graphs", wide_checkpoint, tmp_path)
    assert status == 0
    print("", *met[0], sep="\n")  # noqa: T201 pytest -rP
    for rank, lines in met.items():
        assert len(lines) == 6
        for line in lines:
            before, after = re.findall(r"(\d+) and (\d+) recorded", line)[0]
            assert (int(before), int(after) > 0) == (0, True), (rank, line)
    apart = [float(line.split(", ")[1].removesuffix(" apart")) for line in met[0]]
    assert max(apart) <= 5e-3  # as on one GPU
