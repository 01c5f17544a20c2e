"""Further modes of the demo checkpoint show what was asked for: pictures, other sizes and lengths, chunks,
controls, and four steps.

Bounds are those that the seeds 0, 1 and 2 all pass, as in `test_clips`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from judged import FIRST, SURE, difference, made, shares

from training.observing import observe
from training.scenes import Canvas
from training.yardstick import Prompt, held_out_prompts
from vllm_cosmos3 import Cosmos3

SIX = 6


def six(canvas: Canvas) -> list[Prompt]:
    return held_out_prompts(SIX, FIRST, canvas)


@pytest.mark.parametrize(("width", "height"), [(320, 192), (256, 256), (192, 320)])
def test_pictures(width: int, height: int, demo: Cosmos3) -> None:
    prompts = six(Canvas(width, height, 1))
    pictures = [
        demo.generate(**p.fields | {"seed": 0, "num_inference_steps": 12, "guidance_scale": 3.0}).image
        for p in prompts
    ]  # fmt: skip
    assert all(picture.shape == (height, width, 3) for picture in pictures)
    found = shares(prompts, [picture[None] for picture in pictures])
    assert found["colour"].value == found["gripper"].value == 1.0
    assert found["all"].right >= SIX - 1


@pytest.mark.parametrize(
    ("width", "height", "frames"), [(256, 256, 17), (192, 320, 17), (320, 192, 33)]
)
def test_other_sizes_and_lengths(width: int, height: int, frames: int, demo: Cosmos3) -> None:
    prompts = six(Canvas(width, height, frames))
    clips = [made(demo, p, num_inference_steps=12) for p in prompts]
    assert all(clip.shape == (frames, height, width, 3) for clip in clips)
    found = shares(prompts, clips)
    assert all(found[name].right >= SIX - 1 for name in SURE)
    assert found["all"].right >= SIX - 2  # portrait is the least trained


def test_a_clip_goes_on_over_chunks(demo: Cosmos3) -> None:
    """A thing goes on in the second chunk from where it was, and does not jump where they meet."""
    prompts = [p for p in held_out_prompts(30, FIRST) if p.scene.kind == "single"]
    moving = [p for p in prompts if p.scene.things[0].motion in ("left", "right")][:2]
    for prompt in moving:
        clip = made(demo, prompt, num_chunks=2, num_inference_steps=8)
        assert len(clip) == 33
        (thing,) = observe(clip).things
        assert (thing.colour, thing.motion) == (prompt.scene.things[0].colour, prompt.scene.things[0].motion)  # fmt: skip
        steps = np.abs(np.diff(thing.centres[:, 0]))
        assert np.nanmax(steps) < 24


@pytest.mark.parametrize("control", ["edge", "seg"])
def test_transfer(control: str, demo: Cosmos3, prompts: list[Prompt]) -> None:
    """Clips have the colours of the prompt, and things are where the control has them."""
    clips = [made(demo, p, num_inference_steps=12, **p.control(control)) for p in prompts]
    found = shares(prompts, clips)
    assert all(found[name].value == 1.0 for name in SURE)
    assert found["all"].right >= len(prompts) - 1
    for prompt, clip in zip(prompts, clips, strict=True):
        seen, true = observe(clip), observe(prompt.frames(17))
        for mine, theirs in zip(seen.things, true.things, strict=True):
            assert np.nanmax(np.abs(mine.centres - theirs.centres)) < 8


@pytest.fixture(scope="module")
def four() -> Iterator[Cosmos3]:
    with Cosmos3("demo-4step", device="cpu") as model:
        yield model


def test_four_steps(four: Cosmos3, prompts: list[Prompt]) -> None:
    """A picture goes on as the prompt says after four steps without guidance."""
    pictures = [prompt.frames(1)[0] for prompt in prompts]
    fields = {"num_inference_steps": None, "guidance_scale": None}
    clips = [made(four, p, image=q, **fields) for p, q in zip(prompts, pictures, strict=True)]
    assert all(difference(c[0], p) < 4 for c, p in zip(clips, pictures, strict=True))
    found = shares(prompts, clips)
    assert all(found[name].value == 1.0 for name in SURE)
    assert found["all"].right >= len(prompts) - 1
