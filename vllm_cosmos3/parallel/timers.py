"""Seconds per phase of a request, and how far the host may run ahead of the device."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

AHEAD = 300.0  # milliseconds
# Those that every request has.
PHASES = ("text", "vae_encode", "denoise", "vae_decode", "sound", "to_cpu")


class Timers:
    """Seconds per phase of one request, measured on the device without stopping it.

    An accelerator is asked for the times at the end. A ``paced`` phase starts when the one before
    has ended, so that progress tells the truth and a cancelled request stops soon; where phases are
    shorter than AHEAD the host runs one of them ahead, so that the device never waits for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[tuple[str, torch.Event, torch.Event]] = []
        self._seconds: defaultdict[str, float] = defaultdict(float, dict.fromkeys(PHASES, 0.0))

    @contextmanager
    def phase(self, name: str, *, paced: bool = False) -> Iterator[None]:
        if self._device.type == "cpu":
            start = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - start
            return
        if paced and self._spans:
            self._pace()
        before, after = (torch.Event(self._device, enable_timing=True) for _ in range(2))
        before.record()
        yield
        after.record()
        self._spans.append((name, before, after))

    def _pace(self) -> None:
        if len(self._spans) > 1:
            _, before, after = self._spans[-2]
            after.synchronize()
            if before.elapsed_time(after) < AHEAD:
                return
        self._spans[-1][2].synchronize()

    def totals(self) -> dict[str, float]:
        """Seconds of every phase so far. Waits for the device."""
        for name, before, after in self._spans:
            after.synchronize()
            self._seconds[name] += before.elapsed_time(after) / 1000
        self._spans.clear()
        return dict(self._seconds)
