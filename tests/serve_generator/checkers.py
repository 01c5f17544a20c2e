"""Stands for a guardrail package; the servers of the tests import it by name."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np


class Words:
    """Blocks prompts and pictures by a word, and breaks by another; told to list, it says what is imported."""

    def check_text(self, prompt: str) -> str | None:
        if "broken" in prompt:
            raise RuntimeError("the checker is broken")
        if prompt == "list vllm":
            return f"vllm: {'vllm' in sys.modules}"
        return "violence" if "forbidden" in prompt else None

    def check_frames(self, frames: np.ndarray) -> tuple[np.ndarray | None, dict[str, Any]]:
        if frames.shape[-2] == 128:  # stands for a picture that is refused
            return None, {}
        return 255 - frames, {"faces_blurred": 0}
