"""The routes that tell what is served and how it is: models, health."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from vllm_cosmos3.checkpoint.kinds import ACTION_MODES, KINDS, WORLD_MODEL
from vllm_cosmos3.errors import Cosmos3Error
from vllm_cosmos3.request.controls import CONTROL_GUIDANCE
from vllm_cosmos3.request.embodiments import EMBODIMENTS
from vllm_cosmos3.request.sizes import MAX_TRAINED_FRAMES, TRAINED_SIZES
from vllm_cosmos3.robots import droid
from vllm_cosmos3.server.engine_heartbeat import EngineHeartbeat
from vllm_cosmos3.server.http.api_errors import error_body
from vllm_cosmos3.server.jobs.sampling_defaults import shown_defaults
from vllm_cosmos3.server.jobs.service import Service
from vllm_cosmos3.server.openapi.responses import Models, responses
from vllm_cosmos3.server.routes.route import Route, service_of

router = APIRouter(route_class=Route, tags=["Cosmos3 server"])
STARTED = 0  # models have no date of their own
HEALTH = ThreadPoolExecutor(1, "health")


@router.get(
    "/v1/cosmos3/models", summary="Show what the models can do", responses=responses(Models)
)
async def capabilities(request: Request) -> Response:
    """The served models with what they can do."""
    return JSONResponse(models(service_of(request)))


def models(service: Service) -> dict[str, Any]:
    """OpenAI's list of models, each with a block ``cosmos3``."""
    block = capability(service)
    data = [
        {
            "id": name,
            "object": "model",
            "created": STARTED,
            "owned_by": "vllm-cosmos3",
            "root": str(service.model.path),
            "parent": None,
            "max_model_len": None,
            "cosmos3": block,
        }
        for name in service.names
    ]
    return {"object": "list", "data": data}


def capability(service: Service) -> dict[str, Any]:
    """What a user interface needs to know about the checkpoint."""
    actions = ACTION_MODES if service.model.transformer.action_gen else ()
    kind = KINDS[service.model.kind]
    defaults = shown_defaults(service.model, service.admission.defaults)
    possible = (*defaults, "transfer", *actions, WORLD_MODEL)
    modes = [mode for mode in kind.modes if mode in possible]
    quantization, sound = service.model.quantization, service.model.sound
    causal = service.model.causal
    embodiments = EMBODIMENTS if set(ACTION_MODES) & set(modes) else ()
    spaces = embodiments if causal is None else causal.spaces.values()
    return {
        "family": "cosmos3",
        "checkpoint_kind": service.model.kind,
        "modes": modes,
        "sound": sound is not None,
        "sound_input": sound is not None and sound.encoder_enabled,
        "quantization": quantization and quantization.record(),
        "adapters": [adapter.record() for adapter in service.model.adapters],
        "resolutions": {
            str(tier): [f"{width}x{height}" for width, height in TRAINED_SIZES[tier]]
            for tier in kind.tiers
        },
        "max_frames": {
            str(tier): min(MAX_TRAINED_FRAMES[tier], kind.frames[1]) for tier in kind.tiers
        },
        "defaults": {mode: asdict(defaults[mode]) for mode in modes if mode in defaults},
        "action_domains": {space.name: asdict(space) for space in spaces},
        "control_guidance": CONTROL_GUIDANCE if "transfer" in modes else {},
        "robot": _robot(service) if kind.robot == droid.NAME else None,
        "guardrails": service.guardrails.state,
        "prompt_upsampling": service.reasoner is not None,
        "preview": service.admission.shows_previews,
        "presets": service.admission.presets,
        "queue_limit": service.options.max_queue,
        "replicas": {
            "count": len(service.stage.members),
            "mesh": service.sizing.engine.parallel.degrees,
            "devices": [member.devices for member in service.stage.members],
        },
    }


def _robot(service: Service) -> dict[str, Any]:
    """What a robot gets, beside what the handshake says."""
    shape = [droid.HORIZON, droid.WIDTH]
    told = droid.metadata(service.options.robot_action_space)
    return {**told, "action_shape": shape, "actions_per_second": droid.FPS}


@router.get("/health/live", summary="Check whether the process answers")
async def live() -> Response:
    """The process answers."""
    return JSONResponse({"status": "alive"})


@router.get("/health/ready", summary="Check whether every surface is ready")
async def ready(request: Request) -> Response:
    """Every surface can take work, or why not."""
    return await health_of(request)


async def health_of(request: Request) -> Response:
    """200 when every served surface can take work, else 503 with the reason.

    The generator can where one of its replicas can; the status is degraded while another cannot.
    """
    service = request.app.state.cosmos3
    if service is None:
        return unready("loading", "the server is starting", None)
    loop = asyncio.get_running_loop()
    # In a pool of its own: in the common one others may wait for the stage.
    status = await loop.run_in_executor(HEALTH, service.status)
    report: dict[str, Any] = {
        "surfaces": {"generator": status.state},
        "queue": {"waiting": status.waiting, "running": status.running, "limit": status.limit},
        "restarts": status.restarts,
        "replicas": service.replicas(),
        "weight_version": status.weights,
        "last_sign_of_life": round(service.stage.last_sign_of_life(), 3),
        "call": {"name": status.call or None, "seconds": round(status.call_seconds, 3)},
        "guardrails": service.guardrails.state,
        "adapters": [f"{adapter.name}:{adapter.scale:g}" for adapter in service.model.adapters],
    }
    if service.worlds is not None:
        report["sessions"] = {"open": service.worlds.open, "limit": service.worlds.limit}
    if status.state == "starting":
        report["loaded_percent"] = service.loaded(status)
    engine = request.app.state.cosmos3_engine
    if engine is not None:
        reason = await reasoner_trouble(engine, request.app.state.cosmos3_heartbeat, report)
        if reason is not None:
            return unready("worker_lost", reason, report)
    try:
        await loop.run_in_executor(HEALTH, service.journal.storage.check)
    except Cosmos3Error as error:
        return unready(error.code, str(error), report)
    if service.draining:
        return unready("draining", "the server is stopping", report)
    if service.stage.silent:
        return unready("worker_lost", service.reason(status), report)
    if status.state != "ready":
        code = "sleeping" if status.state == "sleeping" else "loading"
        return unready(code, service.reason(status), report)
    down = [each for each in report["replicas"] if each["state"] != "ready"]
    if not down:
        return JSONResponse({"status": "healthy", **report})
    which = ", ".join(f"replica {each['replica']} is {each['state']}" for each in down)
    return JSONResponse({"status": "degraded", "reason": which, **report})


async def reasoner_trouble(
    engine: Any, heartbeat: EngineHeartbeat, report: dict[str, Any]
) -> str | None:
    """Why the reasoner can take no work, None if it can; its part of the report is filled in."""
    surfaces = report["surfaces"]
    surfaces["reasoner"] = "ready"
    report["reasoner_last_sign_of_life"] = round(heartbeat.last_sign_of_life(), 3)
    try:
        await engine.check_health()
    except Exception as error:  # noqa: BLE001 - vLLM's, and the answer is what it means
        surfaces["reasoner"] = "failed"
        return f"the reasoner is down: {error}"
    if heartbeat.silent:
        surfaces["reasoner"] = "silent"
        seconds = heartbeat.last_sign_of_life()
        return f"the reasoner's engine has given no sign of life for {seconds:.0f} s"
    return None


def unready(code: str, reason: str, report: dict[str, Any] | None) -> JSONResponse:
    """503 with the reason, and the report of what is known."""
    body = {"status": "unhealthy", "reason": reason, **(report or {}), **error_body(code, reason)}
    return JSONResponse(body, 503, {"Retry-After": "5"})
