"""Sessions of a simulator that clients have open: how many, and their chunks on the stage."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from vllm_cosmos3.checkpoint.config import ModelConfig
from vllm_cosmos3.errors import Busy, Cosmos3Error
from vllm_cosmos3.generator.output import Output
from vllm_cosmos3.request import prompts
from vllm_cosmos3.request.world import ChunkPlan, SessionRequest, World, make_world
from vllm_cosmos3.server.frame_check import Refusal
from vllm_cosmos3.server.guardrails import Guardrails
from vllm_cosmos3.server.http.api_errors import ApiError, slug
from vllm_cosmos3.server.http.metrics import metrics
from vllm_cosmos3.stage.job import StageJob, Stages


class Worlds:
    """At most ``limit`` sessions at once; each chunk may take ``deadline`` seconds, waiting included."""

    def __init__(
        self,
        model: ModelConfig,
        tokenizer: prompts.Tokenizer,
        stages: Stages,
        guardrails: Guardrails,
        check_open: Callable[[], None],
        *,
        limit: int,
        deadline: float,
    ) -> None:
        self.open, self.limit = 0, limit
        self._model, self._tokenizer, self._stages = model, tokenizer, stages
        self._guardrails = guardrails
        self._check_open, self._deadline = check_open, deadline

    @asynccontextmanager
    async def session(self, request: SessionRequest) -> AsyncIterator[World]:
        """A session until the block ends, before its first chunk.

        Raises:
            Busy: as many as may be are open.
            ApiError: the guardrails refuse the prompt, or cannot judge it.
            Cosmos3Error: none can be opened now, or not this one.
        """
        self._check_open()
        if self.open >= self.limit:
            raise Busy(f"{self.open} of {self.limit} sessions are open")
        self.open += 1
        metrics().sessions.set(self.open)
        name = uuid.uuid4().hex
        try:
            yield await asyncio.to_thread(self._begun, request, name)
        finally:
            self.open -= 1
            metrics().sessions.set(self.open)
            self._stages.release(name)

    def _begun(self, request: SessionRequest, name: str) -> World:
        """The session, if the guardrails let its prompt pass."""
        self._guardrails.check({"prompt": request.prompt}, self._tokenizer, requested=None)
        return make_world(request, self._model, self._tokenizer, name)

    async def run(self, world: World, plan: ChunkPlan) -> Output:
        """The frames of a chunk. Cancelling this stops the stage's work, and the session stays where it was.

        Raises:
            Cosmos3Error: it failed, or the guardrails refuse the frames.
        """
        submitted = asyncio.ensure_future(
            asyncio.to_thread(self._stages.submit, plan, deadline=self._deadline)
        )
        try:
            job = await asyncio.shield(submitted)
        except asyncio.CancelledError:
            submitted.add_done_callback(_abandon)
            raise
        try:
            output = await self._result(job)
        except asyncio.CancelledError:
            job.cancel()
            raise
        except Cosmos3Error as error:
            metrics().failure(slug(error))
            raise
        world.done(plan)
        assert output.video is not None  # rank 0 has it
        metrics().frames.inc(len(output.video))
        metrics().completed.labels("session").inc()
        return output

    async def _result(self, job: StageJob) -> Output:
        loop, end = asyncio.get_running_loop(), asyncio.Event()
        job.future.add_done_callback(lambda _: loop.call_soon_threadsafe(end.set))
        await end.wait()
        made: Output | Refusal = job.future.result()
        if isinstance(made, Refusal):
            raise ApiError(made.code, made.message)
        return made


def _abandon(submitted: asyncio.Future[StageJob]) -> None:
    if not submitted.cancelled() and submitted.exception() is None:
        submitted.result().cancel()
