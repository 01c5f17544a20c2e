"""Check of frames by the guardrails, in the workers that make them.

`guardrails` chooses the checker, and checks texts with it.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from vllm_cosmos3.errors import Cosmos3Error
from vllm_cosmos3.media import Pixels

logger = logging.getLogger(__name__)

# Tells the workers which checker is active. vLLM hands what begins with VLLM_ on, to Ray's too.
CHECKER = "VLLM_COSMOS3_GUARDRAIL_CHECKER"
FrameCheck = Callable[[Pixels], tuple[Pixels, dict[str, Any]]]


class Checker(Protocol):
    """Judges prompts and frames. The constructor raises if it cannot work here."""

    def check_text(self, prompt: str) -> str | None:
        """None if the prompt is allowed, else a category."""

    def check_frames(self, frames: Pixels) -> tuple[Pixels | None, dict[str, Any]]:
        """The frames to deliver, or None to refuse them, and facts for the record."""


class Blocked(Cosmos3Error):
    """The guardrails refused the result."""

    code = "guardrail_blocked"


class CheckFailed(Cosmos3Error):
    """The guardrails could not judge the result."""

    code = "guardrail_error"


@dataclass(frozen=True, slots=True)
class Refusal:
    """The guardrails' verdict in place of the frames of a chunk. It is no error of a rank: others know nothing of it."""

    code: str
    message: str


def load(name: str) -> Checker:
    """The checker "module:Class", made."""
    module, _, attribute = name.partition(":")
    checker: Checker = getattr(importlib.import_module(module), attribute)()
    return checker


_loaded: dict[str, Checker] = {}


def frame_check() -> FrameCheck | None:
    """What a worker does with finished frames; None where no guardrails are active."""
    name = os.environ.get(CHECKER)
    if name is None:
        return None
    if name not in _loaded:
        _loaded[name] = load(name)
    checker = _loaded[name]

    def check(frames: Pixels) -> tuple[Pixels, dict[str, Any]]:
        try:
            checked, facts = checker.check_frames(frames)
        except Exception as error:  # noqa: BLE001 - another package's; nothing unchecked leaves
            logger.error("the frame guardrail failed: %s", error)
            raise CheckFailed("the frame guardrail failed, so nothing was delivered") from None
        if checked is None:
            raise Blocked("the result was blocked by the guardrails")
        return checked, {"video": "pass", **facts}

    return check
