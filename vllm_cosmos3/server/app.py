"""Our own app, for servers without a reasoner: the router with what vLLM's app would bring along."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from vllm_cosmos3.errors import Cosmos3Error
from vllm_cosmos3.server.http.api_errors import ApiError
from vllm_cosmos3.server.http.envelope_middleware import EnvelopeMiddleware, wrap
from vllm_cosmos3.server.http.keys import ApiKeys, Keys
from vllm_cosmos3.server.jobs.service import Service
from vllm_cosmos3.server.openapi.document import describe
from vllm_cosmos3.server.openapi.responses import TEXT, ModelName, Models, file_responses, responses
from vllm_cosmos3.server.options import KEEP_ALIVE
from vllm_cosmos3.server.routes import (
    images,
    info,
    playground,
    robots,
    videos,
    weights,
    worlds,
)
from vllm_cosmos3.server.routes.route import Route, service_of
from vllm_cosmos3.version import __version__

logger = logging.getLogger(__name__)
core = APIRouter(route_class=Route, tags=["Cosmos3 server"])
LOG_LINE, LOG_TIME = "%(levelname)s %(asctime)s [%(filename)s:%(lineno)d] %(message)s", "%m-%d %H:%M:%S"  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Listen:
    """Where and for whom the server is."""

    host: str = "0.0.0.0"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    root_path: str = ""
    log_level: str = "info"  # of uvicorn
    access_log: bool = True  # a line for each request


def show_log() -> None:
    """Put our lines among vLLM's, or where it has set up none yet (from 0.32 on) in its form."""
    ours, theirs = logging.getLogger("vllm_cosmos3"), logging.getLogger("vllm")
    if ours.hasHandlers() or os.environ.get("VLLM_CONFIGURE_LOGGING") == "0":
        return
    own = logging.StreamHandler()
    own.setFormatter(logging.Formatter(LOG_LINE, LOG_TIME))
    ours.handlers, ours.propagate = theirs.handlers[:] or [own], False
    ours.setLevel(os.environ.get("VLLM_LOGGING_LEVEL", "INFO").upper())


def routers() -> tuple[APIRouter, ...]:
    """What both hosts serve."""
    found = videos, images, info, weights, robots, worlds, playground
    return tuple(module.router for module in found)


def make_app(make_service: Callable[[], Service], listen: Listen) -> FastAPI:
    """The app; the service is made when it starts, in its event loop."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.cosmos3 = make_service()
        await app.state.cosmos3.start()
        yield
        await app.state.cosmos3.close()

    app = FastAPI(docs_url=None, redoc_url=None, lifespan=lifespan, root_path=listen.root_path)
    app.state.cosmos3 = app.state.cosmos3_engine = None
    app.state.cosmos3_keys = Keys(listen.api_keys)
    app.state.cosmos3_sessions = robots.Sessions()
    for router in (*routers(), core):
        app.include_router(router)
    playground.serve_docs(app)
    describe(app)
    if listen.api_keys:
        app.add_middleware(ApiKeys)
    if listen.origins:  # around the keys: a browser may read why it is refused
        app.add_middleware(
            CORSMiddleware, allow_origins=listen.origins, allow_methods=["*"], allow_headers=["*"]
        )
    wrap(app, lambda stack: EnvelopeMiddleware(stack, ("/",)))
    return app


def serve(app: FastAPI, listen: Listen) -> int:
    """Serve until a signal; SIGTERM lets what was accepted finish. The exit status.

    Raises:
        Cosmos3Error: the generator ended for good.
    """
    show_log()
    config = uvicorn.Config(
        app,
        host=listen.host,
        port=listen.port,
        ssl_keyfile=listen.ssl_keyfile,
        ssl_certfile=listen.ssl_certfile,
        log_level=listen.log_level,
        access_log=listen.access_log,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=5,
        ws_max_size=2 * robots.MAX_MESSAGE,  # a message that is too large gets an answer
    )
    server = DrainingServer(config)
    server.run()
    if server.failure is not None:
        raise server.failure
    return 0 if server.started else 1


class DrainingServer(uvicorn.Server):
    """Keeps answering while the accepted requests are finished; ends with the generator."""

    failure: Cosmos3Error | None = None

    async def on_tick(self, counter: int) -> bool:
        service: Service | None = self.config.app.state.cosmos3  # type: ignore[union-attr]
        if service is not None and not service.draining:
            self.failure = service.stage.error
        return self.failure is not None or await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        service: Service | None = self.config.app.state.cosmos3  # type: ignore[union-attr]
        if sig != signal.SIGTERM or service is None or service.draining:
            super().handle_exit(sig, frame)
            return
        service.draining = True
        logger.warning("draining: %s more seconds at most", service.options.drain_seconds)
        loop = asyncio.get_event_loop()
        loop.call_soon_threadsafe(
            lambda: setattr(self, "_drain", loop.create_task(self._end(service)))
        )

    async def _end(self, service: Service) -> None:
        await service.drain()
        self.should_exit = True


@core.get("/v1/models", summary="List the served models", responses=responses(Models))
async def models(request: Request) -> Response:
    """The served models with what they can do."""
    return JSONResponse(info.models(service_of(request)))


@core.get(
    "/v1/models/{name:path}", summary="Look up a served model", responses=responses(dict[str, Any])
)
async def model(request: Request, name: ModelName) -> Response:
    """One of the served models."""
    for entry in info.models(service_of(request))["data"]:
        if entry["id"] == name:
            return JSONResponse(entry)
    raise ApiError("model_not_found", f"there is no model {name!r}", param="model")


@core.get("/health", summary="Check whether work can be taken")
async def health(request: Request) -> Response:
    """200 when the generator can take work."""
    return await info.health_of(request)


@core.get("/ping", include_in_schema=False)
async def ping(request: Request) -> Response:
    """As /health."""
    return await info.health_of(request)


@core.get("/version", summary="Show the version")
async def version() -> Response:
    """The version of this package."""
    return JSONResponse({"version": __version__})


@core.get(
    "/metrics",
    summary="Read the metrics",
    response_class=Response,
    responses=file_responses(CONTENT_TYPE_LATEST.split(";")[0], schema=TEXT),
)
async def metrics() -> Response:
    """Prometheus families."""
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)
