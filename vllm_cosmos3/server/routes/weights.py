"""The routes of weights that move: to the host's memory and back, and from a trainer to the generator."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Body, Query, Request
from fastapi.responses import JSONResponse, Response

from vllm_cosmos3.errors import Busy
from vllm_cosmos3.server.http.api_errors import ApiError
from vllm_cosmos3.server.jobs.service import Service
from vllm_cosmos3.server.openapi.responses import Message, Surfaces, responses
from vllm_cosmos3.server.routes.route import Route, service_of

router = APIRouter(route_class=Route, tags=["Cosmos3 server"])
# Of their own: these calls wait for running requests and for trainers, and what they kept waiting in the
# common pool would be every other request.
CALLS = ThreadPoolExecutor(8, "weights")
Timeout = Annotated[
    float,
    Query(ge=0, le=3600, description="time that running requests may take to end [seconds]"),
]


@router.post(
    "/v1/cosmos3/sleep", summary="Leave the weights in host memory", responses=responses(Surfaces)
)
async def sleep(request: Request, timeout: Timeout = 60.0) -> Response:
    """Free the devices for others. Running requests end first; waiting ones wait on, new ones get 503."""
    service, start = service_of(request), time.perf_counter()
    try:
        await maintained(service, "sleep", patience=timeout)
    except Busy as error:
        raise ApiError("queue_full", f"{error}; the generator stays awake") from None
    await of_reasoner(request, "sleep")
    return await answer(request, start)


@router.post("/v1/cosmos3/wake_up", summary="Bring the weights back", responses=responses(Surfaces))
async def wake_up(request: Request) -> Response:
    """Bring the weights back to the devices, and serve the requests that wait."""
    service, start = service_of(request), time.perf_counter()
    await of_reasoner(request, "wake_up")
    await maintained(service, "wake_up")
    return await answer(request, start)


async def maintained(service: Service, method: str, *args: Any, **how: Any) -> None:
    """Make a call of the stage between two requests, as `Stages.maintain` does."""
    call = partial(service.stage.maintain, method, *args, **how)
    await asyncio.get_running_loop().run_in_executor(CALLS, call)


async def of_reasoner(request: Request, method: str) -> None:
    """The same for the reasoner, where its engine was started for it."""
    engine = request.app.state.cosmos3_engine
    if engine is not None and engine.vllm_config.model_config.enable_sleep_mode:
        await getattr(engine, method)()


async def answer(request: Request, start: float) -> Response:
    """The state of each surface now."""
    service, engine = service_of(request), request.app.state.cosmos3_engine
    status = await asyncio.get_running_loop().run_in_executor(CALLS, service.status)
    state = status.state
    surfaces: dict[str, Any] = {"generator": state}
    if engine is not None:
        sleeps = engine.vllm_config.model_config.enable_sleep_mode
        surfaces["reasoner"] = state if sleeps else "ready: started without --enable-sleep-mode"
    return JSONResponse({"surfaces": surfaces, "seconds": round(time.perf_counter() - start, 3)})


# Names and bodies are those of vLLM's own routes: its HTTP client works with /v1/cosmos3 as its base.


class Transfer(Route):
    """A route for a trainer, whom the operator allows and asks for a key: FastAPI reads its body, whole."""

    def check(self, request: Request) -> None:
        if service_of(request).sizing.engine.weight_transfer is None:
            message = "weight transfer is off; start with --weight-transfer files, nccl or ipc"
            raise ApiError("permission_denied", message)
        if not request.app.state.cosmos3_keys:
            message = "weight transfer needs a server with --api-key"
            raise ApiError("permission_denied", message)


transfers = APIRouter(route_class=Transfer, tags=["Cosmos3 server"])
Init = Annotated[
    dict[str, Any], Body(embed=True, description="as vLLM's backend has it; for files {}")
]
Update = Annotated[
    dict[str, Any] | list[dict[str, Any]],
    Body(
        embed=True,
        description='as vLLM\'s backend has it, one or a list by rank; for files {"path": FILE or FOLDER}',
    ),
]
Version = Annotated[
    str | None, Body(embed=True, description="name of the new weights, for /health")
]


@transfers.post(
    "/v1/cosmos3/init_weight_transfer_engine",
    summary="Meet a trainer",
    responses=responses(Message),
)
async def init_weight_transfer_engine(request: Request, init_info: Init) -> Response:
    """Let every rank meet the trainer, which has to come there at the same time."""
    return await transferred(request, "init_weight_transfer_engine", init_info)


@transfers.post(
    "/v1/cosmos3/start_weight_update", summary="Begin a weight update", responses=responses(Message)
)
async def start_weight_update(request: Request) -> Response:
    """Let running requests end, and hold the others until the update ends."""
    return await transferred(request, "start_weight_update")


@transfers.post(
    "/v1/cosmos3/update_weights", summary="Receive new weights", responses=responses(Message)
)
async def update_weights(request: Request, update_info: Update) -> Response:
    """Receive tensors of the transformer; can be repeated. A failure ends the update, with the old weights."""
    return await transferred(request, "update_weights", update_info)


@transfers.post(
    "/v1/cosmos3/finish_weight_update", summary="End a weight update", responses=responses(Message)
)
async def finish_weight_update(request: Request, weight_version: Version = None) -> Response:
    """Generate with the new weights from now on."""
    return await transferred(request, "finish_weight_update", weight_version)


@transfers.post(
    "/v1/cosmos3/abort_weight_update",
    summary="Give a weight update up",
    responses=responses(Message),
)
async def abort_weight_update(request: Request) -> Response:
    """Put the weights of before the update back."""
    return await transferred(request, "abort_weight_update")


async def transferred(request: Request, method: str, *args: Any) -> Response:
    """The answer to one of these calls."""
    await maintained(service_of(request), method, *args)
    return JSONResponse({"message": f"{method} is done"})


router.include_router(transfers)
