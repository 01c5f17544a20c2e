"""Company: requests of one batch that are made by one pipeline in one process, in shared steps.

Each has a thread that waits for it. The first of a company makes it for all of them, as soon as the
device is free; those that come until then, or within `COMPANY_SECONDS`, are of it.
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

COMPANY_SECONDS = 0.004  # that a request may wait for others of its batch, its encoding included


class Apart(Exception):
    """A request of a company is to be made by itself: nobody knows that it would fail there."""


@dataclass(slots=True, eq=False)
class Guest:
    """A request of a company, how far it is, and what becomes of it: `Apart` says to make it alone."""

    calls: CallSequence
    report: Report
    cancelled: Event
    state: Any = None
    future: Future[Output] = field(default_factory=Future)

    def leave(self, error: Exception) -> None:
        """End it here, and free what it holds."""
        self.state = None
        self.future.set_exception(error)

    @property
    def here(self) -> bool:
        return not self.future.done()


Company = list[Guest]


class Companies:
    """The companies of a process that have not begun. Safe to use from several threads."""

    def __init__(self) -> None:
        self._open: dict[Batch, Company] = {}
        self._changed = Condition()

    def join(self, batch: Batch, guest: Guest) -> Company | None:
        """A new company if the guest is the first of one, which is then its to `make`; else None."""
        with self._changed:
            company = self._open.get(batch)
            if company is not None and len(company) < batch.size:
                company.append(guest)
                self._changed.notify_all()
                return None
            self._open[batch] = company = [guest]
            return company

    def make(self, batch: Batch, company: Company, pipeline: Any) -> None:
        """Make all requests of a company, and of those that join it until it begins.

        Each future is done then.
        """
        try:
            self._gather(batch, company, pipeline)
            _denoise(company, pipeline)
            for guest in company:
                if guest.here:
                    _finish(guest, pipeline)
        finally:
            self._close(batch, company)
            for guest in company:
                if guest.here:
                    guest.leave(Apart())

    def _gather(self, batch: Batch, company: Company, pipeline: Any) -> None:
        """Encode who is there, until the company is full or nobody has come for a moment."""
        until, encoded = time.monotonic() + COMPANY_SECONDS, 0
        while True:
            while encoded < len(company):
                _encode(company[encoded], pipeline)
                encoded += 1
            with self._changed:
                wait = max(0.0, until - time.monotonic()) if encoded < batch.size else 0.0
                came = partial(_more_than, encoded, company)
                if not self._changed.wait_for(came, wait):
                    self._forget(batch, company)
                    return

    def _close(self, batch: Batch, company: Company) -> None:
        with self._changed:
            self._forget(batch, company)

    def _forget(self, batch: Batch, company: Company) -> None:
        if self._open.get(batch) is company:
            del self._open[batch]


def _more_than(count: int, company: Company) -> bool:
    return len(company) > count


def _encode(guest: Guest, pipeline: Any) -> None:
    def call(_: str, plan: Any) -> None:
        guest.state = pipeline.encode(plan)

    try:
        guest.calls.advance(call, guest.report)
    except Exception as error:  # noqa: BLE001 - whatever it is, it ends this one alone
        guest.leave(_apart_without_memory(error))


def _denoise(company: Company, pipeline: Any) -> None:
    """The steps that all of them share; who is cancelled leaves between two."""
    while True:
        for guest in company:
            if guest.here and guest.cancelled.is_set():
                guest.leave(cancelled_after(guest.calls))
        going = [guest for guest in company if guest.here and guest.calls.phase == "denoise"]
        if not going:
            return
        try:
            counts = pipeline.step_together([guest.state for guest in going])
        except Exception:
            logger.exception("%d requests failed in a step together", len(going))
            for guest in going:
                guest.leave(Apart())
            return
        for guest, count in zip(going, counts, strict=True):
            try:
                guest.calls.advance(lambda _, count=count: count, guest.report)
            except Exception as error:  # noqa: BLE001 - of its report
                guest.leave(error)


def _finish(guest: Guest, pipeline: Any) -> None:
    try:
        guest.calls.advance(lambda _, clip: pipeline.decode(guest.state, clip), guest.report)
        output = pipeline.finish(guest.state)
    except Exception as error:  # noqa: BLE001 - whatever it is, it ends this one alone
        guest.leave(_apart_without_memory(error))
        return
    guest.state = None
    guest.future.set_result(output)


def cancelled_after(calls: CallSequence) -> Cancelled:
    """Why a request ended between two steps."""
    return Cancelled(f"cancelled after {calls.step} of {calls.plan.steps} steps")


def _apart_without_memory(error: Exception) -> Exception:
    """There may be the memory for it alone."""
    return Apart() if isinstance(error, OutOfMemory) or is_out_of_memory(error) else error
