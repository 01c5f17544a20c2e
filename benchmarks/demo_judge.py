"""Judge of the demo world for ``compare``: whether a clip shows what its prompt says.

    python -m benchmarks.demo_judge 64 > prompts.txt
    python -m vllm_cosmos3 compare checkpoints/demo --prompts prompts.txt --out page --size 320x192 \
        --num-frames 17 --fps 12 --num-inference-steps 16 --guidance-scale 3 --judge benchmarks.demo_judge:shows

Its prompts are held-out ones, each about a scene that the checker of that world knows.
"""

from __future__ import annotations

import sys
from functools import cache

import numpy as np

from training.captions import Caption
from training.observing import confirm, observe
from training.pools import held_out
from training.scenes import Canvas, Scene

HELD_OUT = 60_000_000  # first seed
COUNT = 4096  # of scenes that are known by their prompts
RATE = 12  # frames per second, of all clips alike


@cache
def asked() -> dict[str, tuple[Scene, Caption]]:
    """Scenes at one frame rate by their prompts."""
    scenes, captions = held_out(HELD_OUT, COUNT, Canvas())
    pairs = zip(scenes, captions, strict=True)
    return {c.text: (s, c) for s, c in pairs if s.canvas.fps == RATE}


def shows(prompt: str, clip: np.ndarray) -> bool:
    """Whether all that the prompt says is seen in the clip, uint8 [T, H, W, 3]."""
    scene, caption = asked()[prompt]
    return confirm(scene, caption, observe(clip))["all"]


if __name__ == "__main__":
    print(*list(asked())[: int(sys.argv[1])], sep="\n")
