"""Questions about clips and their true answers, for the reasoner."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from training.captions import canonical
from training.scenes import ABOVE, BELOW, Scene, Thing

CAPTION = ("What happens in the video?", "Describe the video.", "What do you see?")
NUMBERS = ("no", "one", "two", "three")
QUESTIONS = 4  # about each clip of the training data

JUMP = 60.0  # pixels


@dataclass(frozen=True, slots=True)
class Jump:
    """What no thing does: from ``frame`` on a thing is elsewhere, by so many pixels."""

    thing: int
    frame: int
    down: float


@dataclass(frozen=True, slots=True)
class Asked:
    """A question and the one answer that is right.

    It is about the first ``frames`` of the clip, None being all, and a ``jump`` that is put into it.
    """

    question: str
    answer: str
    frames: int | None = None
    jump: Jump | None = None


def draw_question(scene: Scene, rng: random.Random, captions: float = 0.6) -> Asked:
    """A question about a scene; ``captions`` is the share of those that want all of it."""
    if rng.random() < captions:
        return Asked(rng.choice(CAPTION), canonical(scene))
    thing = rng.choice(scene.things)
    return rng.choice(list(ASK.values()))(scene, thing, rng)


def draw_questions(scene: Scene, rng: random.Random) -> list[Asked]:
    """QUESTIONS about a scene, half of them about places, which take many examples to be told to a few pixels."""
    places = (ASK["box"], ASK[rng.choice(("box", "point"))])
    return [
        *(draw_question(scene, rng) for _ in range(QUESTIONS - len(places))),
        *(ask(scene, rng.choice(scene.things), rng) for ask in places),
    ]


def _count(scene: Scene, _thing: Thing, _rng: random.Random) -> Asked:
    count = len(scene.things)
    noun = "thing" if count == 1 else "things"
    return Asked(
        "How many things are there?",
        f"There {'is' if count == 1 else 'are'} {NUMBERS[count]} {noun}.",
    )


def _colour(scene: Scene, thing: Thing, rng: random.Random) -> Asked:
    if sum(t.shape == thing.shape for t in scene.things) > 1:
        return _count(scene, thing, rng)
    return Asked(f"What colour is the {thing.shape}?", f"The {thing.shape} is {thing.colour}.")


def _shape(_scene: Scene, thing: Thing, _rng: random.Random) -> Asked:
    return Asked(f"What shape is the {thing.colour} thing?", f"It is a {thing.shape}.")


def _box(scene: Scene, thing: Thing, _rng: random.Random) -> Asked:
    box = box_of(thing, scene, 0)
    answer = json.dumps({"bbox_2d": box, "label": f"{thing.colour} {thing.shape}"})
    question = f"Locate the {thing.colour} {thing.shape} in the first frame and output its bounding box in JSON."
    return Asked(question, answer)


def _point(scene: Scene, thing: Thing, _rng: random.Random) -> Asked:
    x, y = thing.path[-1]
    answer = json.dumps(
        {"point_2d": _thousandths(scene, x, y), "label": f"{thing.colour} {thing.shape}"}
    )
    question = (
        f"Point to the {thing.colour} {thing.shape} in the last frame and output the point in JSON."
    )
    return Asked(question, answer)


def _when(scene: Scene, thing: Thing, rng: random.Random) -> Asked:
    if scene.kind not in EVENTS:
        return _shape(scene, thing, rng)
    question, answer = EVENTS[scene.kind]
    seconds = scene.contacts[0][0] / scene.canvas.fps
    return Asked(question, f"{answer} after {seconds:.1f} seconds.")


def _next(scene: Scene, thing: Thing, rng: random.Random) -> Asked:
    """What the second part of the clip shows, when only the first is seen."""
    question, frames = "What happens next?", scene.canvas.frames
    if frames < 5:
        return _shape(scene, thing, rng)
    noun = f"{scene.things[-1].colour} {scene.things[-1].shape}"
    if scene.kind in NEXT:
        seen = max(4, int(scene.contacts[0][0]))
        text = NEXT[scene.kind].format(noun, way=scene.things[0].motion)
        return Asked(question, text, frames=seen)
    if scene.kind == "single":
        still = thing.motion == "still"
        text = f"The {noun} {'stays where it is' if still else f'goes on {PLACES[thing.motion]}'}."
        return Asked(question, text, frames=max(4, frames // 2 + 1))
    return _shape(scene, thing, rng)


def _plausible(scene: Scene, thing: Thing, rng: random.Random) -> Asked:
    """In half of the clips one thing jumps to another height."""
    question = "Is the motion physically plausible?"
    if scene.canvas.frames < 9 or rng.random() < 0.5:
        return Asked(question, "Yes.")
    place = scene.things.index(thing)
    frame = rng.randint(scene.canvas.frames // 2, scene.canvas.frames - 3)
    down = JUMP if thing.path[frame, 1] < scene.canvas.height / 2 else -JUMP
    text = f"No. The {thing.colour} {thing.shape} jumps."
    return Asked(question, text, jump=Jump(place, frame, down))


def _gripper(scene: Scene, _thing: Thing, _rng: random.Random) -> Asked:
    return Asked("Is there a gripper?", "Yes." if scene.gripper is not None else "No.")


def _background(scene: Scene, _thing: Thing, _rng: random.Random) -> Asked:
    return Asked("What is the background like?", f"The background is {scene.tone}.")


EVENTS = {  # kind of scene with a contact: when-question, start of its answer
    "push": ("When do the two things touch?", "They touch"),
    "lift": ("When does the gripper close?", "It closes"),
    "drop": ("When does it reach the floor?", "It reaches the floor"),
    "bounce": ("When does it bounce?", "It bounces"),
}
NEXT = {
    "push": "The {} is pushed to the {way}.",
    "lift": "The gripper lifts the {}.",
    "drop": "The {} falls to the floor.",
    "bounce": "The {} bounces.",
}
PLACES = {"right": "to the right", "left": "to the left", "up": "upwards", "down": "downwards"}
ASK: dict[str, Callable[[Scene, Thing, random.Random], Asked]] = {
    "count": _count,
    "colour": _colour,
    "shape": _shape,
    "box": _box,
    "point": _point,
    "when": _when,
    "next": _next,
    "plausible": _plausible,
    "gripper": _gripper,
    "background": _background,
}


def box_of(thing: Thing, scene: Scene, frame: int) -> list[int]:
    """Left, top, right, bottom in thousandths of the canvas."""
    x, y = thing.path[frame]
    up, down = ABOVE[thing.shape] * thing.radius, BELOW[thing.shape] * thing.radius
    left_top = _thousandths(scene, x - thing.half_width, y - up)
    return left_top + _thousandths(scene, x + thing.half_width, y + down)


def _thousandths(scene: Scene, x: float, y: float) -> list[int]:
    places = np.array([x / scene.canvas.width, y / scene.canvas.height])
    return [int(v) for v in (places * 1000).round().clip(0, 1000)]
