"""What the OpenAPI page says of responses: videos, pages, pictures, models, errors, and parameters."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Path, Query
from pydantic import Field, WithJsonSchema

from vllm_cosmos3.server.http.api_errors import STATUS
from vllm_cosmos3.server.jobs.video_job import ApiModel, Details, Usage, VideoJob

Schema = dict[str, Any]


class VideoPage(ApiModel):
    """Videos in the order of creation."""

    object: Literal["list"] = "list"
    data: list[VideoJob]
    first_id: str | None = Field(description="of this page; null if it is empty")
    last_id: str | None = Field(
        description="of this page: the next one's ``after``; null if it is empty"
    )
    has_more: bool = Field(description="whether there is a next one")


class VideoDeleted(ApiModel):
    """What was deleted."""

    id: str = Field(description="of the video")
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


class Picture(ApiModel):
    """A picture."""

    b64_json: str | None = Field(description="the file in base64, unless response_format is url")
    url: str | None = Field(
        description="where the file is, with response_format=url; like videos it asks for a key, is kept"
        " for --file-ttl seconds, and counts towards --storage-quota"
    )
    revised_prompt: str | None = Field(description="the prompt that the reasoner wrote")


class Pictures(ApiModel):
    """Pictures; response_format=file answers with the file itself, or a ZIP of several."""

    created: int = Field(description="[seconds since 1970]")
    data: list[Picture]
    output_format: Literal["png", "jpeg", "webp"]
    size: str = Field(description="WIDTHxHEIGHT [pixels]")
    usage: Usage
    cosmos3: Details


class Surfaces(ApiModel):
    """Where the weights of each surface are."""

    surfaces: dict[str, str] = Field(description="ready or sleeping, for generator and reasoner")
    seconds: float = Field(description="that it took")


class Message(ApiModel):
    """That it is done."""

    message: str


class Models(ApiModel):
    """The served models, one entry for each name; its block ``cosmos3`` says what it can do."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]


_CODES = sorted({*STATUS, "invalid_value", "invalid_type", "missing_required", "unknown_parameter", "conflict", "unsupported", "unsupported_by_model"} - {"not_implemented"})  # fmt: skip


class ErrorFacts(ApiModel):
    """What is wrong."""

    message: str = Field(description="one sentence: the field, its value, and what is possible")
    type: str = Field(description="the class of the status, in OpenAI's words")
    param: str | None = Field(description="the field as it was written, such as extra_params.seed")
    code: str = Field(description=f"a stable word for programs: {', '.join(_CODES)}, ...")


class ErrorEnvelope(ApiModel):
    """The shape of every error."""

    error: ErrorFacts


VideoId = Annotated[str, Path(description="id of the video, as POST /v1/videos told it")]
ImageId = Annotated[str, Path(description="id of the pictures, as their URLs have it")]
PictureName = Annotated[str, Path(description="such as 0.png")]
ModelName = Annotated[str, Path(description="one of the served names")]
Cursor = Annotated[str | None, Query(description="list the videos after the one with this id")]
Limit = Annotated[str, Query(include_in_schema=False)]  # read as text, for errors of our own
LIMIT: Schema = {
    "name": "limit",
    "in": "query",
    "description": "videos on a page: 1 to 100",
    "schema": {"type": "integer", "minimum": 1, "maximum": 100, "default": 20},
}
Order = Annotated[
    str,
    Query(description="asc: the oldest first; desc: the newest first"),
    WithJsonSchema({"type": "string", "enum": ["asc", "desc"]}),
]
Variant = Annotated[
    str,
    Query(
        description="video: the MP4; thumbnail: a WebP of the first frame; spritesheet: a WebP of sixteen"
    ),
    WithJsonSchema({"type": "string", "enum": ["video", "thumbnail", "spritesheet"]}),
]
BYTES: Schema = {"type": "string", "format": "binary"}
TEXT: Schema = {"type": "string"}


def responses(model: Any) -> dict[int | str, Any]:
    """``responses`` of a route that answers with JSON of this model."""
    return {200: {"description": "Done", "model": model}, **_ANY_ERROR}


def file_responses(*media_types: str, schema: Schema = BYTES) -> dict[int | str, Any]:
    """``responses`` of a route that answers with files; it needs ``response_class=Response``."""
    content = {media_type: {"schema": schema} for media_type in media_types}
    return {200: {"description": "Done", "content": content}, **_ANY_ERROR}


def errors(status: int, description: str) -> dict[int | str, Any]:
    """``responses`` of a route that always refuses."""
    return {status: {"description": description, "model": ErrorEnvelope}}


_ANY_ERROR: dict[int | str, Any] = {"default": {"description": "Any error", "model": ErrorEnvelope}}
