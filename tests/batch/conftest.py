"""Stores of batches."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from vllm_cosmos3.batch.store import Store, store_at


@pytest.fixture(params=["file", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty one of each kind that can hold claims."""
    if request.param == "file":
        return store_at(str(tmp_path / "out"))
    root = "memory:/" if request.param == "memory" else request.getfixturevalue("s3")
    return store_at(f"{root}/{uuid.uuid4().hex}")
