"""What is compared with the references: our model with the tiny checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_cosmos3 import Cosmos3


@pytest.fixture(scope="module")
def ours(tiny_checkpoint_fp32: Path) -> Iterator[Cosmos3]:
    with Cosmos3(tiny_checkpoint_fp32, dtype="float32", device="cpu") as model:
        yield model
