"""The yardstick: the share of held-out prompts that clips confirm, by attribute, with an interval.

For whatever changes bits: kernels, dtypes, weights elsewhere, fewer steps, other guidance.

    with Cosmos3("demo") as model:
        prompts = held_out_prompts(64)
        exact = results_of(lambda p: model.generate(**p.fields).video, prompts)
        fast = results_of(lambda p: model.generate(**p.fields, num_inference_steps=8).video, prompts)
    print(confirmed_shares(exact)["all"])       # 0.891 [0.791, 0.946] of 64
    print(changes(exact, fast)["shape"])        # -0.016 [-0.071, +0.040] of 64
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.captions import Caption, draw_caption
from training.observing import confirm, observe
from training.pools import scenes_at
from training.rendering import pack, render, segmented, to_bytes, true_clip
from training.scenes import Canvas, Scene
from training.shares import Share, changes, confirmed_shares
from training.sounds import on_time

__all__ = [
    "Prompt", "changes", "confirmed_by_attribute", "confirmed_shares", "held_out_prompts", "results_of",
]  # fmt: skip

FIRST = 50_000_000  # seed of the first scene; nothing was trained on those from here on
Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """A scene that was never trained on, and what is asked of a model that should show it."""

    scene: Scene
    caption: Caption

    @property
    def fields(self) -> dict[str, Any]:
        """Those of `Cosmos3.generate` and of `POST /v1/videos`, but for steps and guidance."""
        canvas = self.scene.canvas
        return {
            "prompt": self.caption.text, "size": f"{canvas.width}x{canvas.height}",
            "num_frames": canvas.frames, "fps": canvas.fps, "seed": self.scene.seed % 2**32,
            "generate_sound": False,
        }  # fmt: skip

    def frames(self, count: int) -> Pixels:
        """The first frames of the true clip, uint8 [count, H, W, 3], for a model to go on from."""
        return true_clip(self.scene, range(count)).numpy()

    def control(self, name: str) -> dict[str, Any]:
        """The field of a request that follows the ``edge`` or ``seg`` of the true clip."""
        canvas = self.scene.canvas
        if name == "edge":
            return {"edge": True, "video": self.frames(canvas.frames)}
        pixels = render(segmented(pack([self.scene])), canvas.height, canvas.width)
        return {name: to_bytes(pixels)[0].numpy()}

    def confirmed(self, clip: Pixels, sound: NDArray[np.float32] | None = None) -> dict[str, bool]:
        """Which attributes the clip uint8 [T, H, W, 3] confirms; ``all`` is every one together.

        With samples of its sound [2, N] at 48 kHz, also whether that is on time.
        """
        seen = observe(clip)
        result = confirm(self.scene, self.caption, seen)
        if sound is not None:
            result["sound"] = on_time(self.scene, seen, sound)
            result["all"] = result["all"] and result["sound"]
        return result


def held_out_prompts(
    count: int,
    first: int = FIRST,
    canvas: Canvas | None = None,
    *,
    grown: bool = False,
    materials: tuple[str, ...] = ("rubber",),
) -> list[Prompt]:
    """Prompts of the scenes with seeds from ``first``.

    ``grown`` adds the rarer kinds of scenes, ``materials`` other than rubber the spots and words that say
    how a thing sounds.
    """
    seeds = range(first, first + count)
    scenes = scenes_at(seeds, canvas or Canvas(), grown=grown, materials=materials)
    return [Prompt(scene, draw_caption(scene)) for scene in scenes]


def results_of(
    make: Callable[[Prompt], Pixels], prompts: Iterable[Prompt]
) -> list[dict[str, bool]]:
    """For each prompt which attributes the clip that ``make`` returns confirms."""
    return [prompt.confirmed(make(prompt)) for prompt in prompts]


def confirmed_by_attribute(
    make: Callable[[Prompt], Pixels], prompts: Iterable[Prompt]
) -> dict[str, Share]:
    """The share of prompts confirmed, by attribute: colour, motion, gripper, tone, size, shape, all."""
    return confirmed_shares(results_of(make, prompts))
