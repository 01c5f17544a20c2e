"""The generator behind the routes: plans requests, hands them to the stage, keeps their jobs.

One per API process. The stage's events come in a thread of the stage client; they change the job
in memory, which is what this process shows, and a ticking task writes it to the journal for others.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_cosmos3.errors import Busy, Cosmos3Error, InvalidRequest
from vllm_cosmos3.generator.models.components import loaded_values
from vllm_cosmos3.generator.output import Output
from vllm_cosmos3.media import Clip
from vllm_cosmos3.progress import Progress, Report
from vllm_cosmos3.request import planner, prompts
from vllm_cosmos3.request.plan import Plan
from vllm_cosmos3.request.request import from_fields
from vllm_cosmos3.request.upsample import question_about
from vllm_cosmos3.robots import droid
from vllm_cosmos3.server.guardrails import Guardrails
from vllm_cosmos3.server.http.control_fields import joined
from vllm_cosmos3.server.http.errors import ApiError, retry_after, slug
from vllm_cosmos3.server.http.metrics import metrics
from vllm_cosmos3.server.http.request_fields import Asked
from vllm_cosmos3.server.jobs import continuation, estimates
from vllm_cosmos3.server.jobs.artifacts import CLIP, RECORD, STAGE
from vllm_cosmos3.server.jobs.journal import COMPLETED, FAILED, RUNNING, Job, Journal
from vllm_cosmos3.server.jobs.upsampling import EngineReasoner
from vllm_cosmos3.server.jobs.value_sources import sources
from vllm_cosmos3.server.memory_split import Sizing
from vllm_cosmos3.server.options import Options
from vllm_cosmos3.stage.client import StageClient, StageJob
from vllm_cosmos3.stage.process import Status
from vllm_cosmos3.stage.scheduler import QueueConfig
from vllm_cosmos3.stage.worker import StageConfig

logger = logging.getLogger(__name__)

TICK = 0.5  # seconds between writes of progress, and looks at what other processes did
SWEEP = 4  # ticks between looks at old files and dead processes
REPLAY_SECONDS = 600.0  # in which a client's retry is the same request
PLANNERS = 4  # requests that are planned at once, which may decode media
INTERRUPTED = {
    "code": "interrupted",
    "message": "the server stopped while it made this; please send it again",
}
# Share of the whole that is done when a phase begins and when it ends, in percent.
SPANS = {"encode": (1, 5), "denoise": (5, 90), "decode": (90, 99)}


class Service:
    """Everything that lives as long as the server. ``start`` it in the event loop."""

    def __init__(
        self,
        sizing: Sizing,
        names: tuple[str, ...],
        options: Options,
        guardrails: Guardrails,
        reasoner: EngineReasoner | None = None,
    ) -> None:
        self.sizing, self.model = sizing, sizing.model
        self.options, self.names, self.guardrails = options, names, guardrails
        self.reasoner = reasoner
        self.journal = Journal(options.storage)
        self.metrics = metrics()
        self.metrics.limit.set(options.max_queue)
        self.draining = False
        self._closing = False
        self._tokenizer = prompts.load_tokenizer(self.model.path)
        self._planners = asyncio.Semaphore(PLANNERS)
        self._own: dict[str, Job] = {}  # not ended
        self._stage_jobs: dict[str, StageJob] = {}
        self._changed: set[str] = set()  # not yet in the journal
        self._lock = threading.Lock()  # of the three above
        self._inferring = 0  # requests without a job
        self._pace = estimates.Pace()
        self._values = loaded_values(self.model)
        self._ticker: asyncio.Task[None] | None = None
        if options.generator_devices:
            # This process computes nothing, and the reasoner's processes have started before.
            os.environ["CUDA_VISIBLE_DEVICES"] = options.generator_devices
        self.stage = StageClient(
            StageConfig(
                engine=sizing.engine,
                stage=STAGE,
                backend=sizing.engine.distributed_executor_backend or "mp",
            ),
            QueueConfig(
                # Requests of robots are alike: in turns each of them would take as long as all.
                policy="fifo" if self.model.kind == droid.KIND else "short-first",
                max_waiting=options.max_queue,
                max_waiting_seconds=options.max_queue_gpu_seconds,
            ),
            drain_seconds=options.drain_seconds,
        )

    async def start(self) -> None:
        """Settle what earlier processes left, and begin to tick."""
        self._sweep()
        self._ticker = asyncio.create_task(self._tick())

    async def drain(self) -> None:
        """Take nothing new and wait for what was accepted, as long as the options say."""
        self.draining = True
        end = time.monotonic() + self.options.drain_seconds
        while (self._own or self._inferring) and time.monotonic() < end:
            await asyncio.sleep(0.05)

    async def close(self) -> None:
        """End the stage; what it was still serving is recorded as interrupted."""
        self.draining = self._closing = True
        if self._ticker is not None:
            self._ticker.cancel()
            with suppress(asyncio.CancelledError):
                await self._ticker
        await asyncio.to_thread(self.stage.close)
        self.journal.close()

    # Requests.

    async def create(
        self, kind: str, asked: Asked, media: Mapping[str, Any], *, deadline: float,
        key: str | None = None, retried: bool = False, remixed_from: str | None = None,
        given: Mapping[str, str] | None = None,
    ) -> Job:  # fmt: skip
        """Accept a request, or find the job of the same request that was accepted before.

        ``given`` says of the files' paths what the user calls them, who shall not see the paths.

        Raises:
            Cosmos3Error: it cannot be served, now or at all; nothing is left of it.
        """
        try:
            body = await asyncio.to_thread(_digest, kind, asked, media, remixed_from)
            known = self._known(body, key, retried=retried)
            if known is not None:
                return known
            return await self._create(
                kind, asked, media, deadline, body, key, remixed_from, given or {}
            )
        except InvalidRequest as error:
            raise asked.placed(_named(error, asked, given or {})) from None
        except ApiError as error:
            raise asked.placed(error) from None

    async def _create(
        self, kind: str, asked: Asked, media: Mapping[str, Any], deadline: float,
        body: str, key: str | None, remixed_from: str | None, given: Mapping[str, str],
    ) -> Job:  # fmt: skip
        self._check_model(asked.server.get("model"))
        self._check_open()
        deadline = min(deadline, asked.server.get("deadline_seconds", deadline))
        named = {*asked.fields, *media}
        before = continuation.source_of(asked, self)
        if before is not None:
            asked, media = continuation.goes_on(asked, media, before, self.journal)
        plan = await self._plan(asked, media)
        report = await self._guarded(asked)
        upsampled = await self._upsampled(asked, media, plan, deadline)
        if upsampled is not None:
            plan = await self._plan(upsampled, media)
            report = await self._guarded(upsampled)
        job = Job(
            id=f"video_{uuid.uuid4().hex}",
            kind=kind,
            model=self.names[0],
            prompt=asked.fields.get("prompt") or "",
            created=time.time(),
            body=body,
            key=key,
            num_steps=plan.steps,
            work=estimates.work(plan, self.model.transformer.latent_patch_size),
            remixed_from=remixed_from,
            request=dict(asked.fields),
            effective={
                name: given.get(value, value) if isinstance(value, str) else value
                for name, value in plan.effective.items()
            },
            sources=sources(named, plan.effective, self.model, upsampled=upsampled is not None),
            warnings=[*asked.warnings, *plan.warnings],
            guardrails=report,
            upsampled_prompt=None if upsampled is None else upsampled.fields["prompt"],
        )
        if before is not None:
            await asyncio.to_thread(continuation.prepare, job, plan, before, self.journal)
        other = self.journal.add(job)
        if other is not None:
            self.journal.purge(job.id)
            return self._same(other, body)
        await self._submit(job, plan, deadline)
        return job

    async def _guarded(self, asked: Asked) -> dict[str, Any]:
        """What the guardrails say of the texts; an error if they refuse one."""
        return await asyncio.to_thread(
            self.guardrails.check,
            asked.fields,
            self._tokenizer,
            requested=asked.server.get("guardrails"),
        )

    async def _upsampled(
        self, asked: Asked, media: Mapping[str, Any], plan: Plan, deadline: float
    ) -> Asked | None:
        """The request with the prompt that the reasoner writes; None where it keeps its own."""
        if not asked.server.get("upsample_prompt"):
            return None
        if self.reasoner is None:
            possible = "false or left out: this server was started without the reasoner"
            raise InvalidRequest("upsample_prompt", "true", possible, "unsupported")
        request = from_fields(joined(asked.fields, media))
        question = await asyncio.to_thread(question_about, request, plan.effective, {})
        if question is None:
            return None
        self._inferring += 1
        try:
            prompt = await self.reasoner.caption(question, deadline)
        finally:
            self._inferring -= 1
        return replace(asked, fields={**asked.fields, "prompt": prompt})

    async def _plan(self, asked: Asked, media: Mapping[str, Any]) -> Plan:
        def make() -> Plan:
            request = from_fields(joined(asked.fields, media))
            return planner.make_plan(request, self.model, self._tokenizer)

        async with self._planners:
            plan = await asyncio.to_thread(make)
        if plan.truncated and asked.server.get("truncate_prompt") is False:
            message = f"{plan.truncated[0]}, and truncate_prompt is false"
            raise ApiError("invalid_value", message, param="prompt")
        return plan

    async def infer(self, fields: Mapping[str, Any]) -> Output:
        """Run a request for what it comes to: there is no job, and nothing is stored.

        Cancelling it stops the stage's work. The output's timings have "queue" too.

        Raises:
            Cosmos3Error: it cannot be served, now or at all, or it failed.
        """
        self._inferring += 1
        try:
            accepted, begun = time.perf_counter(), Future[float]()

            def begin(progress: Progress) -> None:
                if not begun.done():
                    begun.set_result(time.perf_counter())

            job, work = await self._accepted(fields, begin)
            output = await self._inferred(job)
            self._pace.learn(work, time.perf_counter() - begun.result())
            queue = begun.result() - accepted
            return replace(output, timings={"queue": queue, **output.timings})
        finally:
            self._inferring -= 1

    async def _accepted(self, fields: Mapping[str, Any], report: Report) -> tuple[StageJob, float]:
        asked = Asked(fields=dict(fields), server={}, references={}, warnings=())
        try:
            self._check_open()
            plan = await self._plan(asked, {})
            await self._guarded(asked)
            work = estimates.work(plan, self.model.transformer.latent_patch_size)
            submitted = asyncio.ensure_future(
                asyncio.to_thread(
                    self.stage.submit,
                    plan,
                    seconds=self._pace.seconds(work),
                    deadline=self.options.sync_deadline,
                    report=report,
                )
            )
            try:
                return await asyncio.shield(submitted), work
            except asyncio.CancelledError:
                submitted.add_done_callback(self._abandon)
                raise
        except Cosmos3Error as error:
            self.metrics.refused(error)
            if isinstance(error, Busy):
                raise self.full(str(error)) from None
            raise

    def _abandon(self, submitted: asyncio.Future[StageJob]) -> None:
        """Stop what the stage has accepted for a client that went away meanwhile."""
        if not submitted.cancelled() and submitted.exception() is None:
            self._stop(submitted.result())
            self.metrics.cancelled.inc()

    async def _inferred(self, job: StageJob) -> Output:
        """What a job of the stage made; it is cancelled with the task that waits for it."""
        loop, end = asyncio.get_running_loop(), asyncio.Event()
        job.future.add_done_callback(lambda _: loop.call_soon_threadsafe(end.set))
        try:
            await end.wait()
            output: Output = job.future.result().output
        except asyncio.CancelledError:
            self._stop(job)
            self.metrics.cancelled.inc()
            raise
        except Cosmos3Error as error:
            self._count_failure(slug(error))
            raise
        self.metrics.completed.labels("policy").inc()
        return output

    async def _submit(self, job: Job, plan: Plan, deadline: float) -> None:
        with self._lock:
            self._own[job.id] = job

        def submit() -> None:
            stage_job = self.stage.submit(
                plan,
                seconds=self._pace.seconds(job.work),
                save=self.journal.folder(job.id),
                clip=Clip(path=self.journal.folder(job.id) / CLIP),
                deadline=deadline,
                report=lambda progress: self._advance(job, progress),
            )
            with self._lock:
                self._stage_jobs[job.id] = stage_job
            stage_job.future.add_done_callback(lambda future: self._finish(job, future))

        try:
            await asyncio.to_thread(submit)
        except Cosmos3Error as error:
            with self._lock:
                self._own.pop(job.id, None)
            self.journal.purge(job.id)
            if isinstance(error, Busy):
                raise self.full(str(error)) from None
            raise

    def _check_model(self, name: str | None) -> None:
        if name is not None and name not in self.names:
            raise InvalidRequest("model", name, " or ".join(self.names), "model_not_found")

    def _check_open(self) -> None:
        if self.draining:
            raise ApiError("draining", "the server is stopping", headers={"Retry-After": "30"})
        status = self.stage.status(0)
        if status.state in ("starting", "failed"):
            raise ApiError("loading", self.reason(status), headers={"Retry-After": "10"})

    def _known(self, body: str, key: str | None, *, retried: bool) -> Job | None:
        if key is not None:
            found = self.journal.by_key(key)
            return None if found is None else self._same(found, body)
        if retried:
            return self.journal.recent(body, REPLAY_SECONDS)
        return None

    def _same(self, job: Job, body: str) -> Job:
        if job.body != body:
            message = "this Idempotency-Key was used for a different request"
            raise ApiError("idempotency_conflict", message, param="Idempotency-Key")
        return self._own.get(job.id, job)

    def full(self, message: str) -> ApiError:
        """The answer where no more may wait, with when to come back."""
        with self._lock:
            accepted = [self._own[name] for name in self._stage_jobs]
            running = [job for job in accepted if job.started is not None]
            waiting = len(accepted) - len(running)
        # When the first of those on the ranks is done, a waiting one leaves the queue.
        seconds = min((estimates.left(job, self._pace) for job in running), default=0.0)
        headers = {
            "Retry-After": retry_after(seconds),
            "x-queue-depth": str(waiting),
            "x-queue-limit": str(self.options.max_queue),
        }
        return ApiError("queue_full", message, headers=headers)

    # What the stage tells, in its thread.

    def _advance(self, job: Job, progress: Progress) -> None:
        low, high = SPANS[progress.phase]
        share = progress.step / progress.steps if progress.steps else 0.0
        with self._lock:
            if job.ended:
                return
            if job.started is None:
                job.started = time.time()
            job.status, job.phase, job.position = RUNNING, progress.phase, None
            job.progress = max(job.progress, int(low + (high - low) * share))
            if progress.phase == "denoise":
                job.step, job.eta = progress.step, progress.eta
                if progress.step:
                    share = progress.step / progress.steps
                    self._pace.glimpse(job.work, share, progress.elapsed)
            self._changed.add(job.id)

    def _finish(self, job: Job, future: Future[Any]) -> None:
        """Record the end of a job. Whatever goes wrong with that is the end of the job too."""
        error = future.exception()
        try:
            record = self._record(job) if error is None else {}
            if error is None:
                files = self.journal.folder(job.id).iterdir()
                job.bytes = sum(file.stat().st_size for file in files)
        except (OSError, ValueError) as problem:
            error, record = Cosmos3Error(f"the result cannot be read: {problem}"), {}
        with self._lock:
            job.completed = time.time()
            job.eta, job.position = None, None
            if error is not None:
                self._fail(job, error)
            elif "error" in record:
                job.status, job.error = FAILED, record["error"]
            else:
                self._complete(job, record)
            job.expires = job.completed + self.options.file_ttl
            self._stage_jobs.pop(job.id, None)
            self._changed.add(job.id)
        if job.error is not None:
            self._count_failure(job.error["code"])
        try:
            self._keep(job)
        except sqlite3.Error as problem:  # the clock tries again
            logger.error("the end of %s cannot be written: %s", job.id, problem)
        logger.info("%s %s after %.1f s", job.id, job.status, job.completed - job.created)

    def _keep(self, job: Job) -> None:
        """Write a job of this process down; one that has ended is the journal's from then on."""
        with self._lock:
            self._changed.discard(job.id)
        try:
            self.journal.save(job)
        except sqlite3.Error:
            with self._lock:
                self._changed.add(job.id)
            raise
        if job.ended:
            with self._lock:
                self._own.pop(job.id, None)

    def _record(self, job: Job) -> dict[str, Any]:
        record: dict[str, Any] = json.loads((self.journal.folder(job.id) / RECORD).read_text())
        return record

    def _fail(self, job: Job, error: BaseException) -> None:
        job.status = FAILED
        if self._closing:  # however the stage ended it
            job.error = dict(INTERRUPTED)
        else:
            code = slug(error) if isinstance(error, Cosmos3Error) else "internal_error"
            job.error = {"code": code, "message": str(error)}

    def _complete(self, job: Job, record: Mapping[str, Any]) -> None:
        assert job.completed is not None
        started = job.started or job.created
        seconds = job.completed - started
        job.status, job.phase, job.progress = COMPLETED, "done", 100
        job.step = job.num_steps
        job.files, job.action = list(record["files"]), record["action"]
        job.timings = {
            "queue": started - job.created, **record["timings"], "total": job.completed - job.created
        }  # fmt: skip
        job.peak_memory = record["peak_memory"]
        job.guardrails |= record["guardrails"]
        job.warnings += [text for text in record["warnings"] if text not in job.warnings]
        frames = int(job.effective["num_frames"]) * int(job.effective["n"])
        ranks = self.sizing.engine.parallel.world_size
        job.usage = {
            "frames": frames,
            "output_seconds": round(frames / float(job.effective["fps"]), 3),
            "steps": job.num_steps,
            "gpu_seconds": round(seconds * ranks, 3),
        }
        self._pace.learn(job.work, seconds)
        self.metrics.completed.labels(job.kind).inc()
        self.metrics.frames.inc(frames)
        self.metrics.peak.set(max(job.peak_memory, 0))
        self.metrics.step.observe(record["timings"].get("per_step", 0.0))
        for phase, spent in job.timings.items():
            if phase != "per_step":
                self.metrics.phase.labels(phase).observe(max(0.0, spent))

    def _count_failure(self, code: str) -> None:
        if code == "cancelled":
            self.metrics.cancelled.inc()
        else:
            self.metrics.failed.labels(code).inc()

    # Jobs.

    def get(self, name: str) -> Job:
        """A job of any process.

        Raises:
            ApiError: there is none, or no more.
        """
        job = self.find(name)
        if job is None:
            raise ApiError("not_found", f"there is no video {name!r}", param="id")
        return job

    def find(self, name: str) -> Job | None:
        """A job of any process; None if there is none, or no more."""
        job = self._own.get(name)
        if job is not None:
            stage_job = self._stage_jobs.get(name)
            if stage_job is not None and job.started is None:
                self._look_ahead(job)
        stored = self.journal.get(name)
        return stored and (job or stored)

    def _look_ahead(self, job: Job) -> None:
        """Say of a waiting job where it stands and when it will be done."""
        with self._lock:
            jobs = [(self._own[name], waiting) for name, waiting in self._stage_jobs.items()]
            for each, waiting in jobs:
                each.position = waiting.position if each.started is None else None
            others = [each for each, _ in jobs if each is not job]
            job.eta = estimates.queue_eta(job, others, self._pace)

    async def wait(self, job: Job, seconds: float) -> Job:
        """The job when it has ended, or as it is after ``seconds``.

        Raises:
            ApiError: it was deleted meanwhile.
        """
        end = time.monotonic() + seconds
        while not job.ended and time.monotonic() < end:
            await asyncio.sleep(0.02)
            if job.id not in self._own:
                job = self.get(job.id)
        return job

    def delete(self, name: str) -> None:
        """Forget a job; if it is not done, the stage stops it with its current step."""
        job = self.get(name)
        self.journal.delete(name)
        if job.ended or name in self._own:  # else its own process stops it, and removes the rest
            self._settle_deleted(name)

    def _settle_deleted(self, name: str) -> None:
        """Cancel a deleted job of this process, or remove what is left of it."""
        with self._lock:
            job, stage_job = self._own.get(name), self._stage_jobs.pop(name, None)
        if stage_job is not None:
            self._stop(stage_job)
        if job is None or job.ended:
            self.journal.purge(name)

    def _stop(self, job: StageJob) -> None:
        """Cancel what the stage makes, and count what its ranks still do of it: a step or less."""
        since, ranks = time.monotonic(), self.sizing.engine.parallel.world_size

        def count(_: object) -> None:
            self.metrics.wasted.inc(ranks * (time.monotonic() - since))

        if job.progress is not None:  # else it waits
            job.future.add_done_callback(count)
        job.cancel()

    def estimated_wait(self) -> float:
        """Seconds of work before a new request; 0 if nothing is known."""
        with self._lock:
            return sum(estimates.left(job, self._pace) for job in self._own.values())

    def reason(self, status: Status) -> str:
        """Why the generator can take no work, as a sentence."""
        if self.stage.error is not None:
            return f"the generator is down: {self.stage.error}"
        if status.state == "starting":
            return f"the generator is loading: {self.loaded(status)} % of its weights are in place"
        return f"the generator is {status.state}"

    def loaded(self, status: Status) -> int:
        """Percent of the weights that are in place while the stage starts."""
        return min(99, 100 * status.loaded // self._values)

    def status(self, timeout: float = 1.0) -> Status:
        """How the stage is, as it says or as it was last heard."""
        status = self.stage.status(timeout)
        self.metrics.waiting.set(status.waiting)
        self.metrics.running.set(status.running)
        return status

    # Time.

    async def _tick(self) -> None:
        count = 0
        while True:
            await asyncio.sleep(TICK)
            count += 1
            try:
                await asyncio.to_thread(self._write_changes)
                if count % SWEEP == 0:
                    await asyncio.to_thread(self._sweep)
            except (OSError, sqlite3.Error) as error:  # a full or lost disk must not stop the clock
                logger.error("the storage cannot be kept: %s", error)

    def _write_changes(self) -> None:
        with self._lock:
            changed = [self._own[name] for name in self._changed & self._own.keys()]
        for job in changed:
            self._keep(job)
        for name in self.journal.doomed():
            self._settle_deleted(name)
        self.status()

    def _sweep(self) -> None:
        for job in self.journal.orphans():
            job.status, job.completed = FAILED, time.time()
            job.expires = job.completed + self.options.file_ttl
            job.error = dict(INTERRUPTED)
            self.journal.save(job)
        expired = self.journal.expire(
            quota=self.options.storage_quota, record_ttl=self.options.record_ttl
        )
        self.metrics.expired.inc(len(expired))
        self.metrics.stored.set(self.journal.stored())


def _named(error: InvalidRequest, asked: Asked, given: Mapping[str, str]) -> InvalidRequest:
    """The same error with the user's words for files instead of their paths here."""
    value, possible = error.value, error.possible
    if isinstance(value, bytes):  # no field of HTTP is one
        value = continuation.shown(asked.server[continuation.FIELD])
    for path, name in given.items():
        value = name if str(value) == path else value
        possible = possible.replace(path, name)
    return InvalidRequest(error.field, value, possible, error.code)


def _digest(kind: str, asked: Asked, media: Mapping[str, Any], remixed_from: str | None) -> str:
    """What makes two requests the same."""
    parts = [kind, asked.fields, asked.server] + ([remixed_from] if remixed_from else [])
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    for name, source in sorted(media.items()):
        digest.update(name.encode())
        with Path(source).open("rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()
