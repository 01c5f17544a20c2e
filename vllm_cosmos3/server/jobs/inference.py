"""Requests without a job, as robots make them: planned, run, answered, and nothing is stored."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from vllm_cosmos3.errors import Busy, Cosmos3Error
from vllm_cosmos3.generator.output import Output
from vllm_cosmos3.progress import Progress, Report
from vllm_cosmos3.server.http.api_errors import slug
from vllm_cosmos3.server.http.metrics import metrics
from vllm_cosmos3.server.http.request_fields import ClientRequest
from vllm_cosmos3.server.jobs.admission import Admission
from vllm_cosmos3.server.jobs.estimates import ThroughputEstimate, seconds_spent
from vllm_cosmos3.server.jobs.live_jobs import LiveJobs, cancel
from vllm_cosmos3.stage.job import StageJob, Stages


class Inference:
    """Runs requests for their output alone, each in at most ``deadline`` seconds."""

    def __init__(
        self,
        admission: Admission,
        jobs: LiveJobs,
        stage: Stages,
        throughput: ThroughputEstimate,
        *,
        deadline: float,
        ranks: int,
    ) -> None:
        self.running = 0
        self._admission, self._jobs, self._stage = admission, jobs, stage
        self._throughput, self._deadline, self._ranks = throughput, deadline, ranks

    async def infer(self, fields: Mapping[str, Any]) -> Output:
        """The output of a request. Its timings have "queue" too.

        Cancelling this stops the stage's work.

        Raises:
            Cosmos3Error: it cannot be served, now or at all, or it failed.
        """
        self.running += 1
        try:
            accepted, begun = time.perf_counter(), Future[float]()

            def begin(progress: Progress) -> None:
                if not begun.done():
                    begun.set_result(time.perf_counter())

            job, work = await self._submit(fields, begin)
            output = await self._result(job)
            heard = time.perf_counter() - begun.result()
            self._throughput.observe(work, seconds_spent(heard, output.timings))
            queue = begun.result() - accepted
            return replace(output, timings={"queue": queue, **output.timings})
        finally:
            self.running -= 1

    async def _submit(self, fields: Mapping[str, Any], report: Report) -> tuple[StageJob, float]:
        request = ClientRequest(fields=dict(fields), server_fields={}, references={}, warnings=())
        try:
            self._admission.check_open()
            plan = await self._admission.plan(request)
            await self._admission.judge(request)
            work = self._admission.work(plan)
            submitted = asyncio.ensure_future(
                asyncio.to_thread(
                    self._stage.submit,
                    plan,
                    seconds=self._throughput.seconds(work),
                    deadline=self._deadline,
                    report=report,
                )
            )
            try:
                return await asyncio.shield(submitted), work
            except asyncio.CancelledError:
                submitted.add_done_callback(self._abandon)
                raise
        except Cosmos3Error as error:
            metrics().refused(error)
            if isinstance(error, Busy):
                raise self._jobs.queue_full(str(error)) from None
            raise

    def _abandon(self, submitted: asyncio.Future[StageJob]) -> None:
        """Stop what the stage has accepted for a client that went away meanwhile."""
        if not submitted.cancelled() and submitted.exception() is None:
            cancel(submitted.result(), self._ranks)
            metrics().cancelled.inc()

    async def _result(self, job: StageJob) -> Output:
        """What a job of the stage made; it is cancelled with the task that waits for it."""
        loop, end = asyncio.get_running_loop(), asyncio.Event()
        job.future.add_done_callback(lambda _: loop.call_soon_threadsafe(end.set))
        try:
            await end.wait()
            output: Output = job.future.result().output
        except asyncio.CancelledError:
            cancel(job, self._ranks)
            metrics().cancelled.inc()
            raise
        except Cosmos3Error as error:
            metrics().failure(slug(error))
            raise
        metrics().completed.labels("policy").inc()
        return output
