"""Continuation of a finished video: its last frame is the first, and its file comes before.

The new job's video is the whole: the frames of the finished one as they are, then the new ones
without the frame that both share.
"""

from __future__ import annotations

import io
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.request.plan import Plan
from vllm_cosmos3.server.http.api_errors import ApiError
from vllm_cosmos3.server.http.request_fields import ClientRequest
from vllm_cosmos3.server.jobs.job_files import BEFORE, CLIP, LAST
from vllm_cosmos3.server.jobs.journal import Journal
from vllm_cosmos3.server.jobs.live_jobs import LiveJobs
from vllm_cosmos3.server.jobs.video_job import COMPLETED, FAILED, VideoJob

FIELD = "continue_from"
SCALE = 16  # pixels of the video to one latent


def source_of(request: ClientRequest, jobs: LiveJobs) -> VideoJob | None:
    """The job that a request goes on from; None if it starts anew.

    Raises:
        ApiError: there is no such video, not yet, or no more.
    """
    name = request.server_fields.get(FIELD)
    if name is None:
        return None
    try:
        job = jobs.get(name)
    except ApiError:
        raise ApiError(
            "not_found", f"there is no video {name!r} to go on from", param=FIELD
        ) from None
    if job.status == FAILED:
        raise ApiError("job_failed", f"{FIELD} names a video that failed", param=FIELD)
    if job.status != COMPLETED:
        message = f"{FIELD} names a video that is {job.status}, must be a completed one"
        raise ApiError("not_ready", message, param=FIELD, headers={"Retry-After": "1"})
    folder = jobs.journal.folder(job.id)
    files = all((folder / file).is_file() for file in (CLIP, LAST))
    if job.removed or (job.expires or 0) < time.time() or not files:
        raise _expired()
    return job


def continue_from(
    request: ClientRequest, media: Mapping[str, Any], before: VideoJob, journal: Journal
) -> tuple[ClientRequest, dict[str, Any]]:
    """The request with the last frame as its first, in the size and at the rate of the video.

    The frame is read at once, as the video may be deleted while the new one is planned.

    Raises:
        InvalidRequest: it has another input, or makes sound.
        ApiError: the video has been deleted.
    """
    for name in ("image", "video", "sound_path"):
        if name in media:
            possible = f"left out, as {FIELD} is given"
            raise InvalidRequest(name, "given", possible, "conflict")
    if sound := request.fields.get("generate_sound"):
        possible = f"false: the sound would not go on from that of {FIELD}"
        raise InvalidRequest("generate_sound", sound, possible, "unsupported_combination")
    picture = journal.folder(before.id) / LAST
    fields = dict(request.fields)
    if not fields.keys() & {"size", "width", "height", "action_mode"}:
        fields["size"] = _size(picture)
    fields.setdefault("fps", before.effective["fps"])
    return replace(request, fields=fields), {**media, "image": _read(picture)}


def prepare(job: VideoJob, plan: Plan, before: VideoJob, journal: Journal) -> None:
    """Put the finished video where the new one is written, so that it may be deleted meanwhile.

    Raises:
        InvalidRequest: the new frames have another size or rate than those before them, or there
            are none.
        ApiError: the finished video was deleted while the new one was planned.
        OSError: there is no room for it; nothing of it is left.
    """
    source, folder = journal.folder(before.id), journal.folder(job.id)
    shape = [stream.shape for stream in plan.streams if stream.name == "vision"][-1]
    if shape[2] == 1:
        possible = f"at least 4 with {FIELD}: fewer add no frame to the video"
        raise InvalidRequest("action_chunk_size", plan.effective["action_chunk_size"], possible)
    made, wanted = f"{SCALE * shape[-1]}x{SCALE * shape[-2]}", _size(source / LAST)
    if made != wanted:
        possible = f"{wanted} or left out: that is the size of the video that it goes on from"
        raise InvalidRequest("size", made, possible, "conflict")
    if plan.parameters.fps != before.effective["fps"]:
        possible = f"{before.effective['fps']:g} or left out: so is the video that it goes on from"
        raise InvalidRequest("fps", plan.parameters.fps, possible, "conflict")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / CLIP, folder / BEFORE)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, FileNotFoundError):
            raise _expired() from None
        raise
    job.continued_from = before.id
    job.effective["image"] = first_frame_of(before.id)
    job.frames_before = before.frames_before + int(before.effective["num_frames"]) - 1


def first_frame_of(name: str) -> str:
    """How messages and records call the first frame of a video that goes on from another."""
    return f"the last frame of {name}"


def _expired() -> ApiError:
    message = f"{FIELD} names a video that was deleted, by its age or to make room"
    return ApiError("expired", message, param=FIELD)


def _size(picture: Path) -> str:
    """The size of a last frame; an error if its video was deleted."""
    with Image.open(io.BytesIO(_read(picture))) as image:
        return f"{image.width}x{image.height}"


def _read(picture: Path) -> bytes:
    try:
        return picture.read_bytes()
    except FileNotFoundError:
        raise _expired() from None
