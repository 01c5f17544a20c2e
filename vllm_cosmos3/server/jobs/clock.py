"""The clock of a server: what is done again and again while it lives."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

logger = logging.getLogger(__name__)

TICK = 0.5  # seconds between writes of progress, and looks at what other processes did
SWEEP = 4  # ticks between looks at old files and dead processes


class Clock:
    """Calls ``tick`` every half second and ``sweep`` every two, in threads, whatever they raise."""

    def __init__(self, tick: Callable[[], None], sweep: Callable[[], None]) -> None:
        self._tick, self._sweep = tick, sweep
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        count = 0
        while True:
            await asyncio.sleep(TICK)
            count += 1
            for work in (self._tick, *([self._sweep] if count % SWEEP == 0 else [])):
                try:
                    await asyncio.to_thread(work)
                except Exception:  # a full disk, a damaged row: the next time may be better
                    logger.exception("the storage cannot be kept")
