"""The calls that make a request, one at a time: encode, a step for each noise level, decode, finish."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from vllm_cosmos3.progress import Progress, Report


class CallSequence:
    """The calls of one request, of which ``plan.steps`` are steps, and how far they are."""

    def __init__(self, plan: Any, clip: Any = None) -> None:
        self.plan, self.clip = plan, clip
        self.phase, self.step, self._reused = "encode", 0, 0
        self._started = self._phase_started = 0.0

    def advance(self, call: Callable[..., Any], report: Report) -> bool:
        """Make the next call and report; whether ``finish`` alone is left, which gives the result.

        ``call`` takes the name of a call and its arguments, and gives what it returns.
        """
        if self.phase == "encode":
            self._started = time.monotonic()
            report(self.progress())
            call("encode", self.plan)
            self._enter("denoise" if self.plan.steps else "decode")
        elif self.phase == "denoise":
            self._reused = call("step")
            self.step += 1
            if self.step == self.plan.steps:
                report(self.progress())
                self._enter("decode")
        else:
            call("decode", self.clip)
            return True
        report(self.progress())
        return False

    def progress(self) -> Progress:
        """Where the request stands; while it is denoised, with the time that the steps still take."""
        now, steps, eta = time.monotonic(), self.plan.steps, None
        if self.phase == "denoise" and self.step:
            eta = (now - self._phase_started) / self.step * (steps - self.step)
        return Progress(
            phase=self.phase,
            step=self.step,
            steps=steps,
            elapsed=now - self._started,
            eta=eta,
            reused=self._reused,
        )

    def _enter(self, phase: str) -> None:
        self.phase, self._phase_started = phase, time.monotonic()
