"""The soak in small: sound requests among malformed ones are answered as when they are alone."""

from __future__ import annotations

import asyncio

import pytest
from servers import Server
from soak_media import soak

pytestmark = pytest.mark.serve


def test_bad_media_hurt_nobody(reasoner_server: Server) -> None:
    done: list[int] = []
    wrong = asyncio.run(soak(reasoner_server.url, reasoner_server.model, 112, 8, done.append))
    assert not wrong
    assert done == list(range(1, 113))
