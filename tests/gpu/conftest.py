"""Tests that need NVIDIA GPUs, some two. Without them they are not collected, and the header says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vllm_cosmos3.checkpoint.synthetic import write_checkpoint
from vllm_cosmos3.engine_options import EngineConfig, ParallelConfig
from vllm_cosmos3.generator.pipeline import Pipeline
from vllm_cosmos3.parallel.mesh import close_mesh, init_mesh

if not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]
elif torch.cuda.device_count() < 2:
    collect_ignore_glob = ["test_two_gpus.py"]

LAYERS = 2
VOCABULARY = 1024


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda", 0)


@pytest.fixture(scope="session")
def wide_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nano's width with two layers and few words, without tensors."""
    folder = tmp_path_factory.mktemp("wide") / "nano"
    write_checkpoint(folder, size="nano", weights=False)
    file = folder / "transformer" / "config.json"
    config = json.loads(file.read_text())
    config |= {"num_hidden_layers": LAYERS, "vocab_size": VOCABULARY}
    file.write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def pipeline(wide_checkpoint: Path, device: torch.device) -> Pipeline:
    """Random weights in bfloat16, every choice left to the package."""
    return load(wide_checkpoint, device, "bfloat16")


@pytest.fixture(scope="session")
def reference(wide_checkpoint: Path, device: torch.device, pipeline: Pipeline) -> Pipeline:
    """The same rounded weights computed with in float32."""
    precise = load(wide_checkpoint, device, "float32")
    rounded = dict(pipeline.transformer.named_parameters())
    for name, parameter in precise.transformer.named_parameters():
        parameter.data.copy_(rounded[name])
    return precise


def load(folder: Path, device: torch.device, dtype: str) -> Pipeline:
    config = EngineConfig(model=folder, dtype=dtype, device=str(device), load_format="dummy")
    mesh = init_mesh(ParallelConfig())
    try:
        return Pipeline.load(config, mesh, device)
    finally:
        close_mesh(mesh)
