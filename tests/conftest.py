"""Checkpoints that many tests read. Nobody writes into them: copy the folder to change it."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_cosmos3.checkpoint import write_checkpoint


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint in the published layout and dtypes."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    write_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint_fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint with float32 tensors, for comparisons with a reference."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-float32"
    write_checkpoint(folder, dtype="float32")
    return folder
