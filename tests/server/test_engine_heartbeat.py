"""An engine that stands still is noticed, though it has not ended."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from vllm_cosmos3.server import engine_heartbeat
from vllm_cosmos3.server.engine_heartbeat import EngineHeartbeat
from vllm_cosmos3.server.reasoner_health import ReasonerHealth


class Engine:
    """An engine that answers while ``running`` is set."""

    def __init__(self) -> None:
        self.running = asyncio.Event()
        self.asked = asyncio.Event()
        self.dead = False

    async def check_health(self) -> None:
        if self.dead:
            raise RuntimeError("it ended")

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


@pytest.mark.parametrize("path", ["/health", "/health/ready"])
def test_health_of_a_reasoner_alone(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(engine_heartbeat, "time", SimpleNamespace(monotonic=lambda: now))
    app, engine = FastAPI(root_path="/proxy"), Engine()
    app.get("/health")(lambda: "vLLM's")
    app.get("/other")(lambda: "another")
    app.add_middleware(ReasonerHealth)
    app.state.engine_client = engine
    with TestClient(app) as client:
        well = client.get(path)
        assert (well.status_code, well.json()["surfaces"]) == (200, {"reasoner": "ready"})
        assert well.json()["reasoner_last_sign_of_life"] == 0
        now += engine_heartbeat.SILENT_SECONDS + 1  # the engine has not answered meanwhile
        silent = client.get(f"/proxy{path}")
        assert (silent.status_code, silent.json()["error"]["code"]) == (503, "worker_lost")
        assert "no sign of life for 31 s" in silent.json()["reason"]
        assert silent.json()["surfaces"] == {"reasoner": "silent"}
        engine.dead = True
        dead = client.get(path)
        assert (dead.status_code, dead.json()["surfaces"]) == (503, {"reasoner": "failed"})
        assert client.get("/health/live").json() == {"status": "alive"}
        assert client.get("/other").json() == "another"
