"""What the OpenAPI page says of answers: the job, the error, and the questions of a page of jobs."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Path, Query
from pydantic import WithJsonSchema

from vllm_cosmos3.server.http.errors import STATUS

Schema = dict[str, Any]


def _field(kind: str, description: str, **more: Any) -> Schema:
    return {"type": kind, "description": description, **more}


def _object(description: str, **properties: Schema) -> Schema:
    """An object that has all of these properties and no others."""
    return {
        "type": "object",
        "description": description,
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _null(schema: Schema) -> Schema:
    """The same, or null."""
    return {**schema, "type": [schema["type"], "null"]}


def _maybe(kind: str, description: str, **more: Any) -> Schema:
    return _null(_field(kind, description, **more))


_NUMBERS = {"additionalProperties": {"type": "number"}}
ERROR = _object(
    "why there is no result; null unless it failed",
    code=_field("string", "a stable word for programs, such as out_of_memory"),
    message=_field("string", "one sentence"),
    type=_field("null", "always null"),
    param=_field("null", "always null"),
)
DETAILS = _object(
    "what OpenAI's object has no place for",
    mode=_field("string", "what the request came to, such as image2video"),
    effective=_field("object", "every field as it was used, defaults included"),
    sources=_field("object", "of each effective field: request, checkpoint, reasoner, or default (of the mode or the field, or what follows from others)"),
    warnings=_field("array", "what was rounded, cut or has no effect", items={"type": "string"}),
    upsampled_prompt=_maybe("string", "the prompt that the reasoner wrote"),
    continued_from=_maybe("string", "the video that this one goes on from"),
    queue=_null(_object(
        "while it waits, else null",
        position=_maybe("integer", "requests before it"),
        eta_s=_maybe("number", "until it is done [seconds]; null while nothing is known"),
    )),
    phase=_field("string", "queued, encode, denoise, decode or done"),
    step=_field("integer", "denoising steps done", minimum=0),
    num_steps=_field("integer", "denoising steps of the whole"),
    eta_s=_maybe("number", "until the phase is done [seconds]; null while nothing is known"),
    timings_s=_field("object", "of the phases [seconds]: queue, text, vae_encode, denoise, per_step, vae_decode, sound, to_cpu, encode (what of the files was not written while decoding), total", **_NUMBERS),
    peak_memory_mb=_field("number", "most memory on a device [MiB]"),
    seed=_field("integer", "of the initial noise"),
    guardrails=_field("object", "what was asked for, the state, and what was checked"),
)  # fmt: skip
USAGE = _object(
    "what it took; null until it is completed",
    frames=_field("integer", "made"),
    output_seconds=_field("number", "[seconds]"),
    steps=_field("integer", "of denoising"),
    gpu_seconds=_field("number", "on the ranks, times their number [seconds]"),
)
JOB = _object(
    "a video, made or in the making",
    id=_field("string", "its name in all other calls"),
    object=_field("string", "always video", enum=["video"]),
    model=_field("string", "the served name"),
    status=_field("string", "queued, in_progress, completed or failed", enum=["queued", "in_progress", "completed", "failed"]),
    progress=_field("integer", "of the whole [percent]", minimum=0, maximum=100),
    created_at=_field("integer", "[seconds since 1970]"),
    completed_at=_maybe("integer", "when it was completed or failed [seconds since 1970]"),
    expires_at=_maybe("integer", "when the file of a completed one is deleted [seconds since 1970]"),
    prompt=_field("string", "as it was given; empty if it was token ids"),
    seconds=_field("string", "length of the video [seconds]"),
    size=_field("string", "WIDTHxHEIGHT [pixels]"),
    quality=_field("string", "always default"),
    remixed_from_video_id=_maybe("string", "the video whose request this one repeats"),
    error=_null(ERROR),
    media_type=_field("string", "always video/mp4"),
    file_name=_maybe("string", "when it is completed"),
    fps=_field("number", "[frames per second]"),
    num_frames=_field("integer", "of the video"),
    duration_s=_field("number", "of the video [seconds]"),
    inference_time_s=_maybe("number", "from acceptance to the end [seconds]; when it is completed"),
    stage_durations=_field("object", "as cosmos3.timings_s", **_NUMBERS),
    peak_memory_mb=_field("number", "most memory on a device [MiB]"),
    action=_maybe("object", "the actions of policy and inverse_dynamics: rows, their embodiment and units"),
    usage=_null(USAGE),
    cosmos3=DETAILS,
)  # fmt: skip
PAGE = _object(
    "videos in the order of creation",
    object=_field("string", "always list", enum=["list"]),
    data=_field("array", "the videos", items=JOB),
    first_id=_maybe("string", "of this page; null if it is empty"),
    last_id=_maybe("string", "of this page: the next one's ``after``; null if it is empty"),
    has_more=_field("boolean", "whether there is a next one"),
)
DELETED = _object(
    "what was deleted",
    id=_field("string", "of the video"),
    object=_field("string", "always video.deleted", enum=["video.deleted"]),
    deleted=_field("boolean", "always true"),
)
PICTURE = _object(
    "a picture",
    b64_json=_field("string", "the file in base64"),
    url=_field("null", "always null"),
    revised_prompt=_maybe("string", "the prompt that the reasoner wrote"),
)
PICTURES = _object(
    "pictures; response_format=file answers with the file itself, or a ZIP of several",
    created=_field("integer", "[seconds since 1970]"),
    data=_field("array", "one entry each", items=PICTURE),
    output_format=_field("string", "png, jpeg or webp"),
    size=_field("string", "WIDTHxHEIGHT [pixels]"),
    usage=USAGE,
    cosmos3=DETAILS,
)
MODEL = _field("object", "a served model; ``cosmos3`` says what it can do")
MODELS = _object(
    "the served models",
    object=_field("string", "always list", enum=["list"]),
    data=_field("array", "one entry for each name", items=MODEL),
)
_CODES = sorted({*STATUS, "invalid_value", "invalid_type", "missing_required", "unknown_parameter", "conflict", "unsupported", "unsupported_by_model"} - {"not_implemented"})  # fmt: skip
FAILURE = _object(
    "the shape of every error",
    error=_object(
        "what is wrong",
        message=_field("string", "one sentence: the field, its value, and what is possible"),
        type=_field("string", "the class of the status, in OpenAI's words"),
        param=_maybe("string", "the field as it was written, such as extra_params.seed"),
        code=_field("string", f"a stable word for programs: {', '.join(_CODES)}, ..."),
    ),
)
VideoId = Annotated[str, Path(description="id of the video, as POST /v1/videos told it")]
ModelName = Annotated[str, Path(description="one of the served names")]
Cursor = Annotated[str | None, Query(description="go on after the video of this id")]
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


def answers(schema: Schema, *kinds: str) -> dict[int | str, Any]:
    """``responses`` of a route: what it answers with, in JSON or as these types, and the error.

    A route that answers with something else than JSON needs ``response_class=Response`` beside it.
    """
    content = {kind: {"schema": schema} for kind in kinds or ("application/json",)}
    return {200: {"description": "Done", "content": content}, "default": _failure("Any error")}


def refusals(status: int, description: str) -> dict[int | str, Any]:
    """``responses`` of a route that always refuses."""
    return {status: _failure(description)}


def _failure(description: str) -> Schema:
    return {
        "description": description,
        "content": {"application/json": {"schema": FAILURE}},
    }
