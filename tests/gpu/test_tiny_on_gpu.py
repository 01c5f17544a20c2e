"""The tiny checkpoint of the demo on a GPU, in bfloat16: heads of 32, for which some kernels have no instance."""

from __future__ import annotations

import subprocess
from pathlib import Path

import av
import httpx
import numpy as np
import pytest
import torch
from generators import create, finished, generator
from servers import BIN, environment

from vllm_cosmos3 import Cosmos3
from vllm_cosmos3.generator import prediction

pytestmark = pytest.mark.gpu

VIDEO = {"size": "96x64", "num_frames": 5, "num_inference_steps": 10, "seed": 3}


def test_the_command_line_makes_a_video(
    tiny_checkpoint: Path, tmp_path: Path, vllm_cache: Path
) -> None:
    command = [str(BIN / "vllm-cosmos3"), "generate", str(tiny_checkpoint), "--prompt", "a boat"]
    for name, value in VIDEO.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    command += ["--generate-sound", "--out", str(tmp_path)]
    made = subprocess.run(
        command,
        env=environment(vllm_cache),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    with av.open(str(tmp_path / "sample" / "vision.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.audio
    assert np.shape(frames) == (5, 64, 96, 3)
    assert np.std(frames) > 1


def test_the_server_makes_a_video(tiny_checkpoint: Path, tmp_path: Path, vllm_cache: Path) -> None:
    with generator(tiny_checkpoint, tmp_path, vllm_cache) as server:
        job = finished(server, create(server, **VIDEO))
        assert job["status"] == "completed", job
        content = httpx.get(f"{server.url}/v1/videos/{job['id']}/content", timeout=60)
    assert content.status_code == 200
    assert content.content[4:8] == b"ftyp"


def test_graphs_are_replayed_and_equal_launched_kernels(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recordings: list[object] = []
    recording = prediction.Recording

    def counted(function: object) -> object:
        recordings.append(function)
        return recording(function)  # type: ignore[arg-type]

    monkeypatch.setattr(prediction, "Recording", counted)
    with Cosmos3(tiny_checkpoint) as model:
        replayed = model.generate(prompt="a boat", output_type="latent", **VIDEO).latents
        assert recordings
        monkeypatch.setattr(prediction, "launches_matter", lambda *_: False)
        launched = model.generate(prompt="a boat", output_type="latent", **VIDEO).latents
    assert replayed is not None
    assert launched is not None
    ours, theirs = (torch.from_numpy(x["vision"]) for x in (replayed, launched))
    assert bool(torch.isfinite(ours).all())
    assert float((ours - theirs).norm() / theirs.norm()) <= 2e-2
