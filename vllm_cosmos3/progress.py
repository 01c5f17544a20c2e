"""How far a request is: what callbacks and event streams get while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a request stands. ``eta`` are the seconds the phase still takes, None if unknown.

    ``phase`` is encode, denoise or decode; ``step`` of ``steps`` are done, of which ``reused`` were
    taken from the step cache; ``elapsed`` seconds have passed since the request was started.
    """

    phase: str
    step: int
    steps: int
    elapsed: float
    eta: float | None
    reused: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """Small picture of a video in the making: a JPEG of the estimate after ``step`` steps."""

    step: int
    jpeg: bytes


Report = Callable[[Progress], None]
