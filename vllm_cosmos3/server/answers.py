"""What the OpenAPI page says of answers: the job, the error, and the questions of a page of jobs."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Query

from vllm_cosmos3.server.errors import STATUS

Schema = dict[str, Any]


def _field(kind: str, description: str, **more: Any) -> Schema:
    return {"type": kind, "description": description, **more}


def _object(description: str, **properties: Schema) -> Schema:
    return {"type": "object", "description": description, "properties": properties}


ERROR = _object(
    "why there is no result",
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
    upsampled_prompt=_field("string", "the prompt that the reasoner wrote"),
    continued_from=_field("string", "the video that this one goes on from"),
    queue=_object(
        "while it waits",
        position=_field("integer", "requests before it"),
        eta_s=_field("number", "until it is done [seconds]; null while nothing is known"),
    ),
    phase=_field("string", "queued, encode, denoise, decode or done"),
    step=_field("integer", "denoising steps done", minimum=0),
    num_steps=_field("integer", "denoising steps of the whole"),
    eta_s=_field("number", "until the phase is done [seconds]"),
    timings_s=_field("object", "of the phases [seconds]: queue, text, vae_encode, denoise, per_step, vae_decode, sound, to_cpu, encode (what of the files was not written while decoding), total"),
    peak_memory_mb=_field("number", "most memory on a device [MiB]"),
    seed=_field("integer", "of the initial noise"),
    guardrails=_field("object", "what was asked for, the state, and what was checked"),
)  # fmt: skip
JOB = _object(
    "a video, made or in the making",
    id=_field("string", "its name in all other calls"),
    object=_field("string", "always video"),
    model=_field("string", "the served name"),
    status=_field("string", "queued, in_progress, completed or failed", enum=["queued", "in_progress", "completed", "failed"]),
    progress=_field("integer", "of the whole [percent]", minimum=0, maximum=100),
    created_at=_field("integer", "[seconds since 1970]"),
    completed_at=_field("integer", "[seconds since 1970]"),
    expires_at=_field("integer", "when the file is deleted [seconds since 1970]"),
    prompt=_field("string", "as it was given"),
    seconds=_field("string", "length of the video [seconds]"),
    size=_field("string", "WIDTHxHEIGHT [pixels]"),
    quality=_field("string", "always default"),
    remixed_from_video_id=_field("string", "the video whose request this one repeats"),
    error=ERROR,
    media_type=_field("string", "always video/mp4"),
    file_name=_field("string", "when it is completed"),
    fps=_field("number", "[frames per second]"),
    num_frames=_field("integer", "of the video"),
    duration_s=_field("number", "of the video [seconds]"),
    inference_time_s=_field("number", "from acceptance to the end [seconds]"),
    stage_durations=_field("object", "as cosmos3.timings_s"),
    peak_memory_mb=_field("number", "most memory on a device [MiB]"),
    action=_field("object", "the actions of policy and inverse_dynamics: rows, their embodiment and units"),
    usage=_object(
        "what it took",
        frames=_field("integer", "made"),
        output_seconds=_field("number", "[seconds]"),
        steps=_field("integer", "of denoising"),
        gpu_seconds=_field("number", "on the ranks, times their number [seconds]"),
    ),
    cosmos3=DETAILS,
)  # fmt: skip
PAGE = _object(
    "videos in the order of creation",
    object=_field("string", "always list"),
    data=_field("array", "the videos", items=JOB),
    first_id=_field("string", "of this page"),
    last_id=_field("string", "of this page: the next one's ``after``"),
    has_more=_field("boolean", "whether there is a next one"),
)
PICTURES = _object(
    "pictures",
    created=_field("integer", "[seconds since 1970]"),
    data=_field("array", "one entry each, with b64_json", items={"type": "object"}),
    output_format=_field("string", "png, jpeg or webp"),
    size=_field("string", "WIDTHxHEIGHT [pixels]"),
    usage=_field("object", "as of a video"),
    cosmos3=DETAILS,
)
_CODES = sorted({*STATUS, "invalid_value", "invalid_type", "missing_required", "unknown_parameter", "conflict", "unsupported", "unsupported_by_model"} - {"not_implemented"})  # fmt: skip
FAILURE = _object(
    "the shape of every error",
    error=_object(
        "what is wrong",
        message=_field("string", "one sentence: the field, its value, and what is possible"),
        type=_field("string", "the class of the status, in OpenAI's words"),
        param=_field("string", "the field as it was written, such as extra_params.seed"),
        code=_field("string", f"a stable word for programs: {', '.join(_CODES)}, ..."),
    ),
)
Cursor = Annotated[str | None, Query(description="go on after the video of this id")]
Limit = Annotated[str, Query(description="videos on a page: 1 to 100")]
Order = Annotated[str, Query(description="asc: the oldest first; desc: the newest first")]
Variant = Annotated[str, Query(description="video: the MP4; thumbnail: a WebP of the first frame; spritesheet: a WebP of sixteen")]  # fmt: skip


def answers(schema: Schema | None = None, kind: str = "application/json") -> dict[int | str, Any]:
    """``responses`` of a route: what it answers with, and the error."""
    good: Schema = {kind: {"schema": schema or {"type": "string", "format": "binary"}}}
    return {
        200: {"description": "Done", "content": good},
        "default": {
            "description": "Any error",
            "content": {"application/json": {"schema": FAILURE}},
        },
    }
