"""Dynamic batching of concurrent requests in one process: those of one batch share their steps.

Each request has a thread that waits for it. The thread that opens a batch runs it for all of them, as
soon as the device is free; those that arrive until then, or within `BATCH_WAIT_SECONDS`, are added to it.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from threading import Condition, Event
from typing import Any

from vllm_cosmos3.errors import Cancelled, OutOfMemory
from vllm_cosmos3.generator.output import Output
from vllm_cosmos3.progress import Report
from vllm_cosmos3.request.plan import Batch
from vllm_cosmos3.stage.call_sequence import CallSequence
from vllm_cosmos3.stage.worker import is_out_of_memory

logger = logging.getLogger(__name__)

BATCH_WAIT_SECONDS = 0.004  # that a request may wait for others of its batch, encoding included


class RunAlone(Exception):
    """The batch failed with this request in it; it has to be run again by itself."""


@dataclass(slots=True, eq=False)
class BatchedRequest:
    """A request in a batch: its progress, and a future of its output, which may raise `RunAlone`."""

    calls: CallSequence
    report: Report
    cancelled: Event
    state: Any = None
    future: Future[Output] = field(default_factory=Future)

    def fail(self, error: Exception) -> None:
        """Take the request out of the batch, and free its state."""
        self.state = None
        self.future.set_exception(error)

    @property
    def unfinished(self) -> bool:
        return not self.future.done()


class PendingBatches:
    """The batches of a process that have not started, one for each key. Thread-safe."""

    def __init__(self) -> None:
        self._open: dict[Batch, list[BatchedRequest]] = {}
        self._changed = Condition()

    def add(self, batch: Batch, request: BatchedRequest) -> list[BatchedRequest] | None:
        """The new batch if the request opens one, which its caller has to `run`; else None."""
        with self._changed:
            requests = self._open.get(batch)
            if requests is not None and len(requests) < batch.size:
                requests.append(request)
                self._changed.notify_all()
                return None
            self._open[batch] = requests = [request]
            return requests

    def run(self, batch: Batch, requests: list[BatchedRequest], pipeline: Any) -> None:
        """Run all requests of a batch, and those that are added until it starts.

        Each future is done then.
        """
        try:
            self._collect(batch, requests, pipeline)
            _denoise(requests, pipeline)
            for request in requests:
                if request.unfinished:
                    _decode(request, pipeline)
        finally:
            self._close(batch, requests)
            for request in requests:
                if request.unfinished:
                    request.fail(RunAlone())

    def _collect(self, batch: Batch, requests: list[BatchedRequest], pipeline: Any) -> None:
        """Encode requests as they arrive, until the batch is full or the wait is over."""
        until, encoded = time.monotonic() + BATCH_WAIT_SECONDS, 0
        while True:
            while encoded < len(requests):
                _encode(requests[encoded], pipeline)
                encoded += 1
            with self._changed:
                wait = max(0.0, until - time.monotonic()) if encoded < batch.size else 0.0
                arrived = partial(_more_than, encoded, requests)
                if not self._changed.wait_for(arrived, wait):
                    self._remove(batch, requests)
                    return

    def _close(self, batch: Batch, requests: list[BatchedRequest]) -> None:
        with self._changed:
            self._remove(batch, requests)

    def _remove(self, batch: Batch, requests: list[BatchedRequest]) -> None:
        if self._open.get(batch) is requests:
            del self._open[batch]


def _more_than(count: int, requests: list[BatchedRequest]) -> bool:
    return len(requests) > count


def _encode(request: BatchedRequest, pipeline: Any) -> None:
    def call(_: str, plan: Any) -> None:
        request.state = pipeline.encode(plan)

    try:
        request.calls.advance(call, request.report)
    except Exception as error:  # noqa: BLE001 - whatever it is, it fails this request only
        request.fail(_alone_if_out_of_memory(error))


def _denoise(requests: list[BatchedRequest], pipeline: Any) -> None:
    """Run the shared steps; cancelled requests are taken out between two steps."""
    while True:
        for request in requests:
            if request.unfinished and request.cancelled.is_set():
                request.fail(cancelled_after(request.calls))
        running = [
            request
            for request in requests
            if request.unfinished and request.calls.phase == "denoise"
        ]
        if not running:
            return
        try:
            counts = pipeline.step_together([request.state for request in running])
        except Exception:
            logger.exception("a step of a batch of %d requests failed", len(running))
            for request in running:
                request.fail(RunAlone())
            return
        for request, count in zip(running, counts, strict=True):
            try:
                request.calls.advance(lambda _, count=count: count, request.report)
            except Exception as error:  # noqa: BLE001 - of its report
                request.fail(error)


def _decode(request: BatchedRequest, pipeline: Any) -> None:
    try:
        request.calls.advance(lambda _, clip: pipeline.decode(request.state, clip), request.report)
        output = pipeline.finish(request.state)
    except Exception as error:  # noqa: BLE001 - whatever it is, it fails this request only
        request.fail(_alone_if_out_of_memory(error))
        return
    request.state = None
    request.future.set_result(output)


def cancelled_after(calls: CallSequence) -> Cancelled:
    """The error of a request that was cancelled between two steps."""
    return Cancelled(f"cancelled after {calls.step} of {calls.plan.steps} steps")


def _alone_if_out_of_memory(error: Exception) -> Exception:
    """`RunAlone` instead of an out-of-memory error: the memory may suffice for the request alone."""
    return RunAlone() if isinstance(error, OutOfMemory) or is_out_of_memory(error) else error
