"""The routes of /v1/videos, as OpenAI's clients and those of vLLM-Omni call them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.server.http.body import read_body
from vllm_cosmos3.server.http.errors import ApiError, Failed, retry_after
from vllm_cosmos3.server.http.file_response import StoredFile
from vllm_cosmos3.server.http.media_inputs import FILE_FIELDS, called, local_files, media_files
from vllm_cosmos3.server.http.request_fields import VIDEO, Asked, translate
from vllm_cosmos3.server.jobs.artifacts import CLIP, SPRITES, THUMBNAIL
from vllm_cosmos3.server.jobs.job_object import video_json
from vllm_cosmos3.server.jobs.journal import COMPLETED, FAILED, Job
from vllm_cosmos3.server.jobs.service import Service
from vllm_cosmos3.server.jobs.value_sources import SPELLINGS
from vllm_cosmos3.server.openapi.requests import KEY, PREFER, remix_request, video_request
from vllm_cosmos3.server.openapi.responses import (
    BYTES,
    DELETED,
    JOB,
    LIMIT,
    PAGE,
    TEXT,
    Cursor,
    Limit,
    Order,
    Variant,
    VideoId,
    answers,
    refusals,
)
from vllm_cosmos3.server.routes.route import Route, service

router = APIRouter(route_class=Route, tags=["Cosmos3 videos"])
VARIANTS = {"video": (CLIP, "video/mp4"), "thumbnail": (THUMBNAIL, "image/webp"), "spritesheet": (SPRITES, "image/webp")}  # fmt: skip
INPUTS = {"image": "input_reference", "video": "input_reference"}  # where the two are missing
DEADLINE = "deadline_seconds"
POLL_SECONDS = 0.1  # between looks at a job whose events are streamed
BEAT_SECONDS = 15.0  # of silence until an empty event keeps proxies from closing the stream


@router.post("/v1/videos", openapi_extra=video_request(KEY, PREFER), responses=answers(JOB))
async def create(request: Request) -> Response:
    """Queue a video. ``Prefer: wait=N`` answers when it is done, or after N seconds."""
    at, asked = service(request), await _asked(request)
    job = await _create(at, request, asked, "video", at.options.request_deadline)
    return await _accepted(at, request, job)


@router.post(
    "/v1/videos/sync",
    openapi_extra=video_request(KEY),
    response_class=Response,
    responses=answers(BYTES, "video/mp4"),
)
async def sync(request: Request) -> Response:
    """Make a video and answer with it. A client that goes away cancels it.

    With an Idempotency-Key it is made to the end and kept, so that the same request gets the same
    file later.
    """
    at, asked = service(request), await _asked(request)
    mode = asked.fields.get("action_mode")
    if mode in ("policy", "inverse_dynamics"):
        possible = "forward_dynamics, as the answer is a video alone; POST /v1/videos keeps actions"
        raise asked.placed(InvalidRequest("action_mode", mode, possible, "unsupported"))
    limit = at.options.sync_deadline
    deadline = min(limit, asked.server.get(DEADLINE, limit))
    wait = at.estimated_wait()
    if wait > deadline:
        message = f"about {wait:.0f} seconds of work wait, longer than {deadline:g}"
        raise ApiError(
            "estimated_wait_exceeds_deadline",
            message,
            param=asked.paths.get(DEADLINE, DEADLINE) if DEADLINE in asked.server else None,
            headers={"Retry-After": retry_after(wait - deadline)},
        )
    job = await _create(at, request, asked, "sync", deadline)
    job = await result(at, request, job)
    headers = {
        "X-Model": job.model,
        "X-Inference-Time-S": f"{job.timings['total']:.3f}",
        "X-Stage-Durations": json.dumps(job.timings, separators=(",", ":")),
        "X-Peak-Memory-MB": f"{job.peak_memory / 2**20:.1f}",
        "X-Seed": str(job.effective["seed"]),
    }
    try:
        return StoredFile(at.journal.folder(job.id) / CLIP, media_type="video/mp4", headers=headers)
    except FileNotFoundError:
        raise Failed("expired", "the video was deleted to make room") from None
    finally:
        if job.key is None:
            at.delete(job.id)


async def result(at: Service, request: Request, job: Job) -> Job:
    """The job when it is done; cancelled if the client goes away and has no key to come back with.

    Raises:
        ApiError: why there is no result.
    """
    while not job.ended:
        job = await at.wait(job, 0.2)
        if await request.is_disconnected():
            if job.key is None:
                at.delete(job.id)
            raise Failed("cancelled", "the client went away")
    if job.status == FAILED:
        assert job.error is not None
        at.delete(job.id)
        raise Failed(job.error["code"], job.error["message"])
    return job


@router.get("/v1/videos", openapi_extra={"parameters": [LIMIT]}, responses=answers(PAGE))
async def page(
    request: Request, after: Cursor = None, limit: Limit = "20", order: Order = "desc"
) -> Response:
    """The videos of this storage, the newest first."""
    at = service(request)
    digits = limit.isascii() and limit.isdigit() and len(limit) <= 3
    if not digits or not 1 <= int(limit) <= 100:
        raise InvalidRequest("limit", limit, "an integer from 1 to 100")
    if order not in ("asc", "desc"):
        raise InvalidRequest("order", order, "asc or desc")
    jobs = at.journal.page(after=after, limit=int(limit) + 1, newest_first=order == "desc")
    if jobs is None:
        raise ApiError(
            "cursor_not_found", f"there is no video {after!r} to go on from", param="after"
        )
    # One that was deleted since the page was read is left out.
    found = [job if job.ended else at.find(job.id) for job in jobs[: int(limit)]]
    shown = [video_json(job, at) for job in found if job is not None]
    return JSONResponse(
        {
            "object": "list",
            "data": shown,
            "first_id": shown[0]["id"] if shown else None,
            "last_id": shown[-1]["id"] if shown else None,
            "has_more": len(jobs) > int(limit),
        }
    )


@router.get("/v1/videos/{video_id}", responses=answers(JOB))
async def retrieve(request: Request, video_id: VideoId) -> Response:
    """A job as it is. A failed one is an ordinary answer, with its error in it."""
    at = service(request)
    job = at.get(video_id)
    headers = {} if job.ended else {"openai-poll-after-ms": "1000"}
    return JSONResponse(video_json(job, at), headers=headers)


@router.delete("/v1/videos/{video_id}", responses=answers(DELETED))
async def delete(request: Request, video_id: VideoId) -> Response:
    """Delete a video; if it is not done, stop making it."""
    service(request).delete(video_id)
    return JSONResponse({"id": video_id, "deleted": True, "object": "video.deleted"})


@router.head("/v1/videos/{video_id}/content", include_in_schema=False)
@router.get(
    "/v1/videos/{video_id}/content",
    response_class=Response,
    responses=answers(BYTES, "video/mp4", "image/webp"),
)
async def content(request: Request, video_id: VideoId, variant: Variant = "video") -> Response:
    """The MP4, or a WebP of its first frame or of sixteen frames. Ranges are served."""
    at = service(request)
    job = at.get(video_id)
    if variant not in VARIANTS:
        raise InvalidRequest("variant", variant, f"one of {', '.join(VARIANTS)}")
    if job.status == FAILED:
        assert job.error is not None
        message = f"there is no video: {job.error['message']} ({job.error['code']})"
        raise ApiError("job_failed", message)
    if job.status != COMPLETED:
        raise ApiError("not_ready", f"the video is {job.status}", headers={"Retry-After": "1"})
    name, kind = VARIANTS[variant]
    file = at.journal.folder(job.id) / name
    if not job.removed and (job.expires or 0) >= time.time():
        with suppress(FileNotFoundError):
            return StoredFile(file, media_type=kind, filename=f"{job.id}{file.suffix}")
    at.get(job.id)  # by its owner, which is another answer
    raise ApiError("expired", "the video was deleted, by its age or to make room")


@router.get(
    "/v1/videos/{video_id}/events",
    response_class=Response,
    responses=answers(TEXT, "text/event-stream"),
)
async def events(request: Request, video_id: VideoId) -> Response:
    """Server-sent events: ``progress`` with the job whenever it has advanced, then its end."""
    at = service(request)
    job = at.get(video_id)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(
        _events(at, request, job), media_type="text/event-stream", headers=headers
    )


@router.post(
    "/v1/videos/{video_id}/remix", openapi_extra=remix_request(KEY, PREFER), responses=answers(JOB)
)
async def remix(request: Request, video_id: VideoId) -> Response:
    """The same request with another prompt, and the same seed unless another is given."""
    at = service(request)
    source = at.get(video_id)
    body = await read_body(request, at.options)
    if "input" in str(source.effective.get("mode")) or source.effective.get("mode") != "text2video":
        possible = "of a video made from text alone; send its input again to POST /v1/videos"
        raise InvalidRequest("id", video_id, possible, "unsupported")
    asked = await asyncio.to_thread(translate, body, VIDEO)
    if not asked.fields.keys() & {"prompt", "prompt_token_ids"}:
        raise InvalidRequest("prompt", None, "the new text", "missing_required")
    asked = replace(asked, fields=remixed(source, asked.fields))
    job = await _create(
        at, request, asked, "video", at.options.request_deadline, remixed_from=source.id
    )
    return await _accepted(at, request, job)


for _path in ("edits", "extensions", "characters"):

    @router.post(
        f"/v1/videos/{_path}",
        status_code=501,
        response_class=Response,
        responses=refusals(501, "Not offered"),
    )
    async def absent(request: Request) -> Response:
        """Not offered."""
        message = "this is not offered; POST /v1/videos with input_reference continues a clip"
        raise ApiError("not_implemented", message)


async def _asked(request: Request) -> Asked:
    body = await read_body(request, service(request).options)
    return await asyncio.to_thread(translate, body, VIDEO)


async def _create(
    at: Service, request: Request, asked: Asked, kind: str, deadline: float,
    remixed_from: str | None = None,
) -> Job:  # fmt: skip
    key = request.headers.get("idempotency-key") or None
    retried = kind == "video" and request.headers.get("x-stainless-retry-count", "0") != "0"
    local = local_files(asked, at.options)
    given = {
        str(local.fields[name]): str(asked.fields[name])
        for name in FILE_FIELDS & asked.fields.keys()
    }
    async with media_files(asked, at.options) as (media, names):
        for name, file in media.items():
            given[str(file)] = called(asked.references[names.get(name, name)])
        places = {role: asked.paths.get(name, name) for role, name in names.items()}
        return await at.create(
            kind,
            replace(local, paths={**INPUTS, **asked.paths, **places}),
            media,
            deadline=deadline,
            key=key,
            retried=retried,
            remixed_from=remixed_from,
            given=given,
        )


async def _accepted(at: Service, request: Request, job: Job) -> Response:
    """The answer with a job: at once, or when the client prefers it."""
    headers = {}
    seconds = _preferred_wait(request)
    if seconds is not None:
        job = await at.wait(job, seconds)
        headers["Preference-Applied"] = f"wait={seconds:g}"
    return JSONResponse(video_json(job, at), headers=headers)


def remixed(source: Job, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a video's request with others, which replace the same in other words."""
    kept = {**source.request, "seed": source.effective["seed"]}
    for one, other in SPELLINGS:
        for given, replaced in ((one, other), (other, one)):
            if fields.keys() & given:
                kept = {name: value for name, value in kept.items() if name not in replaced}
    if fields.get("generate_sound") is False:
        kept.pop("sound_duration", None)
    return {**kept, **fields}


def _preferred_wait(request: Request) -> float | None:
    """The seconds of ``Prefer: wait=N``. A preference that cannot be read is none (RFC 7240)."""
    for part in request.headers.get("prefer", "").replace(";", ",").split(","):
        name, _, value = part.strip().partition("=")
        digits = value.strip('"')
        if name.lower() == "wait" and digits.isascii() and digits.isdigit():
            return min(float(digits), 3600.0)
    return None


async def _events(at: Service, request: Request, job: Job) -> AsyncIterator[str]:
    last: tuple[Any, ...] = ()
    quiet = time.monotonic()
    while True:
        now = (job.status, job.phase, job.step, job.progress)
        if job.ended:
            yield _event(job.status, video_json(job, at))
            return
        if now != last:
            last, quiet = now, time.monotonic()
            yield _event("progress", video_json(job, at))
        elif time.monotonic() - quiet > BEAT_SECONDS:
            quiet = time.monotonic()
            yield ": still here\n\n"
        await asyncio.sleep(POLL_SECONDS)
        if await request.is_disconnected():
            return
        try:
            job = at.get(job.id)
        except ApiError:
            yield _event("deleted", {"id": job.id, "object": "video.deleted", "deleted": True})
            return


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"
