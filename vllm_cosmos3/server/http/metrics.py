"""Prometheus families of the generator, in the process that serves HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

from vllm_cosmos3.errors import Cosmos3Error
from vllm_cosmos3.server.http.api_errors import slug

BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200, 1800, 3600)
BATCH_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16)
STEP_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Made once per process, after vLLM has settled where metrics are kept."""

    def __init__(self) -> None:
        # With several API processes each has its own queue; the page then shows the sum.
        self.waiting = Gauge("cosmos3:queue_depth", "requests waiting", multiprocess_mode="sum")
        self.limit = Gauge(
            "cosmos3:queue_limit", "most requests that may wait", multiprocess_mode="sum"
        )
        self.running = Gauge(
            "cosmos3:requests_running", "requests running on the ranks", multiprocess_mode="sum"
        )
        self.sessions = Gauge(
            "cosmos3:sessions_open",
            "sessions of a simulator that are open",
            multiprocess_mode="sum",
        )
        self.waiting_seconds = Gauge(
            "cosmos3:queue_seconds",
            "estimated seconds of work that wait, on one replica",
            multiprocess_mode="sum",
        )
        self._ready = _by_replica("cosmos3:replica_ready", "1 if the replica can take work, else 0")
        self._running = _by_replica("cosmos3:replica_running", "requests running on the replica")
        self._restarts = _by_replica(
            "cosmos3:replica_restarts", "times that the replica's ranks were replaced"
        )
        self.sleeping = Gauge(
            "cosmos3:sleeping", "1 while the weights rest in host memory", multiprocess_mode="max"
        )
        self.given_up = Gauge(
            "cosmos3:weight_updates_given_up",
            "weight updates that ended because their trainer was silent",
            multiprocess_mode="max",
        )
        self.stored = Gauge(
            "cosmos3:stored_bytes", "bytes of stored results", multiprocess_mode="max"
        )
        self.peak = Gauge(
            "cosmos3:peak_memory_bytes",
            "peak memory of a request in bytes",
            multiprocess_mode="max",
        )
        self.rejected = Counter(
            "cosmos3:requests_rejected", "requests refused, by code", ["reason"]
        )
        self.completed = Counter("cosmos3:requests_completed", "requests completed", ["kind"])
        self.cancelled = Counter("cosmos3:requests_cancelled", "requests cancelled")
        self.wasted = Counter("cosmos3:cancelled_gpu_seconds", "seconds of work after a cancel")
        self.failed = Counter("cosmos3:requests_failed", "accepted requests that failed", ["code"])
        self.expired = Counter("cosmos3:jobs_expired", "results deleted by age or quota")
        self.frames = Counter("cosmos3:output_frames", "frames generated")
        self.step = Histogram(
            "cosmos3:step_seconds", "seconds per denoising step", buckets=STEP_BUCKETS
        )
        self.batch = Histogram(
            "cosmos3:batch_size", "samples denoised together, by request", buckets=BATCH_BUCKETS
        )
        self.phase = Histogram(
            "cosmos3:phase_seconds", "seconds per phase of a request", ["phase"], buckets=BUCKETS
        )
        for reason in ("queue_full", "invalid_value", "draining", "loading", "sleeping"):
            self.rejected.labels(reason)
        for code in ("out_of_memory", "worker_lost", "deadline_exceeded", "internal_error"):
            self.failed.labels(code)

    def replica(self, report: Mapping[str, Any]) -> None:
        """How a replica is, as /health reports it."""
        name = str(report["replica"])
        self._ready.labels(name).set(report["state"] == "ready")
        self._running.labels(name).set(report["running"])
        self._restarts.labels(name).set(report["restarts"])

    def failure(self, code: str) -> None:
        """Count an accepted request that came to nothing."""
        if code == "cancelled":
            self.cancelled.inc()
        else:
            self.failed.labels(code).inc()

    def completion(
        self,
        kind: str,
        frames: int,
        peak_memory: int,
        batch_size: int,
        timings: Mapping[str, float],
    ) -> None:
        """Count a request that was served: its frames, bytes of memory, batch size and seconds by phase."""
        self.completed.labels(kind).inc()
        self.frames.inc(frames)
        self.peak.set(max(peak_memory, 0))
        self.batch.observe(batch_size)
        self.step.observe(timings.get("per_step", 0.0))
        for phase, spent in timings.items():
            if phase != "per_step":
                self.phase.labels(phase).observe(max(0.0, spent))

    def refused(self, error: Cosmos3Error) -> None:
        """Count a request that is refused, by the code of its answer."""
        self.rejected.labels(slug(error)).inc()


def _by_replica(name: str, help: str) -> Gauge:
    return Gauge(name, help, ["replica"], multiprocess_mode="sum")


_made: list[Metrics] = []


def metrics() -> Metrics:
    """The families of this process; Prometheus refuses to have them twice."""
    if not _made:
        _made.append(Metrics())
    return _made[0]
