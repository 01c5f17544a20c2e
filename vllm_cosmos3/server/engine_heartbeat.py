"""Heartbeat of the reasoner: how long ago vLLM's engine process last answered.

vLLM notices an engine that ended, not one that stands still. So a question that the engine answers
between two steps is asked again and again.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

HEARTBEAT_SECONDS = 1.0
SILENT_SECONDS = 30.0  # longer than a step, that of a long prompt included


class EngineHeartbeat:
    """Age of the last answer of an engine. Runs in the event loop of the server."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._answered = time.monotonic()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Ask from now on."""
        self._answered = time.monotonic()
        self._task = asyncio.get_running_loop().create_task(self._ask())

    def stop(self) -> None:
        """Ask no more."""
        if self._task is not None:
            self._task.cancel()

    def last_sign_of_life(self) -> float:
        """Seconds since the engine answered."""
        return time.monotonic() - self._answered

    @property
    def silent(self) -> bool:
        """Whether it has not answered for too long."""
        return self.last_sign_of_life() > SILENT_SECONDS

    async def _ask(self) -> None:
        while True:
            await self._engine.is_sleeping()  # an engine that ended raises, and vLLM reports that
            self._answered = time.monotonic()
            await asyncio.sleep(HEARTBEAT_SECONDS)
