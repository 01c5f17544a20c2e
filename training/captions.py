"""Words for scenes: captions with synonyms, the structured form, and one canonical sentence."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass

from training.scenes import Scene, Thing

MOVES = {
    "right": ("moves to the right", "moves right", "slides to the right", "goes right"),
    "left": ("moves to the left", "moves left", "slides to the left", "goes left"),
    "up": ("moves up", "rises", "goes up"),
    "down": ("moves down", "sinks", "goes down"),
    "still": ("stands still", "does not move", "stays where it is"),
}
MATERIAL_WORDS = {"rubber": "", "wood": "wooden ", "metal": "metal "}  # rubber goes without saying
LIFTS, DROPS = ("lifts", "picks up"), ("drops", "lets go of")
BOUNCES = ("falls down and bounces", "drops to the floor and bounces")
STACKS, PASSES = ("puts {} on {}", "stacks {} on {}"), ("passes behind", "moves behind")


@dataclass(frozen=True, slots=True)
class Caption:
    """A prompt for a scene, and which of the scene's attributes it tells."""

    text: str
    sizes: tuple[bool, ...]  # of each thing
    tone: bool


def canonical(scene: Scene) -> str:
    """The one sentence that names everything: what the reasoner answers."""
    named = [scene.kind in ("single", "lift", "drop", "bounce")] * len(scene.things)
    text = f"{_clause(scene, named, None)} on a {scene.tone} background."
    return text[0].upper() + text[1:]


def draw_caption(scene: Scene, structured: float = 0.0) -> Caption:
    """A caption with the scene's own choice of words; ``structured`` is the share of JSON ones."""
    rng = random.Random(scene.seed ^ 0x5EED)
    rows = scene.kind in ("two", "three")
    named = [rng.random() < 0.4 and not rows for _ in scene.things]
    tone = rng.random() < 0.4
    if rng.random() < structured:
        return Caption(_structured(scene, named, rng, tone=tone), tuple(named), tone)
    text = _clause(scene, named, rng)
    if tone:
        text += f" on a {scene.tone} background"
    if rng.random() < 0.3:
        text = text[0].upper() + text[1:]
    return Caption(text, tuple(named), tone)


def instruction(scene: Scene) -> str:
    """What a robot is told to do in a scene with a gripper."""
    verb = "let go of" if scene.kind == "drop" else "pick up"
    return f"{verb} the {scene.things[0].colour} {scene.things[0].shape}"


def noun(thing: Thing, *, sized: bool) -> str:
    """A thing with its article."""
    material = MATERIAL_WORDS[thing.material]
    words = f"{thing.size + ' ' if sized else ''}{thing.colour} {material}{thing.shape}"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _clause(scene: Scene, named: list[bool], rng: random.Random | None) -> str:
    nouns = [noun(t, sized=n) for t, n in zip(scene.things, named, strict=True)]
    if scene.canvas.frames == 1:  # nothing moves in a picture
        return " and ".join([*(["a gripper"] if scene.gripper is not None else []), *nouns])
    if scene.kind == "stack":
        pattern = _one(STACKS, rng)
        return f"a gripper {pattern.format(nouns[1], nouns[0])}"
    if scene.kind in ("single", "two", "three"):
        moves = zip(nouns, scene.things, strict=True)
        return " and ".join(f"{n} {_one(MOVES[t.motion], rng)}" for n, t in moves)
    return f"{_subject(scene, nouns)} {_action(scene, nouns, rng)}"


def _subject(scene: Scene, nouns: list[str]) -> str:
    return "a gripper" if scene.gripper is not None else nouns[0]


def _action(scene: Scene, nouns: list[str], rng: random.Random | None) -> str:
    if scene.kind == "push":
        return f"pushes {nouns[1]} to the {scene.things[0].motion}"
    if scene.kind in ("lift", "pick"):
        return f"{_one(LIFTS, rng)} {nouns[0]}"
    if scene.kind == "drop":
        return f"{_one(DROPS, rng)} {nouns[0]}"
    if scene.kind == "bounce":
        return _one(BOUNCES, rng)
    if scene.kind == "hide":
        return f"{_one(PASSES, rng)} {nouns[1]}"
    raise ValueError(scene.kind)


def _structured(scene: Scene, named: list[bool], rng: random.Random, *, tone: bool) -> str:
    """The same words as a JSON caption, with the keys of the real model's training captions."""
    nouns = [noun(t, sized=n) for t, n in zip(scene.things, named, strict=True)]
    subjects = [{"description": n} for n in nouns]
    if scene.gripper is not None:
        subjects.insert(0, {"description": "a gripper"})
    if scene.canvas.frames > 1:
        _tell_actions(scene, named, subjects, rng)
    caption: dict[str, object] = {"subjects": subjects}
    if tone:
        caption["background_setting"] = f"a {scene.tone} background"
    return json.dumps(caption)


def _tell_actions(
    scene: Scene, named: list[bool], subjects: list[dict[str, str]], rng: random.Random
) -> None:
    if scene.kind in ("single", "two", "three"):
        for subject, thing in zip(subjects, scene.things, strict=True):
            subject["action"] = _one(MOVES[thing.motion], rng)
    else:
        clause = _clause(scene, named, rng)
        subjects[0]["action"] = clause.removeprefix(f"{subjects[0]['description']} ")


def _one(words: tuple[str, ...], rng: random.Random | None) -> str:
    return words[0] if rng is None else rng.choice(words)
