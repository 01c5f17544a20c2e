"""The generator in stock ``vllm serve``: entry point of the group ``vllm.endpoint_plugins``.

vLLM asks for the routes while it builds its app, and for the state when its engine runs. Its app
has no hook for the end, so the one of the app's lifespan is used.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from vllm_cosmos3.server import info, metrics, openpi
from vllm_cosmos3.server.app import routers
from vllm_cosmos3.server.guardrails import Guardrails
from vllm_cosmos3.server.keys import Keys
from vllm_cosmos3.server.options import from_mapping
from vllm_cosmos3.server.routing import Route, service
from vllm_cosmos3.server.service import Service


class GeneratorRoutes:
    """What vLLM's interface asks of an endpoint plugin."""

    name = "cosmos3"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add our routes, and our truth about /health and /v1/models where vLLM lets us."""
        metrics.metrics()
        app.state.cosmos3 = app.state.cosmos3_engine = None
        app.state.cosmos3_sessions = openpi.Sessions()
        for router in routers():
            app.include_router(router)
        core = {"/health": _health, "/v1/models": _models}
        for path, handler in core.items():
            app.router.add_api_route(path, handler, methods=["GET"], route_class_override=Route)
        _close_at_the_end(app)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Start the generator beside the engine."""
        config = engine_client.vllm_config
        options = from_mapping(
            {
                "allowed_local_media_path": args.allowed_local_media_path or "",
                "allowed_media_domains": ",".join(args.allowed_media_domains or ()),
                **(config.additional_config or {}).get("cosmos3", {}),
            }
        )
        names = args.served_model_name or [args.model]
        folder = _folder(args)
        keys = args.api_key or [os.environ.get("VLLM_API_KEY", "")]
        state.cosmos3_keys = Keys(tuple(key for key in keys if key))
        state.cosmos3_engine = engine_client
        state.cosmos3 = Service(
            folder, tuple(names), options, config.device_config.device_type, Guardrails(options)
        )
        await state.cosmos3.start()


def _folder(args: Namespace) -> Path:
    from vllm_cosmos3.hub import resolve

    return resolve(args.model, args.revision)


async def _health(request: Request) -> Response:
    """200 when chat and generator can take work."""
    return await info.health_of(request)


async def _models(request: Request) -> Response:
    """vLLM's list of models, each with what the generator can do."""
    listed = await request.app.state.openai_serving_models.show_available_models()
    block = info.capability(service(request))
    body = listed.model_dump()
    for entry in body["data"]:
        entry["cosmos3"] = block
    return JSONResponse(body)


def _close_at_the_end(app: FastAPI) -> None:
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        async with inner(app) as state:
            yield state
        if app.state.cosmos3 is not None:
            await app.state.cosmos3.close()

    app.router.lifespan_context = lifespan
