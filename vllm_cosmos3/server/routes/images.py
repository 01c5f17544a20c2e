"""The routes of /v1/images."""

from __future__ import annotations

import asyncio
import base64
import io
import zipfile
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from vllm_cosmos3 import media
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.server.http.body import read_body
from vllm_cosmos3.server.http.errors import ApiError
from vllm_cosmos3.server.http.request_fields import IMAGE, translate
from vllm_cosmos3.server.jobs.job_object import details
from vllm_cosmos3.server.openapi.requests import image_request
from vllm_cosmos3.server.openapi.responses import PICTURES, answers, refusals
from vllm_cosmos3.server.routes.route import Route, service
from vllm_cosmos3.server.routes.videos import result

router = APIRouter(route_class=Route, tags=["Cosmos3 images"])
Format = Literal["png", "jpeg", "webp"]
FORMATS: dict[str, Format] = {"png": "png", "jpeg": "jpeg", "jpg": "jpeg", "webp": "webp"}


@router.post("/v1/images/generations", openapi_extra=image_request(), responses=answers(PICTURES))
async def generate(request: Request) -> Response:
    """Make pictures from text and answer with them. A client that goes away cancels them."""
    at = service(request)
    body = await read_body(request, at.options, ("application/json",))
    asked = await asyncio.to_thread(translate, body, IMAGE)
    if asked.references:
        name = next(asked.paths.get(name, name) for name in asked.references)
        possible = "left out: pictures are made from text; POST /v1/videos takes a first frame"
        raise InvalidRequest(name, "given", possible, "unsupported")
    shape = asked.server.get("response_format", "b64_json")
    if shape == "url":
        raise InvalidRequest("response_format", shape, "b64_json or file", "unsupported")
    form = FORMATS[asked.server.get("output_format", "png")]
    quality = asked.server.get("output_compression", 95)
    job = await at.create("image", asked, {}, deadline=at.options.sync_deadline)
    job = await result(at, request, job)
    folder = at.journal.folder(job.id)
    try:
        pictures = [
            await asyncio.to_thread(_encoded, folder / name, form, quality) for name in job.files
        ]
    finally:
        at.delete(job.id)
    if shape == "file":
        return _as_file(job.id, pictures, form)
    data = [
        {
            "b64_json": base64.b64encode(picture).decode(),
            "url": None,
            "revised_prompt": job.upsampled_prompt,
        }
        for picture in pictures
    ]
    answer: dict[str, Any] = {
        "created": int(job.created),
        "data": data,
        "output_format": form,
        "size": job.effective["size"],
        "usage": job.usage,
        "cosmos3": details(job, at),
    }
    return JSONResponse(answer)


@router.post(
    "/v1/images/edits",
    status_code=501,
    response_class=Response,
    responses=refusals(501, "Not offered"),
)
async def edit(request: Request) -> Response:
    """Not offered: no Cosmos 3 checkpoint edits pictures."""
    message = "pictures cannot be edited; POST /v1/videos with input_reference animates one"
    raise ApiError("not_implemented", message)


@router.post(
    "/v1/images/variations",
    status_code=501,
    response_class=Response,
    responses=refusals(501, "Not offered"),
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
