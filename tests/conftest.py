"""Checkpoints that many tests read, and processes for code that runs on several ranks.

Nobody writes into a checkpoint: copy the folder to change it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import Ranks

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


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Runs a function on every rank of a mesh: ``ranks(parallel, function, *args)``."""
    pool = Ranks()
    yield pool
    pool.close()
