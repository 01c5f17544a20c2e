"""The routes of /v1/videos, as OpenAI's clients and those of vLLM-Omni call them."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from vllm_cosmos3.errors import Cosmos3Error, DiskFull, InvalidRequest
from vllm_cosmos3.progress import Preview
from vllm_cosmos3.server.http.api_errors import ApiError, RequestFailed, envelope, retry_after
from vllm_cosmos3.server.http.body import read_body
from vllm_cosmos3.server.http.file_response import StoredFile
from vllm_cosmos3.server.http.media_inputs import FILE_FIELDS, called, local_files, media_files
from vllm_cosmos3.server.http.request_fields import VIDEO, ClientRequest, translate
from vllm_cosmos3.server.jobs.admission import WATCH_SECONDS, Submission
from vllm_cosmos3.server.jobs.job_files import CLIP, SPRITES, THUMBNAIL
from vllm_cosmos3.server.jobs.service import Service
from vllm_cosmos3.server.jobs.value_sources import SPELLINGS
from vllm_cosmos3.server.jobs.video_job import COMPLETED, FAILED, UnreadableRecord, VideoJob
from vllm_cosmos3.server.openapi.requests import KEY, PREFER, remix_request, video_request
from vllm_cosmos3.server.openapi.responses import (
    LIMIT,
    TEXT,
    Cursor,
    Limit,
    Order,
    Variant,
    VideoDeleted,
    VideoId,
    VideoPage,
    file_responses,
    responses,
)
from vllm_cosmos3.server.routes.route import Route, service_of
from vllm_cosmos3.server.storage import StorageLost

logger = logging.getLogger(__name__)
router = APIRouter(route_class=Route, tags=["Cosmos3 videos"])
VARIANTS = {"video": (CLIP, "video/mp4"), "thumbnail": (THUMBNAIL, "image/webp"), "spritesheet": (SPRITES, "image/webp")}  # fmt: skip
INPUTS = {"image": "input_reference", "video": "input_reference"}  # where the two are missing
DEADLINE = "deadline_seconds"
POLL_SECONDS = 0.1  # between looks at a job whose events are streamed
HEARTBEAT_SECONDS = 15.0  # of silence until an empty event keeps proxies from closing the stream


@router.post(
    "/v1/videos",
    summary="Create a video",
    openapi_extra=video_request(KEY, PREFER),
    responses=responses(VideoJob),
)
async def create(request: Request) -> Response:
    """Queue a video. ``Prefer: wait=N`` answers when it is done, or after N seconds."""
    service, client_request = service_of(request), await _client_request(request)
    job = await _create(service, request, client_request, "video", service.options.request_deadline)
    return await _accepted(service, request, job)


@router.post(
    "/v1/videos/sync",
    summary="Create a video and wait for it",
    openapi_extra=video_request(KEY),
    response_class=Response,
    responses=file_responses("video/mp4"),
)
async def sync(request: Request) -> Response:
    """Make a video and answer with it. A client that goes away cancels it.

    With an Idempotency-Key it is made to the end and kept, so that the same request gets the same
    file later.
    """
    service, client_request = service_of(request), await _client_request(request)
    mode = client_request.fields.get("action_mode")
    if mode in ("policy", "inverse_dynamics"):
        possible = "forward_dynamics, as the answer is a video alone; POST /v1/videos keeps actions"
        raise client_request.placed(InvalidRequest("action_mode", mode, possible, "unsupported"))
    limit = service.options.sync_deadline
    deadline = min(limit, client_request.server_fields.get(DEADLINE, limit))
    wait, key = service.jobs.estimated_wait(), request.headers.get("idempotency-key")
    if wait > deadline and not (key and service.journal.by_key(key)):
        message = f"about {wait:.0f} seconds of work wait, longer than {deadline:g}"
        raise ApiError(
            "estimated_wait_exceeds_deadline",
            message,
            param=client_request.paths.get(DEADLINE, DEADLINE)
            if DEADLINE in client_request.server_fields
            else None,
            headers={"Retry-After": retry_after(wait - deadline)},
        )
    job = await _create(service, request, client_request, "sync", deadline)
    job = await result(service, request, job)
    headers = {
        "X-Model": job.model,
        "X-Inference-Time-S": f"{job.timings['total']:.3f}",
        "X-Stage-Durations": json.dumps(job.timings, separators=(",", ":")),
        "X-Peak-Memory-MB": f"{job.peak_memory / 2**20:.1f}",
        "X-Seed": str(job.effective["seed"]),
    }
    try:
        return StoredFile(
            service.journal.folder(job.id) / CLIP, media_type="video/mp4", headers=headers
        )
    except FileNotFoundError:
        raise deleted(service, job) from None
    finally:
        if job.key is None:
            await forget(service, job)


async def result(service: Service, request: Request, job: VideoJob) -> VideoJob:
    """The job when it is done; cancelled if the client goes away and has no key to come back with.

    Raises:
        ApiError: why there is no result.
    """
    while not job.ended:
        job = await service.jobs.wait(job, WATCH_SECONDS)
        if await request.is_disconnected():
            if job.key is None:
                await asyncio.to_thread(service.jobs.delete, job.id)
            raise RequestFailed("cancelled", "the client went away")
    if job.status == FAILED:
        assert job.error is not None
        await forget(service, job)
        raise RequestFailed(job.error["code"], job.error["message"])
    return job


async def forget(service: Service, job: VideoJob) -> None:
    """Delete a job whose end its client is told. That this fails is no part of the answer."""
    try:
        await asyncio.to_thread(service.jobs.delete, job.id)
    except ApiError:
        pass  # somebody has done so
    except Cosmos3Error as error:
        logger.warning("%s cannot be deleted: %s", job.id, error)


def deleted(service: Service, job: VideoJob) -> RequestFailed:
    """Why a job that was completed has no files to answer with."""
    if not service.journal.holds(job.id):
        return RequestFailed("cancelled", f"{job.id} was deleted before it was sent")
    quota, seconds = service.options.storage_quota, service.options.file_ttl
    message = (
        f"the result was deleted before it was sent, as results are kept for --file-ttl {seconds:g} "
        f"seconds and while all have at most --storage-quota {quota} bytes: make a smaller one or raise these"
    )
    return RequestFailed("expired", message)


@router.get(
    "/v1/videos",
    summary="List videos",
    openapi_extra={"parameters": [LIMIT]},
    responses=responses(VideoPage),
)
async def page(
    request: Request, after: Cursor = None, limit: Limit = "20", order: Order = "desc"
) -> Response:
    """The videos of this storage, the newest first."""
    service = service_of(request)
    digits = limit.isascii() and limit.isdigit() and len(limit) <= 3
    if not digits or not 1 <= int(limit) <= 100:
        raise InvalidRequest("limit", limit, "an integer from 1 to 100")
    if order not in ("asc", "desc"):
        raise InvalidRequest("order", order, "asc or desc")
    jobs = service.journal.page(after=after, limit=int(limit) + 1, newest_first=order == "desc")
    if jobs is None:
        raise ApiError(
            "cursor_not_found", f"there is no video {after!r} to go on from", param="after"
        )
    # One that was deleted since the page was read is left out.
    found = [job if job.ended else service.jobs.find(job.id) for job in jobs[: int(limit)]]
    shown = [job for job in found if job is not None]
    found_page = VideoPage(
        data=shown,
        first_id=shown[0].id if shown else None,
        last_id=shown[-1].id if shown else None,
        has_more=len(jobs) > int(limit),
    )
    return JSONResponse(found_page.model_dump())


@router.get("/v1/videos/{video_id}", summary="Look up a video", responses=responses(VideoJob))
async def retrieve(request: Request, video_id: VideoId) -> Response:
    """A job as it is. A failed one is an ordinary answer, with its error in it."""
    service = service_of(request)
    job = service.jobs.get(video_id)
    headers = {} if job.ended else {"openai-poll-after-ms": "1000"}
    return JSONResponse(job.public(), headers=headers)


@router.delete(
    "/v1/videos/{video_id}", summary="Cancel or delete a video", responses=responses(VideoDeleted)
)
async def delete(request: Request, video_id: VideoId) -> Response:
    """Delete a video; if it is not done, stop making it."""
    await asyncio.to_thread(service_of(request).jobs.delete, video_id)
    return JSONResponse(VideoDeleted(id=video_id).model_dump())


@router.head("/v1/videos/{video_id}/content", include_in_schema=False)
@router.get(
    "/v1/videos/{video_id}/content",
    summary="Download a video",
    response_class=Response,
    responses=file_responses("video/mp4", "image/webp"),
)
async def content(request: Request, video_id: VideoId, variant: Variant = "video") -> Response:
    """The MP4, or a WebP of its first frame or of sixteen frames. Ranges are served."""
    service = service_of(request)
    job = service.jobs.get(video_id)
    if variant not in VARIANTS:
        raise InvalidRequest("variant", variant, f"one of {', '.join(VARIANTS)}")
    if job.status == FAILED:
        assert job.error is not None
        message = f"there is no video: {job.error['message']} ({job.error['code']})"
        raise ApiError("job_failed", message)
    if job.status != COMPLETED:
        raise ApiError("not_ready", f"the video is {job.status}", headers={"Retry-After": "1"})
    name, kind = VARIANTS[variant]
    suffix = Path(name).suffix
    return stored_file(service, job, name, media_type=kind, filename=f"{job.id}{suffix}")


def stored_file(service: Service, job: VideoJob, name: str, **options: Any) -> Response:
    """A file of a completed job.

    Raises:
        ApiError: it expired, or its job was deleted.
    """
    if not job.removed and (job.expires or 0) >= time.time():
        with suppress(FileNotFoundError):
            return StoredFile(service.journal.folder(job.id) / name, **options)
    service.jobs.get(job.id)  # deleted by its owner, which is another answer
    raise ApiError("expired", "the file was deleted, by its age or to make room")


@router.get(
    "/v1/videos/{video_id}/events",
    summary="Watch a video in the making",
    response_class=Response,
    responses=file_responses("text/event-stream", schema=TEXT),
)
async def events(request: Request, video_id: VideoId) -> Response:
    """Server-sent events: ``progress`` with the job whenever it has advanced, then its end.

    That is ``completed`` or ``failed`` with the job, ``deleted``, or ``error`` where its record cannot
    be read any more.

    Of a job with ``preview`` also ``preview``: ``image`` is a JPEG in base64 of what is coming after
    ``step`` steps. They are made as long as they take 2 % of the time at most.
    """
    service = service_of(request)
    job = service.jobs.get(video_id)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(
        _events(service, request, job), media_type="text/event-stream", headers=headers
    )


@router.post(
    "/v1/videos/{video_id}/remix",
    summary="Repeat a video with another prompt",
    openapi_extra=remix_request(KEY, PREFER),
    responses=responses(VideoJob),
)
async def remix(request: Request, video_id: VideoId) -> Response:
    """The same request with another prompt, and the same seed unless another is given."""
    service = service_of(request)
    source = service.jobs.get(video_id)
    body = await read_body(request, service.options)
    if source.effective.get("mode") != "text2video":
        possible = "of a video made from text alone; send its input again to POST /v1/videos"
        raise InvalidRequest("id", video_id, possible, "unsupported")
    client_request = await asyncio.to_thread(translate, body, VIDEO)
    if not client_request.fields.keys() & {"prompt", "prompt_token_ids"}:
        raise InvalidRequest("prompt", None, "the new text", "missing_required")
    client_request = replace(client_request, fields=remixed(source, client_request.fields))
    job = await _create(
        service,
        request,
        client_request,
        "video",
        service.options.request_deadline,
        remixed_from=source.id,
    )
    return await _accepted(service, request, job)


for _path in ("edits", "extensions", "characters"):

    @router.post(f"/v1/videos/{_path}", include_in_schema=False)
    async def not_offered(request: Request) -> Response:
        """Not offered."""
        message = "this is not offered; POST /v1/videos with input_reference continues a clip"
        raise ApiError("not_implemented", message)


async def _client_request(request: Request) -> ClientRequest:
    body = await read_body(request, service_of(request).options)
    return await asyncio.to_thread(translate, body, VIDEO)


async def _create(
    service: Service, request: Request, client_request: ClientRequest, kind: str, deadline: float,
    remixed_from: str | None = None,
) -> VideoJob:  # fmt: skip
    key = request.headers.get("idempotency-key") or None
    return await submit(
        service,
        client_request,
        kind,
        deadline,
        key=key,
        retried=kind == "video" and request.headers.get("x-stainless-retry-count", "0") != "0",
        remixed_from=remixed_from,
        left=request.is_disconnected if kind == "sync" and key is None else None,
    )


async def submit(
    service: Service, client_request: ClientRequest, kind: str, deadline: float, *,
    key: str | None = None, retried: bool = False, remixed_from: str | None = None,
    left: Callable[[], Awaitable[bool]] | None = None,
) -> VideoJob:  # fmt: skip
    """The job of a request, whose media are read."""
    local = local_files(client_request, service.options)
    file_names = {
        str(local.fields[name]): str(client_request.fields[name])
        for name in FILE_FIELDS & client_request.fields.keys()
    }
    async with media_files(client_request, service.options, service.journal.inputs) as (
        media,
        names,
    ):
        for name, file in media.items():
            file_names[str(file)] = called(client_request.references[names.get(name, name)])
        places = {role: client_request.paths.get(name, name) for role, name in names.items()}
        return await service.admission.create(
            Submission(
                kind=kind,
                request=replace(local, paths={**INPUTS, **client_request.paths, **places}),
                media=media,
                deadline=deadline,
                key=key,
                retried=retried,
                remixed_from=remixed_from,
                file_names=file_names,
                left=left,
            )
        )


async def _accepted(service: Service, request: Request, job: VideoJob) -> Response:
    """The answer with a job: at once, or when the client prefers it."""
    headers = {}
    seconds = _preferred_wait(request)
    if seconds is not None:
        end = time.monotonic() + seconds
        while not job.ended and (left := end - time.monotonic()) > 0:
            job = await service.jobs.wait(job, min(left, WATCH_SECONDS))
            if await request.is_disconnected():
                break
        headers["Preference-Applied"] = f"wait={seconds:g}"
    return JSONResponse(job.public(), headers=headers)


def remixed(source: VideoJob, fields: Mapping[str, Any]) -> dict[str, Any]:
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


async def _events(service: Service, request: Request, job: VideoJob) -> AsyncIterator[str]:
    last: tuple[Any, ...] = ()
    shown: Preview | None = None
    quiet = time.monotonic()
    while True:
        now = (job.status, job.phase, job.step, job.progress, job.position)
        if job.ended:
            yield _event(job.status, job.public())
            return
        if now != last:
            last, quiet = now, time.monotonic()
            yield _event("progress", job.public())
        elif time.monotonic() - quiet > HEARTBEAT_SECONDS:
            quiet = time.monotonic()
            yield ": still here\n\n"
        preview = service.jobs.preview(job.id)
        if preview is not None and preview is not shown:
            shown = preview
            image = base64.b64encode(preview.jpeg).decode()
            yield _event("preview", {"id": job.id, "step": preview.step, "image": image})
        await asyncio.sleep(POLL_SECONDS)
        if await request.is_disconnected():
            return
        try:
            job = service.jobs.get(job.id)
        except (StorageLost, DiskFull):  # for a while, or the job may end without it
            continue
        except ApiError:
            yield _event("deleted", VideoDeleted(id=job.id).model_dump())
            return
        except UnreadableRecord as error:
            yield _event("error", envelope(error))
            return


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"
