"""How much video one request may ask for, and who processes it. Set by the operator in the environment.

Requests may carry their own processor settings where the server trusts them to, so these lie where
no request can reach them.
"""

from __future__ import annotations

import math
import os

from vllm_cosmos3.errors import InvalidRequest

FRAMES, FPS = "VLLM_COSMOS3_MAX_VIDEO_FRAMES", "VLLM_COSMOS3_MAX_VIDEO_FPS"
PROCESSOR = "VLLM_COSMOS3_PROCESSOR"
CONNECTOR = "cosmos3"  # what VLLM_MEDIA_CONNECTOR names, so that no request passes the caps by
DEFAULT_FRAMES = 1800  # a minute at 30 fps; 5 GB of pixels at 1280x720
DEFAULT_FPS = 30.0


def max_video_frames() -> int:
    """Frames that are decoded of one clip at most."""
    return int(_positive(FRAMES, DEFAULT_FRAMES))


def max_video_fps() -> float:
    """Highest ``fps`` that a request may sample at."""
    return _positive(FPS, DEFAULT_FPS)


def uses_reference() -> bool:
    """Whether pixels go through vLLM's and transformers' processors instead of ours."""
    name = os.environ.get(PROCESSOR, "cosmos3")
    if name not in ("cosmos3", "reference"):
        raise InvalidRequest(PROCESSOR, name, "cosmos3 or reference")
    return name == "reference"


def _positive(name: str, default: float) -> float:
    text = os.environ.get(name, str(default))
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value < math.inf:
        raise InvalidRequest(name, text, "a number of at least 1")
    return value
