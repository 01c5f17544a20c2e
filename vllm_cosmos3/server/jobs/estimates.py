"""How long requests will take, learnt from those that were served.

A request's work is counted in tokens times passes, which is proportional to seconds near enough:
attention grows faster, so the largest requests of a mixed load take longer than is said here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable

from vllm_cosmos3.checkpoint.latents import token_count
from vllm_cosmos3.request.plan import Plan
from vllm_cosmos3.server.jobs.journal import Job

FRESH = 0.3  # weight of the last request in the pace


class Pace:
    """Seconds per unit of work. Knows nothing until a first request has made a step."""

    def __init__(self) -> None:
        self._rate = 0.0

    def learn(self, work: float, seconds: float) -> None:
        """A whole request of so much work took so long."""
        rate = seconds / work
        self._rate = rate if not self._rate else (1 - FRESH) * self._rate + FRESH * rate

    def glimpse(self, work: float, share: float, seconds: float) -> None:
        """A part of the first request took so long: better than nothing until it is done."""
        if not self._rate:
            self._rate = seconds / (work * share)

    def seconds(self, work: float) -> float:
        """What a request of so much work will take; 0 if nothing is known."""
        return work * self._rate


def left(job: Job, pace: Pace) -> float:
    """Seconds until a request is done that has the ranks to itself; 0 if nothing is known."""
    whole = pace.seconds(job.work)
    if job.started is None:
        return whole
    return job.eta if job.eta is not None else max(0.0, whole - (time.time() - job.started))


def queue_eta(job: Job, others: Iterable[Job], pace: Pace) -> float | None:
    """Seconds until a waiting request is done, behind those that run or wait before it."""
    if not pace.seconds(job.work):
        return None
    place = math.inf if job.position is None else job.position
    before = [
        other
        for other in others
        if other.started is not None or (other.position is not None and other.position < place)
    ]
    return round(left(job, pace) + sum(left(other, pace) for other in before), 1)


def work(plan: Plan, patch: int) -> float:
    """What a request costs: tokens, of ``patch`` x ``patch`` latents of a video, times passes."""
    tokens = sum(token_count(stream.name, stream.shape, patch) for stream in plan.streams)
    return float(tokens * plan.steps * len(plan.token_ids))
