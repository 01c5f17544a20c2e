"""A request of a stage as its owner sees it, and what takes requests: one stage or several.

Messages of the stage process end up here, whatever carried them.
"""

from __future__ import annotations

import math
import pickle
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from pathlib import Path
from typing import Any

from vllm_cosmos3.errors import Cosmos3Error
from vllm_cosmos3.progress import Preview, Progress, Report
from vllm_cosmos3.request.plan import Batch
from vllm_cosmos3.stage.maintenance import FOLLOWED_BY
from vllm_cosmos3.stage.messages import (
    Accepted,
    Done,
    Failure,
    PreviewUpdate,
    ProgressUpdate,
    Status,
    Submit,
)

PATIENCE = 600.0  # for running requests, before a call that none may be in the midst of
GRACE_SECONDS = 5.0  # beyond a deadline for the stage, or for the call under way, to end by itself


class StageJob:
    """A submitted request. ``future`` gets its result, or the error that ended it."""

    def __init__(
        self,
        name: str,
        cancel: Callable[[str], None],
        report: Report | None,
        deadline: float | None,
        show: Callable[[Preview], None] | None = None,
    ) -> None:
        self.name = name
        self.overdue = math.inf if deadline is None else time.monotonic() + deadline + GRACE_SECONDS
        self.future: Future[Any] = Future()
        self.future.set_running_or_notify_cancel()  # it is ended by the stage alone
        self.position: int | None = None  # in the queue, by its last message
        self.progress: Progress | None = None  # by its last message
        self._cancel = cancel
        self._report = report
        self._show = show
        self._raised: BaseException | None = None  # by report
        self.accepted: Future[None] = Future()

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the end: what the stage made, or the files it saved it to.

        Raises:
            Cosmos3Error: why there is no result.
            TimeoutError: it takes longer than ``timeout`` seconds.
        """
        return self.future.result(timeout)

    def cancel(self) -> None:
        """End the request with its current step; the future then raises Cancelled."""
        self._cancel(self.name)

    def handle(self, message: object) -> None:
        """Take what the stage tells of this request."""
        match message:
            case Accepted(position=position):
                self.position = position
                with suppress(InvalidStateError):  # it was before, or was given up meanwhile
                    self.accepted.set_result(None)
            case ProgressUpdate(progress=progress):
                self.progress = progress
                self._report_progress(progress)
            case PreviewUpdate(preview=preview):
                if self._show is not None:
                    self._show(preview)
            case Done(value=value):
                self._take(value)
            case Failure(error=error):
                with suppress(InvalidStateError):
                    self.accepted.set_exception(error)
                self.future.set_exception(self._raised or error)

    def _take(self, value: Any) -> None:
        try:
            result = _unspooled(value)
        except BaseException as error:  # noqa: BLE001 - the other jobs go on
            self._raised = self._raised or Cosmos3Error(f"the result cannot be read: {error}")
        if self._raised is None:
            self.future.set_result(result)
        else:  # of a report: too late to cancel
            self.future.set_exception(self._raised)

    def _report_progress(self, progress: Progress) -> None:
        if self._report is None:
            return
        try:
            self._report(progress)
        except BaseException as error:  # noqa: BLE001 - the owner's, and the owner gets it
            self._raised, self._report = error, None
            self.cancel()


class Stages(ABC):
    """What takes requests: a stage, or several behind one queue. Safe to use from several threads.

    ``devices`` are those that it was given, in the words of CUDA_VISIBLE_DEVICES; None: nobody chose.
    ``process_restarts`` is how often its process has ended and was started again.
    """

    devices: str | None = None
    process_restarts: int = 0

    def submit(
        self,
        plan: Any,
        *,
        seconds: float = 0.0,
        save: Path | None = None,
        clip: Any = None,
        deadline: float | None = None,
        report: Report | None = None,
        show: Callable[[Preview], None] | None = None,
        batch: Batch | None = None,
    ) -> StageJob:
        """Queue a request, which is a plan of the stage.

        Requests of one ``batch`` may be denoised together, unless they are shown. ``seconds`` estimate its work. With ``save`` rank 0 writes the result there; ``clip`` is
        handed to the stage's decode. ``deadline`` are the seconds it may take, waiting included. ``report`` is called in another thread,
        as is ``show`` with previews, which are made if it is given.

        Raises:
            Busy: the queue is full, or the stage is stopping.
            Cosmos3Error: the stage is gone, or does not answer.
        """
        job = StageJob(uuid.uuid4().hex, self.cancel, report, deadline, show)
        request = Submit(
            job=job.name,
            plan=plan,
            seconds=seconds,
            save=save,
            clip=clip,
            deadline=deadline,
            preview=show is not None,
            batch=batch if show is None else None,
        )
        self._take(job, request)
        return job

    @property
    @abstractmethod
    def members(self) -> tuple[Stages, ...]:
        """The stages, by replica."""

    @property
    @abstractmethod
    def can_serve(self) -> bool:
        """Whether a request that comes now would be served at once, or soon."""

    @property
    @abstractmethod
    def error(self) -> Cosmos3Error | None:
        """Why no request will ever be served again, None as long as one may."""

    @property
    @abstractmethod
    def silent(self) -> bool:
        """Whether what was ready has given no sign of life for too long."""

    @abstractmethod
    def last_sign_of_life(self) -> float:
        """Seconds since the last one."""

    @abstractmethod
    def status(self, timeout: float = 10.0) -> Status:
        """How it is, as it says within ``timeout`` seconds or as it was last heard."""

    @abstractmethod
    def wait_ready(self, timeout: float | None = None) -> None:
        """Wait until it can serve.

        Raises:
            Cosmos3Error: why it never will.
            TimeoutError: it takes longer than ``timeout`` seconds.
        """

    def maintain(self, method: str, *args: Any, patience: float = PATIENCE) -> Any:
        """Call a method of the stage on all ranks between two requests; the value of the first rank.

        Running requests end before, others wait: after ``sleep`` until ``wake_up``, and after
        ``start_weight_update`` until the update ends. What fails on one rank is undone on all.

        Raises:
            Busy: running requests have not ended within ``patience`` seconds; nothing was called.
            Cosmos3Error: the call failed, or the stage is gone.
        """
        value = self._maintain(method, *args, patience=patience)
        if method in FOLLOWED_BY:
            self._maintain(FOLLOWED_BY[method], patience=patience)
        return value

    @property
    @abstractmethod
    def updates(self) -> int:
        """Weight updates of its ranks since they have loaded the checkpoint, as it was last heard."""

    @abstractmethod
    def cancel(self, name: str) -> None:
        """End a request with its current step."""

    @abstractmethod
    def release(self, name: str) -> None:
        """Give up what is kept under this name between requests, if anything is; returns at once."""

    @abstractmethod
    def close(self) -> None:
        """End everything now. Can be repeated."""

    @abstractmethod
    def _maintain(self, method: str, *args: Any, patience: float) -> Any:
        """One call of `maintain`."""

    @abstractmethod
    def _take(self, job: StageJob, request: Submit) -> None:
        """Queue a request, or raise why not."""


def _unspooled(value: Any) -> Any:
    """The result itself where it was left in a file."""
    if not isinstance(value, Path):
        return value
    try:
        with value.open("rb") as file:
            return pickle.load(file)
    finally:
        value.unlink(missing_ok=True)
