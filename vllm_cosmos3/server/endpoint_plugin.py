"""The generator in stock ``vllm serve``: entry point of the group ``vllm.endpoint_plugins``.

vLLM asks for the routes while it builds its app, and for the state when its engine runs. It tells
a plugin neither of SIGTERM nor of the end: the first is taken over and passed on, for the second there
is the lifespan of the app.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from argparse import Namespace
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.fetching import PRIVATE_MEDIA
from vllm_cosmos3.server.app import routers, show_log
from vllm_cosmos3.server.command import announce
from vllm_cosmos3.server.engine_heartbeat import EngineHeartbeat
from vllm_cosmos3.server.guardrails import Guardrails
from vllm_cosmos3.server.http import metrics
from vllm_cosmos3.server.http.envelope_middleware import EnvelopeMiddleware, wrap
from vllm_cosmos3.server.http.keys import VLLM_UNAUTHORIZED, AnyScheme, ApiKeys, keys_of
from vllm_cosmos3.server.jobs.service import Service
from vllm_cosmos3.server.jobs.upsampling import EngineReasoner
from vllm_cosmos3.server.memory_split import sized
from vllm_cosmos3.server.openapi.document import describe
from vllm_cosmos3.server.options import ONE_PROCESS, from_mapping
from vllm_cosmos3.server.routes import info, playground, robots
from vllm_cosmos3.server.routes.route import Route, service_of

logger = logging.getLogger(__name__)

OURS = (
    "/v1/videos",
    "/v1/images",
    "/v1/cosmos3",
    robots.PATH,
)  # below these errors have our envelope


class GeneratorRoutes:
    """What vLLM's interface asks of an endpoint plugin."""

    name = "cosmos3"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add our routes, and our truth about /health and /v1/models where vLLM lets us."""
        metrics.metrics()
        app.state.cosmos3 = app.state.cosmos3_engine = app.state.cosmos3_heartbeat = None
        app.state.cosmos3_sessions = robots.Sessions()
        for router in routers():
            app.include_router(router)
        core = {"/health": _health, "/v1/models": _models}
        for path, handler in core.items():
            app.router.add_api_route(path, handler, methods=["GET"], route_class_override=Route)
        playground.serve_docs(app)
        describe(app)
        # Robots' keys are put into vLLM's form in front of it, which knows ``Bearer`` alone.
        # Ours asks for keys first, as vLLM's takes the root path off anywhere in the path.
        asking = partial(ApiKeys, unauthorized=VLLM_UNAUTHORIZED)
        wrap(app, lambda stack: EnvelopeMiddleware(AnyScheme(asking(stack)), OURS))
        _settle_at_the_end(app)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Start the generator beside the engine."""
        if (args.api_server_count or 1) > 1:
            raise InvalidRequest("--api-server-count", args.api_server_count, ONE_PROCESS)
        show_log()
        config = engine_client.vllm_config
        options = from_mapping(
            {
                "allowed_local_media_path": args.allowed_local_media_path or "",
                "allowed_media_domains": ",".join(args.allowed_media_domains or ()),
                **(config.additional_config or {}).get("cosmos3", {}),
            }
        )
        if options.allow_private_media:
            os.environ[PRIVATE_MEDIA] = "1"  # chat's media are fetched in this process
        names = args.served_model_name or [args.model]
        sizing = sized(_folder(args), options, config.device_config.device_type)
        state.cosmos3_keys = keys_of(args)
        state.cosmos3_engine = engine_client
        state.cosmos3 = Service(
            sizing,
            tuple(names),
            options,
            Guardrails(options),
            EngineReasoner(engine_client, sizing.model.path),
        )
        announce(state.cosmos3, "both: /v1/chat/completions and all others of vLLM, /v1/images/generations, /v1/videos", _url(args))  # fmt: skip
        state.cosmos3_heartbeat = EngineHeartbeat(engine_client)
        state.cosmos3_heartbeat.start()
        await state.cosmos3.start()


def _folder(args: Namespace) -> Path:
    from vllm_cosmos3.checkpoint.hub import resolve

    return resolve(args.model, args.revision)


def _url(args: Namespace) -> str:
    scheme = "https" if args.ssl_certfile else "http"
    return f"{scheme}://{args.host or '0.0.0.0'}:{args.port}/v1"


async def _health(request: Request) -> Response:
    """200 when chat and generator can take work."""
    return await info.health_of(request)


async def _models(request: Request) -> Response:
    """vLLM's list of models, each with what the generator can do."""
    listed = await request.app.state.openai_serving_models.show_available_models()
    block = info.capability(service_of(request))
    body = listed.model_dump()
    for entry in body["data"]:
        entry["cosmos3"] = block
    return JSONResponse(body)


def _settle_at_the_end(app: FastAPI) -> None:
    """Let the generator finish what it accepted when the server is asked to stop, then end it."""
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        async with inner(app) as state:
            service: Service = app.state.cosmos3  # vLLM deletes the state on its way out
            heartbeat: EngineHeartbeat = app.state.cosmos3_heartbeat
            _drain_on_sigterm(service)
            yield state
        heartbeat.stop()
        await service.close()

    app.router.lifespan_context = lifespan


def _drain_on_sigterm(service: Service) -> None:
    """Take SIGTERM from vLLM, which by now handles it like SIGINT: that one ends the server."""
    loop = asyncio.get_running_loop()

    def end(_: object = None) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    def drain() -> None:
        if service.draining:  # asked twice
            end()
            return
        logger.warning("draining: %s more seconds at most", service.options.drain_seconds)
        service.draining = True
        draining.append(loop.create_task(service.drain()))
        draining[0].add_done_callback(end)

    draining: list[asyncio.Task[None]] = []  # asyncio itself would forget it
    loop.add_signal_handler(signal.SIGTERM, drain)
