"""An engine that stands still is noticed, though it has not ended."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from vllm_cosmos3.server import engine_heartbeat
from vllm_cosmos3.server.engine_heartbeat import EngineHeartbeat


class Engine:
    """An engine that answers while ``running`` is set."""

    def __init__(self) -> None:
        self.running = asyncio.Event()
        self.asked = asyncio.Event()

    async def is_sleeping(self) -> bool:
        self.asked.set()
        await self.running.wait()
        return False


def test_the_age_of_the_last_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(engine_heartbeat, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(engine_heartbeat, "HEARTBEAT_SECONDS", 0)

    async def life() -> None:
        nonlocal now
        engine = Engine()
        heartbeat = EngineHeartbeat(engine)
        heartbeat.start()
        await asyncio.wait_for(engine.asked.wait(), 60)
        now += engine_heartbeat.SILENT_SECONDS + 1
        assert heartbeat.silent
        assert heartbeat.last_sign_of_life() == engine_heartbeat.SILENT_SECONDS + 1
        engine.running.set()
        while heartbeat.silent:
            await asyncio.sleep(0)
        assert heartbeat.last_sign_of_life() == 0
        heartbeat.stop()

    asyncio.run(life())
