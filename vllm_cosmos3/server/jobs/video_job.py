"""A video from acceptance to expiry: one model for the journal, the API's JSON and its schema.

Every field stands here once. An ordinary field is stored and shown, an `Internal` one is stored
alone, and a computed one is shown alone. The journal's names are those of every earlier version.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, computed_field, field_serializer

from vllm_cosmos3.errors import Cosmos3Error

QUEUED: Final = "queued"
RUNNING: Final = "in_progress"
COMPLETED: Final = "completed"
FAILED: Final = "failed"
ENDED = (COMPLETED, FAILED)

T = TypeVar("T")
Internal = Annotated[T, Field(exclude=True)]


class UnreadableRecord(Cosmos3Error):
    """The record of a video is damaged, or of a version that wrote it in another form."""

    code = "not_found"

    def __init__(self, name: str) -> None:
        super().__init__(f"the record of video {name!r} cannot be read; DELETE removes it")


class ApiModel(BaseModel):
    """An object of the API: it has all of its fields and no others."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", json_schema_serialization_defaults_required=True
    )


class JobError(ApiModel):
    """Why a video failed; null unless it did."""

    code: str = Field(description="a stable word for programs, such as out_of_memory")
    message: str = Field(description="one sentence")
    type: None = Field(default=None, description="always null")
    param: None = Field(default=None, description="always null")


class Usage(ApiModel):
    """What a request took; null until it is completed."""

    frames: int = Field(description="made")
    output_seconds: float = Field(description="[seconds]")
    steps: int = Field(description="of denoising")
    gpu_seconds: float = Field(description="on the ranks, times their number [seconds]")


class QueuePlace(ApiModel):
    """Place of a waiting request; null for others."""

    position: int | None = Field(description="requests before it")
    eta_s: float | None = Field(
        description="until it is done [seconds]; null while nothing is known"
    )


class Details(ApiModel):
    """What OpenAI's object has no place for."""

    mode: str = Field(description="what the request came to, such as image2video")
    effective: dict[str, Any] = Field(description="every field as it was used, defaults included")
    sources: dict[str, str] = Field(
        description="of each effective field: request, checkpoint, reasoner, or default (of the mode"
        " or the field, or what follows from others)"
    )
    warnings: list[str] = Field(description="what was rounded, cut or has no effect")
    upsampled_prompt: str | None = Field(description="the prompt that the reasoner wrote")
    continued_from: str | None = Field(description="the video that this one goes on from")
    queue: QueuePlace | None
    phase: str = Field(description="queued, encode, denoise, decode or done")
    step: int = Field(ge=0, description="denoising steps done")
    num_steps: int = Field(description="denoising steps of the whole")
    reused_steps: int = Field(description="of those done, taken from the step cache")
    batch_size: int = Field(
        description="most samples denoised in one forward, of this request and others; 0 until it is"
        " completed"
    )
    eta_s: float | None = Field(
        description="until the phase is done [seconds]; null while nothing is known"
    )
    timings_s: dict[str, float] = Field(
        description="of the phases [seconds]: queue, text, vae_encode, denoise, per_step, vae_decode,"
        " sound, to_cpu, encode (what of the files was not written while decoding), total"
    )
    peak_memory_mb: float = Field(description="most memory on a device [MiB]")
    seed: int = Field(description="of the initial noise")
    guardrails: dict[str, Any] = Field(
        description="what was asked for, the state, and what was checked"
    )


class VideoJob(ApiModel):
    """A video, made or in the making."""

    id: str = Field(description="its name in all other calls")
    model: str = Field(description="the served name")
    status: Literal["queued", "in_progress", "completed", "failed"] = Field(
        default="queued", description="queued, in_progress, completed or failed"
    )
    progress: int = Field(default=0, ge=0, le=100, description="of the whole [percent]")
    prompt: str = Field(description="as it was given; empty if it was token ids")
    usage: dict[str, float] = Field(default_factory=dict)
    error: dict[str, Any] | None = None
    action: dict[str, Any] | None = Field(
        default=None,
        description="the actions of policy and inverse_dynamics: rows, their embodiment and units",
    )

    kind: Internal[str]  # video, or sync and image, which are not listed
    created: Internal[float]
    started: Internal[float | None] = None
    completed: Internal[float | None] = None
    expires: Internal[float | None] = None
    body: Internal[str] = ""  # hash of the request, against repeated sending
    key: Internal[str | None] = None  # the client's Idempotency-Key
    phase: Internal[str] = "queued"
    step: Internal[int] = 0
    num_steps: Internal[int] = 0
    reused_steps: Internal[int] = 0
    work: Internal[float] = 0.0  # what it costs: see estimates
    eta: Internal[float | None] = None  # seconds
    position: Internal[int | None] = None
    removed: Internal[bool] = False  # its files
    bytes: Internal[int] = 0
    remixed_from: Internal[str | None] = None
    continued_from: Internal[str | None] = None
    frames_before: Internal[int] = 0  # of the video that it continues, without the shared frame
    upsampled_prompt: Internal[str | None] = None
    request: Internal[dict[str, Any]] = Field(default_factory=dict)  # as asked, for a remix
    effective: Internal[dict[str, Any]] = Field(default_factory=dict)
    sources: Internal[dict[str, str]] = Field(default_factory=dict)  # of what is effective
    warnings: Internal[list[str]] = Field(default_factory=list)
    timings: Internal[dict[str, float]] = Field(default_factory=dict)
    peak_memory: Internal[int] = 0
    batch_size: Internal[int] = 0
    guardrails: Internal[dict[str, Any]] = Field(default_factory=dict)
    files: Internal[list[str]] = Field(default_factory=list)
    # A newer version's fields, which finds them again.
    _unknown: dict[str, Any] = PrivateAttr(default_factory=dict)

    @property
    def ended(self) -> bool:
        return self.status in ENDED

    @classmethod
    def load(cls, document: str) -> VideoJob:
        """The job of a text in the journal, whichever version wrote it.

        Raises:
            ValueError: it is damaged, or a field has another type.
        """
        values = json.loads(document)
        job = cls.model_validate({name: values[name] for name in cls.model_fields.keys() & values})
        job._unknown = {name: values[name] for name in values.keys() - cls.model_fields.keys()}
        return job

    def document(self) -> str:
        """The text that the journal keeps."""
        return json.dumps({**self._unknown, **vars(self)})

    def public(self) -> dict[str, Any]:
        """The video object of OpenAI's API, with our block ``cosmos3``.

        Raises:
            UnreadableRecord: it lacks what every video has, or has it in another form.
        """
        try:
            return self.model_dump()
        except (LookupError, TypeError, ValueError):
            raise UnreadableRecord(self.id) from None

    @field_serializer("usage")
    def _usage(self, usage: dict[str, float]) -> Usage | None:
        return Usage.model_validate(usage) if usage else None

    @field_serializer("error")
    def _error(self, error: dict[str, Any] | None) -> JobError | None:
        return JobError.model_validate(error) if error and self.status == FAILED else None

    @computed_field(description="always video")
    @property
    def object(self) -> Literal["video"]:
        return "video"

    @computed_field(description="[seconds since 1970]")
    @property
    def created_at(self) -> int:
        return int(self.created)

    @computed_field(description="when it was completed or failed [seconds since 1970]")
    @property
    def completed_at(self) -> int | None:
        return None if self.completed is None else int(self.completed)

    @computed_field(description="when the file of a completed one is deleted [seconds since 1970]")
    @property
    def expires_at(self) -> int | None:
        return int(self.expires) if self.status == COMPLETED and self.expires else None

    @computed_field(description="length of the video [seconds]")
    @property
    def seconds(self) -> str:
        return f"{self.duration_s:.6g}"

    @computed_field(description="WIDTHxHEIGHT [pixels]")
    @property
    def size(self) -> str:
        return str(self.effective["output_size"])

    @computed_field(description="always default")
    @property
    def quality(self) -> Literal["default"]:
        return "default"

    @computed_field(description="the video whose request this one repeats")
    @property
    def remixed_from_video_id(self) -> str | None:
        return self.remixed_from

    @computed_field(description="always video/mp4")
    @property
    def media_type(self) -> Literal["video/mp4"]:
        return "video/mp4"

    @computed_field(description="when it is completed")
    @property
    def file_name(self) -> str | None:
        return f"{self.id}.mp4" if self.status == COMPLETED else None

    @computed_field(description="[frames per second]")
    @property
    def fps(self) -> float:
        return float(self.effective["fps"])

    @computed_field(description="of the video")
    @property
    def num_frames(self) -> int:
        return self.frames_before + int(self.effective["num_frames"])

    @computed_field(description="of the video [seconds]")
    @property
    def duration_s(self) -> float:
        return self.num_frames / self.fps

    @computed_field(description="from acceptance to the end [seconds]; when it is completed")
    @property
    def inference_time_s(self) -> float | None:
        return self.timings.get("total")

    @computed_field(description="as cosmos3.timings_s")
    @property
    def stage_durations(self) -> dict[str, float]:
        return self.timings

    @computed_field(description="most memory on a device [MiB]")
    @property
    def peak_memory_mb(self) -> float:
        return round(self.peak_memory / 2**20, 1)

    @computed_field
    @property
    def cosmos3(self) -> Details:
        waits = self.status == QUEUED
        return Details(
            mode=self.effective["mode"],
            effective=self.effective,
            sources=self.sources,
            warnings=self.warnings,
            upsampled_prompt=self.upsampled_prompt,
            continued_from=self.continued_from,
            queue=QueuePlace(position=self.position, eta_s=self.eta) if waits else None,
            phase=self.phase,
            step=self.step,
            num_steps=self.num_steps,
            reused_steps=self.reused_steps,
            batch_size=self.batch_size,
            eta_s=self.eta,
            timings_s=self.timings,
            peak_memory_mb=self.peak_memory_mb,
            seed=self.effective["seed"],
            guardrails=self.guardrails,
        )
