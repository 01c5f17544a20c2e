"""The routes of /v1/images."""

from __future__ import annotations

import asyncio
import base64
import io
import zipfile
from pathlib import Path
from typing import Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from vllm_cosmos3 import media
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.server.http.api_errors import ApiError
from vllm_cosmos3.server.http.body import read_body
from vllm_cosmos3.server.http.request_fields import IMAGE, translate
from vllm_cosmos3.server.jobs.admission import Submission
from vllm_cosmos3.server.jobs.video_job import Usage
from vllm_cosmos3.server.openapi.requests import image_request
from vllm_cosmos3.server.openapi.responses import Picture, Pictures, errors, responses
from vllm_cosmos3.server.routes.route import Route, service_of
from vllm_cosmos3.server.routes.videos import result

router = APIRouter(route_class=Route, tags=["Cosmos3 images"])
Format = Literal["png", "jpeg", "webp"]
FORMATS: dict[str, Format] = {"png": "png", "jpeg": "jpeg", "jpg": "jpeg", "webp": "webp"}


@router.post("/v1/images/generations", openapi_extra=image_request(), responses=responses(Pictures))
async def generate(request: Request) -> Response:
    """Make pictures from text and answer with them. A client that goes away cancels them."""
    service = service_of(request)
    body = await read_body(request, service.options, ("application/json",))
    client_request = await asyncio.to_thread(translate, body, IMAGE)
    if client_request.references:
        name = next(client_request.paths.get(name, name) for name in client_request.references)
        possible = "left out: pictures are made from text; POST /v1/videos takes a first frame"
        raise InvalidRequest(name, "given", possible, "unsupported")
    shape = client_request.server_fields.get("response_format", "b64_json")
    if shape == "url":
        raise InvalidRequest("response_format", shape, "b64_json or file", "unsupported")
    form = FORMATS[client_request.server_fields.get("output_format", "png")]
    quality = client_request.server_fields.get("output_compression", 95)
    job = await service.admission.create(
        Submission(kind="image", request=client_request, deadline=service.options.sync_deadline)
    )
    job = await result(service, request, job)
    folder = service.journal.folder(job.id)
    try:
        pictures = [
            await asyncio.to_thread(_encoded, folder / name, form, quality) for name in job.files
        ]
    finally:
        service.jobs.delete(job.id)
    if shape == "file":
        return _as_file(job.id, pictures, form)
    answer = Pictures(
        created=job.created_at,
        data=[
            Picture(
                b64_json=base64.b64encode(picture).decode(),
                url=None,
                revised_prompt=job.upsampled_prompt,
            )
            for picture in pictures
        ],
        output_format=form,
        size=job.effective["size"],
        usage=Usage.model_validate(job.usage),
        cosmos3=job.cosmos3,
    )
    return JSONResponse(answer.model_dump())


@router.post(
    "/v1/images/edits",
    status_code=501,
    response_class=Response,
    responses=errors(501, "Not offered"),
)
async def edit(request: Request) -> Response:
    """Not offered: no Cosmos 3 checkpoint edits pictures."""
    message = "pictures cannot be edited; POST /v1/videos with input_reference animates one"
    raise ApiError("not_implemented", message)


@router.post(
    "/v1/images/variations",
    status_code=501,
    response_class=Response,
    responses=errors(501, "Not offered"),
)
async def vary(request: Request) -> Response:
    """Not offered."""
    message = "there are no variations; POST /v1/images/generations with n and seed makes several"
    raise ApiError("not_implemented", message)


def _encoded(file: Path, form: Format, quality: int) -> bytes:
    if form == "png":
        return file.read_bytes()
    return media.encode_image(media.read_image(file), form, quality=quality)


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
