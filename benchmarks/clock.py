"""Time on a device: events around calls, and between the steps of a request that nobody stops."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch

from vllm_cosmos3.progress import Progress

Mark = float | torch.Event


def mark(device: torch.device) -> Mark:
    """Now: of the work that was given to the device before, not of the host."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.Event(device, enable_timing=True)
    event.record()
    return event


def between(before: Mark, after: Mark) -> float:
    """Seconds from one mark to the other. Waits until the device is there."""
    if isinstance(before, float) or isinstance(after, float):
        return after - before
    after.synchronize()
    return float(before.elapsed_time(after)) / 1000


def seconds(call: Callable[[], object], device: torch.device, *, repeat: int, warm: int) -> float:
    """Median of ``repeat`` calls after ``warm`` ones, each between two marks of the device."""
    for _ in range(warm):
        call()
    pairs = []
    for _ in range(repeat):
        before = mark(device)
        call()
        pairs.append((before, mark(device)))
    return statistics.median(between(*pair) for pair in pairs)


def mean_seconds(call: Callable[[], object], device: torch.device, count: int) -> float:
    """Mean of so many calls, one after the other between two marks of the device."""
    synchronize(device)
    before = mark(device)
    for _ in range(count):
        call()
    return between(before, mark(device)) / count


def now(device: torch.device) -> float:
    """Seconds of the host's clock, when the device has done what it was given."""
    synchronize(device)
    return time.perf_counter()


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class StepClock:
    """A progress callback that marks the end of each step on the device. Nothing waits for it.

    The callback comes from the thread that gave the step to the device, and marks the same stream,
    so two neighbouring marks span one step and whatever the device idled before it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Mark] = []

    def __call__(self, progress: Progress) -> None:
        if progress.phase == "denoise":
            self._marks.append(mark(self._device))

    def steps(self) -> list[float]:
        """Seconds of each step, in their order."""
        return [between(*pair) for pair in pairwise(self._marks)]


def percentile(values: list[float], percent: float) -> float:
    """The smallest value that at least ``percent`` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-round(len(ordered) * percent) // 100) - 1)]
