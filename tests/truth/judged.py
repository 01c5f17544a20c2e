"""Clips that are asked of the demo checkpoint, and what the checker of its world makes of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from training.shares import Share
from training.yardstick import Prompt, confirmed_shares
from vllm_cosmos3 import Cosmos3

FIRST = 60_000_001  # seed of the first scene; nothing was ever trained on those from here on
FEW_STEPS = {"num_inference_steps": 16, "guidance_scale": 3.0}
SURE = ("colour", "motion", "gripper")


def made(model: Cosmos3, prompt: Prompt, **fields: Any) -> np.ndarray:
    video = model.generate(**prompt.fields | FEW_STEPS | {"seed": 0} | fields).video
    assert video is not None
    return video


def shares(prompts: list[Prompt], clips: list[np.ndarray]) -> dict[str, Share]:
    return confirmed_shares(p.confirmed(clip) for p, clip in zip(prompts, clips, strict=True))


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Mean of the levels between two pictures."""
    return float(np.abs(a.astype(int) - b.astype(int)).mean())
