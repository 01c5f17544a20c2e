"""The routes of /v1/images."""

from __future__ import annotations

import asyncio
import base64
import io
import re
import zipfile
from pathlib import Path
from typing import Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from vllm_cosmos3 import media
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.server.http.api_errors import ApiError
from vllm_cosmos3.server.http.body import JSON, MULTIPART, read_body
from vllm_cosmos3.server.http.request_fields import IMAGE, SOUND, ClientRequest, translate
from vllm_cosmos3.server.jobs.journal import Journal
from vllm_cosmos3.server.jobs.service import Service
from vllm_cosmos3.server.jobs.video_job import COMPLETED, Usage, VideoJob
from vllm_cosmos3.server.openapi.requests import edit_request, image_request
from vllm_cosmos3.server.openapi.responses import (
    ImageId,
    Picture,
    PictureName,
    Pictures,
    file_responses,
    responses,
)
from vllm_cosmos3.server.routes.route import Route, service_of
from vllm_cosmos3.server.routes.videos import deleted, forget, result, stored_file, submit
from vllm_cosmos3.server.storage import bytes_in

router = APIRouter(route_class=Route, tags=["Cosmos3 images"])
Format = Literal["png", "jpeg", "webp"]
NOT_EDITED = ("video", "video_reference", SOUND)
FORMATS: dict[str, Format] = {"png": "png", "jpeg": "jpeg", "jpg": "jpeg", "webp": "webp"}


@router.post(
    "/v1/images/generations",
    summary="Make images",
    openapi_extra=image_request(),
    responses=responses(Pictures),
)
async def generate(request: Request) -> Response:
    """Make pictures from text and answer with them. A client that goes away cancels them."""
    service = service_of(request)
    body = await read_body(request, service.options, ("application/json",))
    client_request = await asyncio.to_thread(translate, body, IMAGE)
    if client_request.references:
        name = next(client_request.paths.get(name, name) for name in client_request.references)
        possible = "left out: pictures are made from text; POST /v1/images/edits changes one, POST /v1/videos takes a first frame"
        raise InvalidRequest(name, "given", possible, "unsupported")
    return await _made(service, request, client_request)


@router.post(
    "/v1/images/edits",
    summary="Edit an image",
    openapi_extra=edit_request(),
    responses=responses(Pictures),
)
async def edit(request: Request) -> Response:
    """Make pictures from a picture and an instruction and answer with them."""
    service = service_of(request)
    body = await read_body(request, service.options, (JSON, MULTIPART))
    client_request = await asyncio.to_thread(translate, body, IMAGE)
    given = {name: client_request.paths.get(name, name) for name in client_request.references}
    if not given:
        raise InvalidRequest("image", None, "the picture to edit", "missing_required")
    if other := next((path for name, path in given.items() if name in NOT_EDITED), None):
        raise InvalidRequest(
            other, "given", "left out: the picture is given as image", "unsupported"
        )
    return await _made(service, request, client_request)


async def _made(service: Service, request: Request, client_request: ClientRequest) -> Response:
    """The answer with the pictures of a request."""
    shape = client_request.server_fields.get("response_format", "b64_json")
    form = FORMATS[client_request.server_fields.get("output_format", "png")]
    quality = client_request.server_fields.get("output_compression", 95)
    deadline, left = service.options.sync_deadline, request.is_disconnected
    job = await submit(service, client_request, "image", deadline, left=left)
    job = await result(service, request, job)
    if shape == "url":
        try:
            names = await asyncio.to_thread(_kept, service.journal, job, form, quality)
        except FileNotFoundError:
            raise deleted(service, job) from None
        urls = [str(request.url_for("picture", image_id=job.id, name=name)) for name in names]
        return _pictures(job, form, [{"b64_json": None, "url": url} for url in urls])
    folder = service.journal.folder(job.id)
    try:
        pictures = [
            await asyncio.to_thread(_encoded, folder / name, form, quality) for name in job.files
        ]
    except FileNotFoundError:
        raise deleted(service, job) from None
    finally:
        await forget(service, job)
    if shape == "file":
        return _as_file(job.id, pictures, form)
    texts = [base64.b64encode(picture).decode() for picture in pictures]
    return _pictures(job, form, [{"b64_json": text, "url": None} for text in texts])


def _pictures(job: VideoJob, form: Format, places: list[dict[str, str | None]]) -> Response:
    """The answer with pictures, each as text or as a URL."""
    answer = Pictures(
        created=job.created_at,
        data=[
            Picture.model_validate({**each, "revised_prompt": job.upsampled_prompt})
            for each in places
        ],
        output_format=form,
        size=job.effective["size"],
        usage=Usage.model_validate(job.usage),
        cosmos3=job.cosmos3,
    )
    return JSONResponse(answer.model_dump())


@router.head("/v1/images/{image_id}/{name}", include_in_schema=False)
@router.get(
    "/v1/images/{image_id}/{name}",
    summary="Download an image",
    response_class=Response,
    responses=file_responses("image/png", "image/jpeg", "image/webp"),
)
async def picture(request: Request, image_id: ImageId, name: PictureName) -> Response:
    """A picture that was asked for with response_format=url."""
    service = service_of(request)
    job = service.jobs.find(image_id)
    known = re.fullmatch(rf"\d+\.({'|'.join({*FORMATS.values()})})", name, re.ASCII)
    if job is None or job.kind != "image" or job.status != COMPLETED or known is None:
        raise ApiError("not_found", f"there is no picture {f'{image_id}/{name}'!r}", param="id")
    return stored_file(service, job, name, media_type=f"image/{known[1]}")


@router.post("/v1/images/variations", include_in_schema=False)
async def vary(request: Request) -> Response:
    """Not offered."""
    message = "there are no variations; POST /v1/images/generations with n and seed makes several"
    raise ApiError("not_implemented", message)


def _kept(journal: Journal, job: VideoJob, form: Format, quality: int) -> list[str]:
    """Names of the pictures in this format, which stay with their job until they expire."""
    folder, names = journal.folder(job.id), []
    for name in job.files:
        names.append(f"{Path(name).stem}.{form}")
        if names[-1] != name:
            (folder / names[-1]).write_bytes(_encoded(folder / name, form, quality))
    job.bytes = bytes_in(folder)
    journal.save(job)
    return names


def _encoded(file: Path, form: Format, quality: int) -> bytes:
    made = file.read_bytes()
    if form == "png":
        return made
    return media.encode_image(media.read_image(made), form, quality=quality)


def _as_file(name: str, pictures: list[bytes], form: str) -> Response:
    if len(pictures) == 1:
        headers = {"Content-Disposition": f'attachment; filename="{name}.{form}"'}
        return Response(pictures[0], media_type=f"image/{form}", headers=headers)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for index, picture in enumerate(pictures):
            archive.writestr(f"{index}.{form}", picture)
    headers = {"Content-Disposition": f'attachment; filename="{name}.zip"'}
    return Response(packed.getvalue(), media_type="application/zip", headers=headers)
