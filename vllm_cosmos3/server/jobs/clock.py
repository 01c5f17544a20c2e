"""The clock of a server: what is done again and again while it lives."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from vllm_cosmos3.errors import Cosmos3Error

logger = logging.getLogger(__name__)

TICK = 0.5  # seconds between writes of progress, and looks at what other processes did
SWEEP = 4  # ticks between looks at old files and dead processes


class Clock:
    """Calls ``tick`` every half second and ``sweep`` every two, in threads, whatever they raise."""

    def __init__(self, tick: Callable[[], None], sweep: Callable[[], None]) -> None:
        self._tick, self._sweep = tick, sweep
        self._task: asyncio.Task[None] | None = None
        self._last: dict[Callable[[], None], str] = {}  # what each said when it failed

    async def start(self) -> None:
        """Sweep once, and go on from there."""
        await self._call(self._sweep)
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
            await self._call(self._tick)
            if count % SWEEP == 0:
                await self._call(self._sweep)

    async def _call(self, work: Callable[[], None]) -> None:
        """Do it. A full disk or a damaged row is told once; the next time may be better."""
        try:
            await asyncio.to_thread(work)
        except Exception as error:
            if self._last.get(work) != str(error):
                expected = isinstance(error, Cosmos3Error)
                logger.error("the jobs cannot be kept: %s", error, exc_info=not expected)
            self._last[work] = str(error)
        else:
            self._last.pop(work, None)
