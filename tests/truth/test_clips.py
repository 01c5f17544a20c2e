"""Clips show what was asked for: the checker of the demo world sees it in their pixels.

Bounds are those that the seeds 0, 1 and 2 all pass; ``benchmarks/truth.py`` measures shares of many
more prompts.
"""

from __future__ import annotations

import numpy as np
import torch
from judged import SURE, difference, made, shares

from training.observing import observe
from training.yardstick import Prompt
from vllm_cosmos3 import Cosmos3


def test_text_to_video(prompts: list[Prompt], clips: list[np.ndarray]) -> None:
    found = shares(prompts, clips)
    assert all(found[name].value == 1.0 for name in SURE)
    assert found["all"].right >= 5


def test_image_to_video(demo: Cosmos3, prompts: list[Prompt]) -> None:
    """The picture is the first frame, and what it shows moves as the prompt says."""
    pictures = [prompt.frames(1)[0] for prompt in prompts]
    clips = [made(demo, p, image=picture) for p, picture in zip(prompts, pictures, strict=True)]
    assert all(difference(c[0], p) < 4 for c, p in zip(clips, pictures, strict=True))
    found = shares(prompts, clips)
    assert all(found[name].value == 1.0 for name in SURE)
    assert found["all"].right >= 5


def test_video_to_video(demo: Cosmos3, prompts: list[Prompt]) -> None:
    """The first five frames are given, and the thing goes on from where it was."""
    starts = [prompt.frames(5) for prompt in prompts]
    clips = [
        made(demo, p, video=start, num_inference_steps=8)
        for p, start in zip(prompts, starts, strict=True)
    ]
    assert all(difference(c[:5], s) < 4 for c, s in zip(clips, starts, strict=True))
    found = shares(prompts, clips)
    assert all(found[name].value == 1.0 for name in SURE)
    assert found["all"].right >= 5


def test_guidance_matters(demo: Cosmos3, pairs: list[Prompt]) -> None:
    """Of prompts of two things more are confirmed with guidance than without."""
    guided, alone = (
        shares(pairs, [made(demo, p, guidance_scale=scale) for p in pairs]) for scale in (3.0, 1.0)
    )
    assert guided["all"].right >= 4
    assert guided["all"].right > alone["all"].right


def test_seeds_differ(demo: Cosmos3, prompts: list[Prompt], clips: list[np.ndarray]) -> None:
    other = made(demo, prompts[0], seed=1)
    places = [observe(clip).things[0].centres[0] for clip in (clips[0], other)]
    assert np.abs(places[0] - places[1]).max() > 8


def test_the_checker_is_not_easily_pleased(prompts: list[Prompt]) -> None:
    """Neither another scene's clip nor noise passes for what was asked."""
    prompt, other = prompts[:2]
    assert not prompt.confirmed(other.frames(17))["all"]
    noise = torch.randint(0, 256, prompt.frames(17).shape, dtype=torch.uint8)
    assert not prompt.confirmed(noise.numpy())["all"]
