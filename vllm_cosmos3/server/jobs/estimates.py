"""Throughput of the ranks, learnt from the requests that they served, and the waits that follow.

A request's work is counted in tokens times passes, which is proportional to seconds near enough:
attention grows faster, so the largest requests of a mixed load take longer than is said here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping

from vllm_cosmos3.checkpoint.latents import token_count
from vllm_cosmos3.request.plan import Plan
from vllm_cosmos3.server.jobs.video_job import VideoJob

NEWEST_WEIGHT = 0.3  # of the last request in the average


class ThroughputEstimate:
    """Seconds per unit of work on a replica. Unknown until a first request has made a step."""

    def __init__(self, replicas: int = 1) -> None:
        self._rate, self._replicas = 0.0, replicas

    def observe(self, work: float, seconds: float) -> None:
        """A whole request of so much work took so long."""
        rate = seconds / work
        known = self._rate or rate
        self._rate = (1 - NEWEST_WEIGHT) * known + NEWEST_WEIGHT * rate

    def observe_partial(self, work: float, share: float, seconds: float) -> None:
        """A part of the first request took so long: better than nothing until it is done."""
        if not self._rate:
            self._rate = seconds / (work * share)

    def seconds(self, work: float) -> float:
        """Seconds of a request of so much work; 0 while nothing is known."""
        return work * self._rate

    def remaining(self, job: VideoJob) -> float:
        """Seconds until a request is done that has the ranks to itself; 0 while nothing is known."""
        whole = self.seconds(job.work)
        if job.started is None:
            return whole
        return job.eta if job.eta is not None else max(0.0, whole - (time.time() - job.started))

    def wait(self, before: Iterable[VideoJob]) -> float:
        """Seconds until the replicas, which share the work, have done all of these."""
        return sum(map(self.remaining, before)) / self._replicas

    def queue_eta(self, job: VideoJob, others: Iterable[VideoJob]) -> float | None:
        """Seconds until a waiting request is done, behind those that run or wait before it."""
        if not self.seconds(job.work):
            return None
        place = math.inf if job.position is None else job.position
        before = [
            other
            for other in others
            if other.started is not None or (other.position is not None and other.position < place)
        ]
        return round(self.remaining(job) + self.wait(before), 1)


def seconds_spent(heard: float, timings: Mapping[str, float]) -> float:
    """Seconds on the ranks of a request whose begin and end were ``heard`` so far apart.

    They are no fewer than those of its phases: a process that is held up hears both at once.
    """
    return max(heard, sum(spent for name, spent in timings.items() if name != "per_step"))


def work(plan: Plan, patch: int) -> float:
    """Work of a request: tokens, of ``patch`` x ``patch`` latents of a video, times passes."""
    tokens = sum(token_count(stream.name, stream.shape, patch) for stream in plan.streams)
    return float(tokens * plan.steps * len(plan.token_ids))
