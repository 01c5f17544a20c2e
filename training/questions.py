"""Questions about clips and their true answers, for the reasoner."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass

import numpy as np

from training.captions import canonical
from training.scenes import ABOVE, BELOW, Scene, Thing

CAPTION = ("What happens in the video?", "Describe the video.", "What do you see?")
NUMBERS = ("no", "one", "two", "three")


@dataclass(frozen=True, slots=True)
class Asked:
    """A question and the one answer that is right."""

    question: str
    answer: str


def draw_question(scene: Scene, rng: random.Random, captions: float = 0.6) -> Asked:
    """A question about a scene; ``captions`` is the share of those that want all of it."""
    if rng.random() < captions:
        return Asked(rng.choice(CAPTION), canonical(scene))
    thing = rng.choice(scene.things)
    ask = rng.choice((_count, _colour, _shape, _box, _point, _when, _gripper, _background))
    return ask(scene, thing)


def _count(scene: Scene, _: Thing) -> Asked:
    count = len(scene.things)
    noun = "thing" if count == 1 else "things"
    return Asked(
        "How many things are there?",
        f"There {'is' if count == 1 else 'are'} {NUMBERS[count]} {noun}.",
    )


def _colour(scene: Scene, thing: Thing) -> Asked:
    if sum(t.shape == thing.shape for t in scene.things) > 1:
        return _count(scene, thing)
    return Asked(f"What colour is the {thing.shape}?", f"The {thing.shape} is {thing.colour}.")


def _shape(_: Scene, thing: Thing) -> Asked:
    return Asked(f"What shape is the {thing.colour} thing?", f"It is a {thing.shape}.")


def _box(scene: Scene, thing: Thing) -> Asked:
    box = box_of(thing, scene, 0)
    answer = json.dumps({"bbox_2d": box, "label": f"{thing.colour} {thing.shape}"})
    question = f"Locate the {thing.colour} {thing.shape} in the first frame and output its bounding box in JSON."
    return Asked(question, answer)


def _point(scene: Scene, thing: Thing) -> Asked:
    x, y = thing.path[-1]
    answer = json.dumps(
        {"point_2d": _thousandths(scene, x, y), "label": f"{thing.colour} {thing.shape}"}
    )
    question = (
        f"Point to the {thing.colour} {thing.shape} in the last frame and output the point in JSON."
    )
    return Asked(question, answer)


def _when(scene: Scene, thing: Thing) -> Asked:
    if scene.kind != "push":
        return _shape(scene, thing)
    seconds = scene.contacts[0][0] / scene.canvas.fps
    return Asked("When do the two things touch?", f"They touch after {seconds:.1f} seconds.")


def _gripper(scene: Scene, _: Thing) -> Asked:
    return Asked("Is there a gripper?", "Yes." if scene.gripper is not None else "No.")


def _background(scene: Scene, _: Thing) -> Asked:
    return Asked("What is the background like?", f"The background is {scene.tone}.")


def box_of(thing: Thing, scene: Scene, frame: int) -> list[int]:
    """Left, top, right, bottom in thousandths of the canvas."""
    x, y = thing.path[frame]
    up, down = ABOVE[thing.shape] * thing.radius, BELOW[thing.shape] * thing.radius
    left_top = _thousandths(scene, x - thing.half_width, y - up)
    return left_top + _thousandths(scene, x + thing.half_width, y + down)


def _thousandths(scene: Scene, x: float, y: float) -> list[int]:
    places = np.array([x / scene.canvas.width, y / scene.canvas.height])
    return [int(v) for v in (places * 1000).round().clip(0, 1000)]
