"""Jobs of this process until they end: handed to the stage, kept up to date, cancelled, written down.

The stage's events come in a thread of the stage client. They change the job in memory, which is what
this process shows; the clock writes it to the journal, for the other processes of the storage.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from vllm_cosmos3.errors import Busy, Cosmos3Error, file_error
from vllm_cosmos3.media import Clip
from vllm_cosmos3.media_budget import Lease
from vllm_cosmos3.progress import Preview, Progress
from vllm_cosmos3.request.plan import Plan
from vllm_cosmos3.server.http.api_errors import (
    SERVER_FAILED,
    ApiError,
    RequestFailed,
    retry_after,
    slug,
)
from vllm_cosmos3.server.http.metrics import metrics
from vllm_cosmos3.server.jobs.estimates import ThroughputEstimate, seconds_spent
from vllm_cosmos3.server.jobs.job_files import CLIP, RECORD
from vllm_cosmos3.server.jobs.journal import Journal
from vllm_cosmos3.server.jobs.video_job import (
    COMPLETED,
    FAILED,
    RUNNING,
    UnreadableRecord,
    VideoJob,
)
from vllm_cosmos3.server.options import Options
from vllm_cosmos3.stage.job import StageJob, Stages

logger = logging.getLogger(__name__)

INTERRUPTED = {
    "code": "interrupted",
    "message": "the server stopped while it made this; please send it again",
}
# Share of the whole that is done when a phase begins and when it ends, in percent.
SPANS = {"encode": (1, 5), "denoise": (5, 90), "decode": (90, 99)}


class LiveJobs:
    """The jobs of this process that have not ended, and those of the journal behind them."""

    def __init__(
        self,
        journal: Journal,
        stage: Stages,
        options: Options,
        throughput: ThroughputEstimate,
        *,
        ranks: int,
    ) -> None:
        self.journal = journal
        self.closing = False  # what ends from now on was interrupted
        self._stage, self._options, self._ranks = stage, options, ranks
        self._throughput = throughput
        self._jobs: dict[str, VideoJob] = {}  # not ended
        self._stage_jobs: dict[str, StageJob] = {}
        self._previews: dict[str, Preview] = {}  # the latest of those that are running
        self._changed: set[str] = set()  # not yet in the journal
        self._lock = threading.Lock()  # of the four above

    def __len__(self) -> int:
        return len(self._jobs)

    def submit(
        self, job: VideoJob, plan: Plan, deadline: float, pixels: Lease, *, preview: bool = False
    ) -> None:
        """Hand an accepted job to the stage, with or without previews.

        ``pixels`` are the reservations for those of the plan, which are the job's from now on.

        Raises:
            Cosmos3Error: the queue is full, or the stage is gone.
        """
        with self._lock:
            self._jobs[job.id] = job
        try:
            stage_job = self._stage.submit(
                plan,
                seconds=self._throughput.seconds(job.work),
                save=self.journal.folder(job.id),
                clip=Clip(path=self.journal.folder(job.id) / CLIP),
                deadline=deadline,
                report=lambda progress: self._advance(job, progress),
                show=(lambda made: self._show(job, made)) if preview else None,
                batch=plan.batch,
            )
        except Cosmos3Error as error:
            with self._lock:
                self._jobs.pop(job.id, None)
            if isinstance(error, Busy):
                raise self.queue_full(str(error)) from None
            raise
        with self._lock:
            self._stage_jobs[job.id] = stage_job
        kept = pixels.moved()
        stage_job.future.add_done_callback(lambda _: kept.release())
        stage_job.future.add_done_callback(lambda future: self._finish(job, future))

    def current(self, job: VideoJob) -> VideoJob:
        """The job as it is in memory, if it is one of this process."""
        return self._jobs.get(job.id, job)

    def preview(self, name: str) -> Preview | None:
        """The latest preview of a job that runs in this process."""
        return self._previews.get(name)

    def get(self, name: str) -> VideoJob:
        """A job of any process.

        Raises:
            ApiError: there is none, or no more.
            UnreadableRecord: it cannot be shown.
        """
        job = self.find(name)
        if job is None:
            raise self._missing(name)
        job.public()
        return job

    def find(self, name: str) -> VideoJob | None:
        """A job of any process; None if there is none, or no more."""
        job = self._jobs.get(name)
        if job is None:
            return self.journal.get(name)
        if name in self._stage_jobs and job.started is None:
            self._look_ahead(job)
        return job if self.journal.holds(name) else None  # another process may have deleted it

    async def wait(self, job: VideoJob, seconds: float) -> VideoJob:
        """The job when it has ended, or as it is after ``seconds``.

        Raises:
            RequestFailed: it was deleted meanwhile.
        """
        deleted = RequestFailed("cancelled", f"{job.id} was deleted while it was made")
        end = time.monotonic() + seconds
        while not job.ended and time.monotonic() < end:
            # That in memory will know its end, even if it is deleted at once.
            found = self._jobs.get(job.id) or self.find(job.id)
            if found is None:
                raise deleted
            job = found
            await asyncio.sleep(0.02)
        if job.error is not None and job.error["code"] == deleted.code:
            raise deleted
        return job

    def delete(self, name: str) -> None:
        """Forget a job; if it is not done, the stage stops it with its current step."""
        job = self.find(name)
        if job is None and not self.journal.holds(name):
            raise self._missing(name)
        ended = job is None or job.ended
        self.journal.delete(name, ended=ended)
        if ended or name in self._jobs:  # else its own process stops it, and removes the rest
            self._resolve_deletion(name)

    def _missing(self, name: str) -> Cosmos3Error:
        if self.journal.holds(name):
            return UnreadableRecord(name)
        return ApiError("not_found", f"there is no video {name!r}", param="id")

    def estimated_wait(self) -> float:
        """Seconds of work before a new request; 0 if nothing is known."""
        with self._lock:
            return self._throughput.wait(self._jobs.values())

    def queue_full(self, message: str) -> ApiError:
        """The answer where no more may wait, with when to come back."""
        with self._lock:
            accepted = [self._jobs[name] for name in self._stage_jobs]
            running = [job for job in accepted if job.started is not None]
            waiting = len(accepted) - len(running)
        # When the first of those on the ranks is done, a waiting one leaves the queue.
        seconds = min(map(self._throughput.remaining, running), default=0.0)
        headers = {
            "Retry-After": retry_after(seconds),
            "x-queue-depth": str(waiting),
            "x-queue-limit": str(self._options.max_queue),
        }
        return ApiError("queue_full", message, headers=headers)

    # By the clock.

    def write_changes(self) -> None:
        """Write what has changed, and stop what another process has deleted."""
        with self._lock:
            changed = [self._jobs[name] for name in self._changed & self._jobs.keys()]
        for job in changed:
            self._keep(job)
        for name in self.journal.pending_deletion():
            self._resolve_deletion(name)

    def sweep(self) -> None:
        """Record what dead processes left unfinished; remove what is too old or too much."""
        for job in self.journal.orphans():
            job.status, job.completed = FAILED, time.time()
            job.expires = job.completed + self._options.file_ttl
            job.error = dict(INTERRUPTED)
            self.journal.save(job)
        expired = self.journal.expire(
            quota=self._options.storage_quota, record_ttl=self._options.record_ttl
        )
        metrics().expired.inc(len(expired))
        metrics().stored.set(self.journal.stored())

    def _resolve_deletion(self, name: str) -> None:
        """Cancel a deleted job of this process, or remove what is left of it."""
        with self._lock:
            job, stage_job = self._jobs.get(name), self._stage_jobs.pop(name, None)
        if stage_job is not None:
            cancel(stage_job, self._ranks)
        if job is None or job.ended:
            self.journal.purge(name)

    def _look_ahead(self, job: VideoJob) -> None:
        """Say of a waiting job where it stands and when it will be done."""
        with self._lock:
            jobs = [(self._jobs[name], waiting) for name, waiting in self._stage_jobs.items()]
            for each, waiting in jobs:
                each.position = waiting.position if each.started is None else None
            others = [each for each, _ in jobs if each is not job]
            job.eta = self._throughput.queue_eta(job, others)

    # What the stage tells, in its thread.

    def _advance(self, job: VideoJob, progress: Progress) -> None:
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
                job.reused_steps = progress.reused
                if progress.step:
                    self._throughput.observe_partial(job.work, share, progress.elapsed)
            self._changed.add(job.id)

    def _show(self, job: VideoJob, preview: Preview) -> None:
        with self._lock:
            if not job.ended:
                self._previews[job.id] = preview

    def _finish(self, job: VideoJob, future: Future[Any]) -> None:
        """Record the end of a job. Whatever goes wrong with that is the end of the job too."""
        error = future.exception()
        record: dict[str, Any] = {}
        try:
            if error is None:
                folder = self.journal.folder(job.id)
                record = json.loads((folder / RECORD).read_text())
                job.bytes = sum(file.stat().st_size for file in folder.iterdir())
        except OSError as problem:
            error = file_error(problem)
        except ValueError:
            error = Cosmos3Error("the result cannot be read")
        with self._lock:  # the status comes last: who sees it without the lock sees all of it
            job.completed = time.time()
            job.expires = job.completed + self._options.file_ttl
            job.eta, job.position = None, None
            job.error = record.get("error") if error is None else self._told(job, error)
            if job.error is None:
                self._complete(job, record)
            else:
                metrics().failure(job.error["code"])
                job.status = FAILED
            self._stage_jobs.pop(job.id, None)
            self._previews.pop(job.id, None)
            self._changed.add(job.id)
        try:
            self._keep(job)
        except Cosmos3Error as problem:  # the clock tries again
            logger.error("the end of %s cannot be written: %s", job.id, problem)
        logger.info("%s %s after %.1f s", job.id, job.status, job.completed - job.created)

    def _keep(self, job: VideoJob) -> None:
        """Write a job down; one that has ended is the journal's from then on."""
        with self._lock:
            self._changed.discard(job.id)
        try:
            self.journal.save(job)
        except Cosmos3Error:
            with self._lock:
                self._changed.add(job.id)
            raise
        if job.ended:
            with self._lock:
                self._jobs.pop(job.id, None)

    def _told(self, job: VideoJob, error: BaseException) -> dict[str, Any]:
        """What is told of the error that ended a job."""
        if self.closing:  # however the stage ended it
            return dict(INTERRUPTED)
        if not isinstance(error, Cosmos3Error):
            logger.error("%s failed", job.id, exc_info=error)
            error = Cosmos3Error(SERVER_FAILED)
        return {"code": slug(error), "message": str(error)}

    def _complete(self, job: VideoJob, record: Mapping[str, Any]) -> None:
        assert job.completed is not None
        started = job.started or job.created
        seconds = seconds_spent(job.completed - started, record["timings"])
        job.phase, job.progress, job.step = "done", 100, job.num_steps
        job.files, job.action = list(record["files"]), record["action"]
        job.timings = {
            "queue": started - job.created, **record["timings"], "total": job.completed - job.created
        }  # fmt: skip
        job.peak_memory, job.batch_size = record["peak_memory"], record["batch_size"]
        job.guardrails |= record["guardrails"]
        job.warnings += [text for text in record["warnings"] if text not in job.warnings]
        frames = int(job.effective["num_frames"]) * int(job.effective["n"])
        job.usage = {
            "frames": frames,
            "output_seconds": round(frames / float(job.effective["fps"]), 3),
            "steps": job.num_steps,
            "gpu_seconds": round(seconds * self._ranks, 3),
        }
        self._throughput.observe(job.work, seconds)
        metrics().completion(job.kind, frames, job.peak_memory, job.batch_size, job.timings)
        job.status = COMPLETED


def cancel(job: StageJob, ranks: int) -> None:
    """Cancel what the stage makes, and count what its ranks still do of it: a step or less."""
    since = time.monotonic()

    def count(_: object) -> None:
        metrics().wasted.inc(ranks * (time.monotonic() - since))

    if job.progress is not None:  # else it waits
        job.future.add_done_callback(count)
    job.cancel()
