"""Clips show what was asked for: the checker of the demo world sees it in their pixels.

Bounds are below the shares of many more prompts, which ``benchmarks/truth.py`` measures.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from training.captions import Caption
from training.observing import confirm, observe
from training.rendering import true_clip
from training.scenes import Scene
from training.shares import confirmed_shares
from vllm_cosmos3 import Cosmos3

FEW_STEPS = {"num_inference_steps": 16, "guidance_scale": 3.0}
Asked = list[tuple[Scene, Caption]]


def made(demo: Cosmos3, scene: Scene, caption: Caption, **fields: Any) -> np.ndarray:
    canvas = scene.canvas
    out = demo.generate(
        prompt=caption.text, size=f"{canvas.width}x{canvas.height}", num_frames=canvas.frames,
        fps=canvas.fps, generate_sound=False, **({"seed": 0} | fields),
    )  # fmt: skip
    return out.video


def test_text_to_video(demo: Cosmos3, asked: Asked) -> None:
    results = [confirm(s, c, observe(made(demo, s, c, **FEW_STEPS))) for s, c in asked]
    shares = confirmed_shares(results)
    for name in ("colour", "motion", "gripper"):
        assert shares[name].value == 1.0, name
    assert shares["all"].right >= 5


def test_image_to_video(demo: Cosmos3, asked: Asked) -> None:
    """The picture is the first frame, and what it shows moves as the prompt says."""
    results = []
    for scene, caption in asked:
        picture = true_clip(scene, range(1)).numpy()[0]
        clip = made(demo, scene, caption, image=picture, **FEW_STEPS)
        assert np.abs(clip[0].astype(int) - picture.astype(int)).mean() < 4
        results.append(confirm(scene, caption, observe(clip)))
    shares = confirmed_shares(results)
    for name in ("colour", "motion", "gripper"):
        assert shares[name].value == 1.0, name
    assert shares["all"].right >= 5


def test_the_packages_defaults(demo: Cosmos3, asked: Asked) -> None:
    """35 steps, guidance 6, shift 10 and the checkpoint's own negative prompt."""
    results = [confirm(s, c, observe(made(demo, s, c))) for s, c in asked[:2]]
    assert all(r["colour"] and r["motion"] and r["gripper"] for r in results)


def test_seeds_differ(demo: Cosmos3, asked: Asked) -> None:
    scene, caption = asked[0]
    places = [
        observe(made(demo, scene, caption, seed=seed, **FEW_STEPS)).things[0].centres[0]
        for seed in (1, 2)
    ]
    assert np.abs(places[0] - places[1]).max() > 8


def test_the_checker_is_not_easily_pleased(asked: Asked) -> None:
    """Neither another scene's clip nor noise passes for what was asked."""
    (scene, caption), (other, _) = asked[0], asked[1]
    assert not confirm(scene, caption, observe(true_clip(other)))["all"]
    noise = torch.randint(0, 256, true_clip(scene).shape, dtype=torch.uint8)
    assert not confirm(scene, caption, observe(noise))["all"]
