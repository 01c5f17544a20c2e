"""Health of a reasoner alone: ``--middleware`` of vLLM's app, as `endpoint_plugin` is not there to tell of it.

vLLM's own ``/health`` notices an engine that ended, not one that stands still.
"""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from vllm_cosmos3.server.engine_heartbeat import EngineHeartbeat
from vllm_cosmos3.server.http.keys import path_of
from vllm_cosmos3.server.routes.info import reasoner_trouble, unready

LIVE, READY = "/health/live", ("/health", "/health/ready")


class ReasonerHealth:
    """ASGI middleware: the three paths of health, and the heartbeat that they tell of."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._heartbeat: EngineHeartbeat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            self._heartbeat = EngineHeartbeat(scope["app"].state.engine_client)
            self._heartbeat.start()
            try:
                await self._app(scope, receive, send)
            finally:
                self._heartbeat.stop()
            return
        asked = scope.get("method") in ("GET", "HEAD") and path_of(scope)
        if asked == LIVE:
            await JSONResponse({"status": "alive"})(scope, receive, send)
        elif asked in READY:
            response = await self._ready(scope["app"].state.engine_client)
            await response(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _ready(self, engine: Any) -> Response:
        report: dict[str, Any] = {"surfaces": {}}
        reason = await reasoner_trouble(engine, self._heartbeat, report)
        if reason is not None:
            return unready("worker_lost", reason, report)
        return JSONResponse({"status": "healthy", **report})
