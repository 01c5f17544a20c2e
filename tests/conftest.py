"""Fixtures of the whole test suite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Runs a function on every rank of a mesh: ``ranks(parallel, function, *args)``."""
    pool = Ranks()
    yield pool
    pool.close()
