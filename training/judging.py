"""Scores of trained parts on prompts and clips that they never saw."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from training.captions import MOVES, canonical
from training.observing import confirm_all
from training.parts import Parts
from training.pools import held_out
from training.prompts import NEGATIVES, encoded, framed
from training.questions import ASK, CAPTION, Asked
from training.rendering import pack, render
from training.sampling import guided, sample, schedule
from training.scenes import COLOURS, SHAPES, SIZES, TONES, Canvas, Scene
from training.shares import Share, confirmed_shares, shares_by_kind
from training.vision import answers, looked_at

HELD_OUT = 20_000_000  # first seed
PROMPTS = (
    "a red square moves to the right",
    "a small blue circle moves up on a dark background",
    "a large green triangle moves to the left on a white background",
    "a yellow circle stands still",
    "an orange square moves down",
    "a green triangle pushes a yellow square to the left",
    "a red circle pushes a blue circle to the right",
    "a gripper lifts an orange circle",
    "a gripper drops a purple square",
    "a red circle moves to the left and a blue square moves to the right",
)


@dataclass(frozen=True, slots=True)
class Setting:
    """How clips are made; ``given`` latent frames are those of the true clip."""

    guidance: float
    steps: int
    shift: float
    given: int = 0

    @classmethod
    def read(cls, text: str) -> Setting:
        guidance, steps, shift, given = text.split(",")
        return cls(float(guidance), int(steps), float(shift), int(given))

    def __str__(self) -> str:
        given = f", {self.given} given" if self.given else ""
        return f"guidance {self.guidance:g}, {self.steps} steps, shift {self.shift:g}{given}"


@torch.no_grad()
def generated(
    parts: Parts,
    prompts: Sequence[tuple[str, int]],
    setting: Setting,
    *,
    given: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """Clips uint8 for (prompt, rate) pairs; ``given`` [B, T', h, w, C] are their first latents."""
    pool, device = parts.pool, parts.codec.device
    canvas, count = pool.canvas, len(prompts)
    sized = [Canvas(canvas.width, canvas.height, canvas.frames, fps) for _, fps in prompts]
    texts = [framed(text, c) for (text, _), c in zip(prompts, sized, strict=True)]
    texts += [framed(NEGATIVES[0], c, negative=True) for c in sized]
    ids, lengths = (x.to(device) for x in encoded(parts.tokenizer, texts))
    fps = torch.tensor([float(f) for _, f in prompts], device=device)
    shape = (count, *pool.latents.shape[1:])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    known = torch.zeros(shape[:2], dtype=torch.bool, device=device)
    if given is not None:
        x[:, : given.shape[1]], known[:, : given.shape[1]] = given, True
    with torch.autocast(device, torch.bfloat16):
        velocity = guided(parts.model, ids, lengths, fps, known, setting.guidance)
        free = ~known[:, :, None, None, None]
        latents = sample(velocity, x, free, schedule(setting.steps, setting.shift))
    return parts.codec.decode(latents)


@torch.no_grad()
def judge(parts: Parts, setting: Setting, count: int, batch: int = 256) -> dict[str, str]:
    """Shares of held-out prompts that generated clips confirm, by attribute and kind of scene."""
    canvas = parts.pool.canvas
    scenes, captions = held_out(HELD_OUT, count, canvas)
    results: list[dict[str, bool]] = []
    for i in range(0, count, batch):
        some, words = scenes[i : i + batch], captions[i : i + batch]
        given = None
        if setting.given:
            frames = range(4 * setting.given - 3)
            clips = pack(some).frames(frames).to(parts.codec.device)
            pixels = render(clips, canvas.height, canvas.width)
            given = torch.cat([parts.codec.encode(part) for part in pixels.split(32)])
        prompts = [(c.text, s.canvas.fps) for s, c in zip(some, words, strict=True)]
        results += confirm_all(some, words, generated(parts, prompts, setting, given=given, seed=i))
    by_kind = shares_by_kind([s.kind for s in scenes], results)
    shares = confirmed_shares(results) | {f"all: {kind}": s for kind, s in by_kind.items()}
    return {name: str(share) for name, share in shares.items()}


def judge_reasoner(parts: Parts, count: int) -> dict[str, object]:
    """Shares of captions of held-out clips that are right, as a whole and by attribute."""
    scenes, _ = held_out(HELD_OUT + 5_000_000, count, parts.pool.canvas)
    asked = [Asked(CAPTION[i % 3], canonical(scene)) for i, scene in enumerate(scenes)]
    said = _said(parts, scenes, asked)
    results = [compared(one.answer, text) for one, text in zip(asked, said, strict=True)]
    wrong = [(o.answer, t) for o, t in zip(asked, said, strict=True) if o.answer != t]
    shares: dict[str, Share] = confirmed_shares(results)
    return {name: str(share) for name, share in shares.items()} | {"wrong": wrong[:5]}


def judge_questions(parts: Parts, count: int) -> dict[str, str]:
    """For each question but the caption the share of answers that are right to the letter.

    Boxes and points are never that: of them the share with an IoU of at least 0.8, or within 10
    thousandths. Of boxes the mean IoU as well; that of an answer without one is 0.
    """
    scenes, _ = held_out(HELD_OUT + 6_000_000, count, parts.pool.canvas)
    rng, asked = random.Random(0), []
    for ask in ASK.values():
        asked += [ask(scene, rng.choice(scene.things), rng) for scene in scenes]
    said = _said(parts, scenes * len(ASK), asked)
    right = [_agrees(one.answer, text) for one, text in zip(asked, said, strict=True)]
    shares = {
        name: str(Share(sum(right[i * count : (i + 1) * count]), count))
        for i, name in enumerate(ASK)
    }
    first = list(ASK).index("box") * count
    boxes = zip(asked[first : first + count], said[first : first + count], strict=True)
    overlaps = [_overlap(json.loads(one.answer), text) for one, text in boxes]
    return shares | {"box, mean IoU": f"{sum(overlaps) / count:.3f} of {count}"}


@torch.no_grad()
def _said(parts: Parts, scenes: Sequence[Scene], asked: Sequence[Asked]) -> list[str]:
    said: list[str] = []
    canvas = parts.pool.canvas
    for i in range(0, len(scenes), 128):
        some, questions = scenes[i : i + 128], asked[i : i + 128]
        clips = looked_at(some, questions).to(parts.codec.device)
        pixels = render(clips, canvas.height, canvas.width)
        rates = [s.canvas.fps for s in some]
        said += answers(parts.model, parts.vision, parts.frame, pixels, questions, rates, most=56)
    return said


def _agrees(right: str, said: str) -> bool:
    if not right.startswith("{"):
        return right == said
    try:
        wanted, given = json.loads(right), json.loads(said)
        if wanted["label"] != given["label"]:
            return False
        if "bbox_2d" in wanted:
            return _overlap(wanted, said) >= 0.8
        pairs = zip(wanted["point_2d"], given["point_2d"], strict=True)
        return all(abs(a - b) <= 10 for a, b in pairs)
    except (ValueError, KeyError, TypeError):  # no such object
        return False


def _overlap(wanted: dict[str, Any], said: str) -> float:
    """IoU of the box that was wanted and the one that was said; 0 if there is none, or of another thing."""
    try:
        given = json.loads(said)
        return (
            iou(wanted["bbox_2d"], given["bbox_2d"]) if given["label"] == wanted["label"] else 0.0
        )
    except (ValueError, KeyError, TypeError):  # no such object
        return 0.0


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes (left, top, right, bottom)."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return width * height / max(areas - width * height, 1e-9)


_WORDS = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "size": tuple(SIZES),
    "tone": tuple(f"{tone} background" for tone in TONES),
    "motion": (*(w[0] for w in MOVES.values()), "lifts", "drops", "to the right", "to the left"),
}


def compared(right: str, said: str) -> dict[str, bool]:
    """Whether an answer is right as a whole, and in its words of each kind."""
    result = {"exact": right == said}
    for name, words in _WORDS.items():
        result[name] = [w for w in words if w in right] == [w for w in words if w in said]
    return result
