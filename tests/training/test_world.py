"""Scenes, their words, and the checker that reads clips back."""

from __future__ import annotations

import json
import random

import pytest
import torch
from tokenizers import Tokenizer

from training.captions import canonical, draw_caption
from training.observing import confirm_all, observe
from training.prompts import framed
from training.questions import box_of, draw_question
from training.rendering import pack, render, to_bytes
from training.scenes import GROWN, MATERIALS, Canvas, draw_scene
from training.shares import Share, confirmed_shares
from training.tokenizer import ROWS, train_demo_tokenizer
from vllm_cosmos3.request.prompts import Facts, encode, negative_text, positive_text

CANVASES = (Canvas(), Canvas(256, 256, 25, 12), Canvas(192, 320, 9, 8))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_demo_tokenizer(300)


def clips(scenes: list, frames: tuple[int, ...]) -> torch.Tensor:
    canvas = scenes[0].canvas
    return to_bytes(render(pack(scenes).frames(frames), canvas.height, canvas.width))


def test_the_checker_confirms_the_worlds_own_clips() -> None:
    """With spots, too: a spot is part of its thing, and its rim, where colours blend to a third, is nothing."""
    scenes = [draw_scene(seed, None, GROWN, MATERIALS) for seed in range(500, 532)]
    captions = [draw_caption(scene) for scene in scenes]
    results = confirm_all(scenes, captions, clips(scenes, (0, 1, 8, 15, 16)))
    assert all(result["all"] for result in results)


def test_the_checker_refuses_other_clips() -> None:
    scenes = [draw_scene(seed) for seed in range(8)]
    captions = [draw_caption(scene) for scene in scenes]
    videos = clips(scenes, (0, 1, 15, 16)).roll(1, 0)
    assert not any(result["all"] for result in confirm_all(scenes, captions, videos))


def test_an_empty_clip_shows_nothing() -> None:
    seen = observe(torch.full((5, 192, 320, 3), 133, dtype=torch.uint8))
    assert seen.things == ()
    assert seen.gripper is None
    assert seen.tone == "grey"
    assert seen.contact() is None
    assert seen.push() is None


def test_contact_is_when_things_touch() -> None:
    scene = next(s for s in map(draw_scene, range(200)) if s.kind == "push")
    at = scene.contacts[0][0]
    seen = observe(clips([scene], tuple(range(17)))[0])
    assert abs(seen.contact() - at) <= 2
    assert abs(seen.push() - at) <= 2


@pytest.mark.parametrize("canvas", CANVASES)
def test_things_stay_on_the_canvas(canvas: Canvas) -> None:
    for seed in range(300):
        for thing in draw_scene(seed, canvas, GROWN).things:
            assert thing.path.shape == (canvas.frames, 2)
            assert thing.path.min() > 0
            assert (thing.path < (canvas.width, canvas.height)).all()


def test_a_seed_is_a_scene() -> None:
    a, b = (draw_scene(7, None, GROWN) for _ in range(2))
    assert (a.things[0].path == b.things[0].path).all()
    assert draw_caption(a) == draw_caption(b)
    assert len({canonical(draw_scene(seed)) for seed in range(60)}) > 50


def test_questions_have_answers() -> None:
    rng = random.Random(0)
    for seed in range(200):
        scene = draw_scene(seed, None, GROWN)
        asked = draw_question(scene, rng, 0.2)
        assert asked.question
        if asked.answer.startswith("{"):
            assert json.loads(asked.answer)["label"]
        left, top, right, bottom = box_of(scene.things[0], scene, 0)
        assert 0 <= left < right <= 1000
        assert 0 <= top < bottom <= 1000


@pytest.mark.parametrize("canvas", [*CANVASES, Canvas(320, 192, 1, 24)])
@pytest.mark.parametrize("structured", [0.0, 1.0])
def test_prompts_are_the_packages_own(
    tokenizer: Tokenizer, canvas: Canvas, structured: float
) -> None:
    ratio = {(320, 192): "16,9", (256, 256): "1,1", (192, 320): "9,16"}
    facts = Facts(
        num_frames=canvas.frames, fps=float(canvas.fps), height=canvas.height,
        width=canvas.width, aspect_ratio=ratio[canvas.width, canvas.height],
    )  # fmt: skip
    text = draw_caption(draw_scene(3, canvas), structured).text
    kept = positive_text(text, facts, style="auto", duration=True, resolution=True)
    negative = negative_text("{}", facts, metadata="same", duration=True, resolution=True)
    for mine, theirs in (
        (framed(text, canvas), kept),
        (framed("{}", canvas, negative=True), negative),
    ):
        ids, _ = encode(theirs, Adapter(tokenizer), system=None, limit=2048)
        assert tuple(tokenizer.encode(mine).ids) == ids


class Adapter:
    """What the package uses of a tokenizer, on the bare one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.eos_token_id = tokenizer.token_to_id("<|im_end|>")

    def apply_chat_template(
        self, messages: list[dict[str, str]], **_: object
    ) -> dict[str, list[int]]:
        text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
        return {"input_ids": self.tokenizer.encode(f"{text}<|im_start|>assistant\n").ids}

    def convert_tokens_to_ids(self, token: str) -> int | None:
        return self.tokenizer.token_to_id(token)


def test_the_tokenizer_fills_the_embedding(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == ROWS
    text = "A gripper lifts a small red circle on a dark background. ünlikely 123"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_shares_have_wilsons_interval() -> None:
    shares = confirmed_shares([{"colour": True, "tone": True}, {"colour": False}])
    assert shares == {"colour": Share(1, 2), "tone": Share(1, 1)}
    low, high = Share(90, 100).interval
    assert (round(low, 4), round(high, 4)) == (0.8256, 0.9448)
    assert Share(10, 10).interval[1] == pytest.approx(1.0)
