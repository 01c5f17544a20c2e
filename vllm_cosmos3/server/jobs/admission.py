"""Admission: a client's request is checked, planned, judged and written down, or refused.

Everything that may happen to a request before it waits is called in `Admission._accept`, in order.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vllm_cosmos3.checkpoint.adapters.adapter import Adapter
from vllm_cosmos3.checkpoint.config import ModelConfig
from vllm_cosmos3.errors import Cosmos3Error, InvalidRequest
from vllm_cosmos3.media_budget import Lease, media_budget
from vllm_cosmos3.request import planner
from vllm_cosmos3.request.batching import with_batch
from vllm_cosmos3.request.plan import Plan
from vllm_cosmos3.request.planner import Draft
from vllm_cosmos3.request.presets import PresetRule
from vllm_cosmos3.request.prompts import Tokenizer
from vllm_cosmos3.request.request import from_fields
from vllm_cosmos3.request.upsample import question_about
from vllm_cosmos3.server.guardrails import Guardrails
from vllm_cosmos3.server.http.api_errors import ApiError, RequestFailed
from vllm_cosmos3.server.http.control_fields import joined
from vllm_cosmos3.server.http.request_fields import ClientRequest
from vllm_cosmos3.server.jobs import continuation, estimates
from vllm_cosmos3.server.jobs.live_jobs import LiveJobs
from vllm_cosmos3.server.jobs.sampling_defaults import with_defaults
from vllm_cosmos3.server.jobs.upsampling import EngineReasoner
from vllm_cosmos3.server.jobs.value_sources import sources
from vllm_cosmos3.server.jobs.video_job import VideoJob

REPLAY_SECONDS = 600.0  # in which a client's retry is the same request
PLANNERS = 4  # requests that are planned at once, which may decode media
WATCH_SECONDS = 0.2  # between looks at whether a client that waits is still there


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A request as a route hands it in.

    ``kind`` is video, sync or image; ``deadline`` the most seconds it may take. ``file_names`` says
    of the paths of its files what the user calls them, who shall not see the paths. ``left`` asks
    whether the client has gone away, None where it need not stay.
    """

    kind: str
    request: ClientRequest
    media: Mapping[str, Any] = field(default_factory=dict)
    deadline: float
    key: str | None = None  # Idempotency-Key
    retried: bool = False
    remixed_from: str | None = None
    file_names: Mapping[str, str] = field(default_factory=dict)
    left: Callable[[], Awaitable[bool]] | None = None

    def digest(self, adapters: Sequence[Adapter] = ()) -> str:
        """What makes two requests the same, for a model with these ``adapters``."""
        parts = [self.kind, self.request.fields, self.request.server_fields]
        parts += [self.remixed_from] if self.remixed_from else []
        parts += [[adapter.digest for adapter in adapters]] if adapters else []
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
        for name, source in sorted(self.media.items()):
            digest.update(name.encode())
            with Path(source).open("rb") as file:
                while chunk := file.read(2**20):
                    digest.update(chunk)
        return digest.hexdigest()

    def renamed(self, error: InvalidRequest) -> InvalidRequest:
        """The same error with the user's words for files instead of their paths here."""
        value, possible = error.value, error.possible
        if isinstance(value, bytes):  # no field of HTTP is one
            value = continuation.first_frame_of(self.request.server_fields[continuation.FIELD])
        for path, name in self.file_names.items():
            value = name if str(value) == path else value
            possible = possible.replace(path, name)
        return InvalidRequest(error.field, value, possible, error.code)


class Admission:
    """The way of a request to its job. ``check_open`` raises while nothing new is taken."""

    def __init__(
        self,
        jobs: LiveJobs,
        model: ModelConfig,
        tokenizer: Tokenizer,
        names: tuple[str, ...],
        guardrails: Guardrails,
        reasoner: EngineReasoner | None,
        presets: PresetRule,
        check_open: Callable[[], None],
        defaults: Mapping[str, Any],
        batch_size: Callable[..., int],
    ) -> None:
        self.check_open = check_open
        self.upsampling = 0  # requests whose prompt is being written
        self._jobs, self._model, self._tokenizer, self._names = jobs, model, tokenizer, names
        self._guardrails, self._reasoner, self.defaults = guardrails, reasoner, defaults
        self._presets, self._batch_size = presets, batch_size
        self._planners = asyncio.Semaphore(PLANNERS)

    @property
    def shows_previews(self) -> bool:
        """Whether frames may be seen before they were judged, which no guardrail allows."""
        return self._guardrails.state != "active"

    @property
    def presets(self) -> tuple[str, ...]:
        """Presets that a request may name: what the operator allows and the weights can do."""
        quantized = self._model.quantization is not None
        return tuple(name for name in self._presets.allowed if name != "exact" or not quantized)

    async def create(self, submission: Submission) -> VideoJob:
        """Accept a request, or find the job of the same request that was accepted before.

        Raises:
            Cosmos3Error: it cannot be served, now or at all; nothing is left of it.
        """
        request = submission.request
        try:
            body = await asyncio.to_thread(submission.digest, self._model.adapters)
            known = self._known(body, submission)
            with media_budget().lease() as pixels:
                return known or await self._accept(submission, body, pixels)
        except InvalidRequest as error:
            raise request.placed(submission.renamed(error)) from None
        except ApiError as error:
            raise request.placed(error) from None

    async def _accept(self, submission: Submission, body: str, pixels: Lease) -> VideoJob:
        request, media, deadline = submission.request, submission.media, submission.deadline
        deadline = min(deadline, request.server_fields.get("deadline_seconds", deadline))
        end = time.monotonic() + deadline
        self._check_model(request.server_fields.get("model"))
        self.check_open()
        named = {*request.fields, *media}
        request = with_defaults(request, submission.kind, self.defaults)
        before = continuation.source_of(request, self._jobs)
        if before is not None:
            request, media = continuation.continue_from(request, media, before, self._jobs.journal)
        draft = await self._draft(request, media)
        plan = await self._with_prompts(draft, request)
        pixels.reserve(plan.pixel_bytes, "size")  # while its prompt is written, waits and runs
        report = await self.judge(request)
        caption = await self._caption(request, draft, plan, end - time.monotonic(), submission.left)
        if caption is not None:
            upsampled = replace(request, fields={**request.fields, "prompt": caption})
            draft = replace(draft, request=replace(draft.request, prompt=caption))
            plan = await self._with_prompts(draft, upsampled)
            report = await self.judge(upsampled)
        job = VideoJob(
            id=f"{'image' if submission.kind == 'image' else 'video'}_{uuid.uuid4().hex}",
            kind=submission.kind,
            model=self._names[0],
            prompt=request.fields.get("prompt") or "",
            created=time.time(),
            body=body,
            key=submission.key,
            num_steps=plan.steps,
            work=self.work(plan),
            remixed_from=submission.remixed_from,
            request=dict(request.fields),
            effective={
                name: submission.file_names.get(value, value) if isinstance(value, str) else value
                for name, value in plan.effective.items()
            },
            sources=sources(named, plan.effective, self._model, upsampled=caption is not None),
            warnings=[*request.warnings, *plan.warnings, *self._no_preview(request)],
            guardrails=report,
            upsampled_prompt=caption,
        )
        journal = self._jobs.journal
        other = await asyncio.to_thread(journal.add, job)
        if other is not None:
            return self._same(other, body)
        try:
            if before is not None:
                await asyncio.to_thread(continuation.prepare, job, plan, before, journal)
                await asyncio.to_thread(journal.save, job)
            show = bool(request.server_fields.get("preview")) and self.shows_previews
            await asyncio.to_thread(
                self._jobs.submit, job, plan, end - time.monotonic(), pixels, preview=show
            )
        except Exception:
            with suppress(Cosmos3Error):
                await asyncio.to_thread(journal.purge, job.id)
            raise
        return job

    async def plan(self, request: ClientRequest) -> Plan:
        """The plan of a request without media."""
        return await self._with_prompts(await self._draft(request, {}), request)

    def work(self, plan: Plan) -> float:
        """The work that a plan is, as `estimates` counts it."""
        return estimates.work(plan, self._model.transformer.latent_patch_size)

    async def judge(self, request: ClientRequest) -> dict[str, Any]:
        """What the guardrails say of the texts; an error if they refuse one."""
        return await asyncio.to_thread(
            self._guardrails.check,
            request.fields,
            self._tokenizer,
            requested=request.server_fields.get("guardrails"),
        )

    def _no_preview(self, request: ClientRequest) -> list[str]:
        """A warning, where a preview is asked for that guardrails would have to check."""
        vain = request.server_fields.get("preview") and not self.shows_previews
        return ["preview has no effect: the guardrails check finished videos"] if vain else []

    async def _draft(self, request: ClientRequest, media: Mapping[str, Any]) -> Draft:
        """The request with all of its values checked and its media read."""

        def make() -> Draft:
            fields = joined(self._presets.applied(request.fields), media)
            return planner.make_draft(from_fields(fields), self._model)

        async with self._planners:
            return await asyncio.to_thread(make)

    async def _with_prompts(self, draft: Draft, request: ClientRequest) -> Plan:
        plan = await asyncio.to_thread(planner.with_prompts, draft, self._tokenizer)
        if plan.truncated and request.server_fields.get("truncate_prompt") is False:
            message = f"{plan.truncated[0]}, and truncate_prompt is false"
            raise ApiError("invalid_value", message, param="prompt")
        limit = self._batch_size(exact=plan.parameters.preset == "exact")
        return with_batch(plan, patch=self._model.transformer.latent_patch_size, limit=limit)

    async def _caption(
        self,
        request: ClientRequest,
        draft: Draft,
        plan: Plan,
        deadline: float,
        left: Callable[[], Awaitable[bool]] | None,
    ) -> str | None:
        """The structured prompt that the reasoner writes; None where the request keeps its own.

        Raises:
            RequestFailed: the client has ``left``.
        """
        if not request.server_fields.get("upsample_prompt"):
            return None
        if self._reasoner is None:
            possible = "false or left out: this server was started without the reasoner"
            raise InvalidRequest("upsample_prompt", "true", possible, "unsupported")
        question = await asyncio.to_thread(question_about, draft.request, plan, {})
        if question is None:
            return None
        self.upsampling += 1
        writing = asyncio.ensure_future(self._reasoner.caption(question, deadline))
        try:
            while not (await asyncio.wait({writing}, timeout=WATCH_SECONDS))[0]:
                if left is not None and await left():
                    raise RequestFailed("cancelled", "the client went away")
            return writing.result()
        finally:
            writing.cancel()
            self.upsampling -= 1

    def _check_model(self, name: str | None) -> None:
        if name is not None and name not in self._names:
            raise InvalidRequest("model", name, " or ".join(self._names), "model_not_found")

    def _known(self, body: str, submission: Submission) -> VideoJob | None:
        journal = self._jobs.journal
        if submission.key is not None:
            found = journal.by_key(submission.key)
            return None if found is None else self._same(found, body)
        if submission.retried:
            return journal.recent(body, REPLAY_SECONDS)
        return None

    def _same(self, job: VideoJob, body: str) -> VideoJob:
        if job.body != body:
            message = "this Idempotency-Key was used for a different request"
            raise ApiError("idempotency_conflict", message, param="Idempotency-Key")
        return self._jobs.current(job)
