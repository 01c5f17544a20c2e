"""Samples of a batch: records that were checked, with the files behind their URLs.

A sample knows what to ask whom, and the mark by which its results are recognised.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_cosmos3 import media
from vllm_cosmos3.batch.downloads import FILES as SOURCES
from vllm_cosmos3.batch.downloads import Downloads
from vllm_cosmos3.batch.files import Unit
from vllm_cosmos3.batch.locations import is_url, redacted, shown
from vllm_cosmos3.batch.records import REASONER, Record, Refused
from vllm_cosmos3.cli.framework_bounds import steps_at_bounds
from vllm_cosmos3.cli.run_options import Planner, RunOptions
from vllm_cosmos3.engine_options import MAX_BATCH_SIZE
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.request.batching import with_batch
from vllm_cosmos3.request.controls import CONTROLS
from vllm_cosmos3.request.questions import QUESTION, Question, question_of
from vllm_cosmos3.request.request import GenerateRequest, from_fields
from vllm_cosmos3.request.upsample import question_about

if TYPE_CHECKING:
    from vllm_cosmos3.request.plan import Plan

FILES = {*SOURCES, *CONTROLS}  # fields that name files


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BatchSample:
    """A checked record: what to ask whom, what it comes to as JSON, and the mark of its results.

    ``continued`` says whether another record starts from its last frame. ``urls`` are those of its
    files, by field, as they are shown. ``max_batch_size`` is how many requests, itself included, fit into its
    batch by their tokens.
    """

    record: Record
    request: GenerateRequest | Question
    effective: Mapping[str, Any]
    warnings: tuple[str, ...]
    digest: str
    continued: bool
    urls: Mapping[str, str]
    upsampling: Question | None  # to be asked for the prompt before the generator is
    max_batch_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A unit of work: its samples, and its records that cannot be served, with the reason.

    The files of its URLs are in ``files``, until `close`.
    """

    unit: Unit
    samples: tuple[BatchSample, ...]
    refused: tuple[Refused, ...]
    files: TemporaryDirectory[str] | None

    @property
    def root(self) -> str:
        """The name of its first record, under which it is claimed."""
        return self.unit[0].name

    def close(self) -> None:
        """Remove the files."""
        if self.files is not None:
            self.files.cleanup()


class Checker:
    """Checks records with everything but the weights."""

    def __init__(self, plan: Planner, options: RunOptions) -> None:
        self._plan, self._options = plan, options

    def check(self, unit: Unit) -> Checked:
        """The samples of a unit. URLs are fetched, in a folder that `Checked.close` removes."""
        fetches = any(_has_url(record.fields.get(name)) for record in unit for name in FILES)
        folder = TemporaryDirectory(prefix="cosmos3-input-") if fetches else None
        downloads = Downloads(Path() if folder is None else Path(folder.name))
        samples: dict[str, BatchSample] = {}
        refused: list[Refused] = []
        wanted = {record.continue_from for record in unit}
        for record in unit:
            try:
                sample = self._sample(record, downloads, samples, continued=record.name in wanted)
            except InvalidRequest as error:
                error = record.placed(error)
                refused.append(Refused(name=record.name, values=record.fields, error=error))
            else:
                samples[record.name] = sample
        return Checked(
            unit=unit, samples=tuple(samples.values()), refused=tuple(refused), files=folder
        )

    def problems(self, unit: Unit) -> tuple[Refused, ...]:
        """What is wrong with a unit. Of a record with URLs only what is seen without them."""
        if not any(_has_url(record.fields.get(name)) for record in unit for name in FILES):
            checked = self.check(unit)
            checked.close()
            return checked.refused
        refused = []
        for record in unit:
            try:
                (question_of if record.kind == REASONER else from_fields)(record.fields)
            except InvalidRequest as error:
                error = record.placed(error)
                refused.append(Refused(name=record.name, values=record.fields, error=error))
        return tuple(refused)

    def _sample(
        self,
        record: Record,
        downloads: Downloads,
        samples: Mapping[str, BatchSample],
        *,
        continued: bool,
    ) -> BatchSample:
        fields = dict(record.fields)
        for name in FILES & fields.keys():
            fields[name] = downloads.local(name, fields[name])
        before = _before(record, samples)
        request, planned = self._planned(record, fields, before)
        upsampling = None
        if record.upsample is not None and isinstance(request, GenerateRequest) and planned:
            # The frame of another record is not made yet: there is nothing to show.
            seen = request if before is None else replace(request, image=None)
            upsampling = question_about(seen, planned, record.upsample)
        given = {name: record.fields[name] for name in FILES & record.fields.keys()}
        urls = {name: shown(value) for name, value in given.items() if is_url(value)}
        return BatchSample(
            record=record,
            request=request,
            effective={"name": record.name, **_effective(request, planned), **urls},
            warnings=(*record.warnings, *self._warnings(fields, planned)),
            digest=_digest(record, fields, before, self._options),
            continued=continued,
            urls=urls,
            upsampling=upsampling,
            max_batch_size=1 if planned is None else self._max_batch_size(planned),
        )

    def _max_batch_size(self, planned: Plan) -> int:
        patch = self._plan.model.transformer.latent_patch_size
        batch = with_batch(planned, patch=patch, limit=MAX_BATCH_SIZE).batch
        return 1 if batch is None else batch.size

    def _warnings(self, fields: Mapping[str, Any], planned: Plan | None) -> tuple[str, ...]:
        if planned is None:
            return ()
        scheduler = self._plan.model.scheduler
        return (*planned.warnings, *steps_at_bounds(fields, planned, scheduler))

    def _planned(
        self, record: Record, fields: Mapping[str, Any], before: BatchSample | None
    ) -> tuple[GenerateRequest, Plan] | tuple[Question, None]:
        """The request of a record and its plan, or its question."""
        if record.kind == REASONER:
            question = question_of(fields)
            if question.image is not None:  # a broken one should not wait for the reasoner
                media.read_image(question.image)
            if question.video is not None:
                media.read_video(question.video, frames=1)
            return question, None
        if before is not None:  # a picture of the right size stands for the frame to come
            shape = (before.effective["height"], before.effective["width"], 3)
            fields = {**fields, "image": np.zeros(shape, np.uint8)}
        request = from_fields(fields)
        return request, self._plan(request)


def hash_of(data: bytes) -> str:
    """The mark of a file's content."""
    return hashlib.sha256(data).hexdigest()


def _has_url(value: Any) -> bool:
    """Whether there is a file to be fetched in a value, which may be a control."""
    if isinstance(value, Mapping):
        return any(map(_has_url, value.values()))
    return is_url(value)


def _before(record: Record, samples: Mapping[str, BatchSample]) -> BatchSample | None:
    """The sample whose last frame a record starts from."""
    if record.continue_from is None:
        return None
    before = samples.get(record.continue_from)
    video = before is not None and before.effective.get("num_frames", 1) > 1
    if before is None or not video or before.effective["n"] != 1:
        possible = "the name of a valid record that makes one video"
        raise InvalidRequest("continue_from", record.continue_from, possible)
    return before


def _effective(request: GenerateRequest | Question, plan: Plan | None) -> dict[str, Any]:
    """Every parameter of a request or a question."""
    if plan is not None:
        return dict(plan.effective)
    names = [name for name in QUESTION if name != "schema"]
    return {"mode": REASONER} | {name: getattr(request, name) for name in names}


def _digest(
    record: Record, fields: Mapping[str, Any], before: BatchSample | None, options: RunOptions
) -> str:
    """What makes the results of two runs the same, seeds that are drawn apart.

    ``fields`` are those of the record with local files, whose contents count as their names do.
    """
    engine = options.engine
    given = {name: redacted(x) if name in FILES else x for name, x in record.fields.items()}
    values = [
        str(engine.model), engine.revision, engine.dtype, record.kind, given, record.upsample,
        record.crf, options.crf, record.quality, options.image_quality, options.image_type,
        engine.load_format, engine.checkpoint_kind, engine.lora, engine.lora_alpha,
        engine.quantization, engine.fp8_first_steps, engine.fp8_last_steps, engine.fp8_text,
        engine.attention_backend, engine.vae_parallel,
        None if before is None else before.digest,
        {name: _contents(fields[name]) for name in sorted(FILES & fields.keys())},
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=_plain).encode()).hexdigest()


def _contents(value: Any) -> Any:
    """A value with the hashes of its files instead of their names."""
    if isinstance(value, Mapping):
        return {name: _contents(item) for name, item in value.items()}
    return _hash_of(Path(value)) if isinstance(value, str) and Path(value).is_file() else None


def _hash_of(file: Path) -> str:
    found = hashlib.sha256()
    with file.open("rb") as opened:
        while piece := opened.read(2**20):
            found.update(piece)
    return found.hexdigest()


def _plain(value: object) -> str:
    """What JSON does not know as a text: all numbers of an array."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
    return str(value)
