"""Scenes of the demo world: which things are there, how they move, what touches what; from a seed.

Paths are in pixels of the canvas, one row a frame, x to the right and y down. Nothing is drawn here.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Track = NDArray[np.float64]

COLOURS = {
    "red": (220, 45, 45),
    "green": (40, 175, 70),
    "blue": (50, 90, 230),
    "yellow": (240, 215, 40),
    "purple": (150, 60, 200),
    "orange": (245, 130, 25),
}
SHAPES = ("square", "circle", "triangle")
TONES = {"dark": (62, 66, 74), "grey": (132, 134, 138), "white": (232, 232, 228)}
SIZES = {"small": (14.0, 18.0), "large": (26.0, 32.0)}  # range of radii
RATES = (8, 12, 16, 24)  # frames per second
MATERIALS = ("rubber", "wood", "metal")  # plain, with a grey spot, with a white spot
HALF_WIDTH = {"square": 0.9, "circle": 1.0, "triangle": 1.25}  # in radii
BELOW = {"square": 0.9, "circle": 1.0, "triangle": 0.9}  # from the centre to the lower edge
ABOVE = {"square": 0.9, "circle": 1.0, "triangle": 1.3}
MOTIONS = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}

# How often each kind of scene is drawn.
BASIC = {"single": 55, "push": 15, "lift": 9, "drop": 9, "two": 12}
GROWN = BASIC | {"three": 10, "bounce": 10, "stack": 8, "hide": 8}
ACTED = {"pick": 60, "lift": 20, "drop": 20}  # with a gripper that follows an instruction


@dataclass(frozen=True, slots=True)
class Canvas:
    """Size, length and rate of a clip. One frame is an image."""

    width: int = 320
    height: int = 192
    frames: int = 17
    fps: int = 12

    @property
    def progress(self) -> Track:
        """Share of the clip's time that is over, for each frame."""
        return np.linspace(0.0, 1.0, max(self.frames, 2))[: self.frames]


@dataclass(frozen=True, slots=True, eq=False)
class Thing:
    """One flat thing. ``path`` [T, 2] is its centre; ``motion`` is one of MOTIONS."""

    colour: str
    shape: str
    size: str
    material: str
    radius: float
    motion: str
    path: Track

    @property
    def half_width(self) -> float:
        return self.radius * HALF_WIDTH[self.shape]


@dataclass(frozen=True, slots=True, eq=False)
class Gripper:
    """A gripper from above. ``path`` [T, 4]: x and y of the palm, half the opening, finger length."""

    path: Track


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """What a clip shows. Things are drawn in order, the last in front.

    ``contacts`` are the frames (fractions possible) at which one thing first touches another, the
    gripper or the floor, with the material that sounds.
    """

    seed: int
    kind: str
    canvas: Canvas
    tone: str
    things: tuple[Thing, ...]
    gripper: Gripper | None = None
    contacts: tuple[tuple[float, str], ...] = ()


def draw_scene(
    seed: int,
    canvas: Canvas | None = None,
    kinds: dict[str, int] = BASIC,
    materials: tuple[str, ...] = ("rubber",),
) -> Scene:
    """The scene of ``seed``. Without a canvas it has the usual one, at one of RATES."""
    rng = random.Random(seed)
    fps = rng.choice(RATES)
    canvas = canvas or Canvas(fps=fps)
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    tone = rng.choice(list(TONES))
    colours = rng.sample(list(COLOURS), 3)
    drafts = [_draft(rng, colour, canvas, materials) for colour in colours]
    things, gripper, contacts = _ACTS[kind](rng, drafts, canvas)
    return Scene(seed, kind, canvas, tone, tuple(things), gripper, tuple(contacts))


def window(scene: Scene, start: int, frames: int) -> Scene:
    """Some frames of a scene in a row, as a scene of its own."""
    taken = slice(start, start + frames)
    gripper = None if scene.gripper is None else Gripper(scene.gripper.path[taken])
    contacts = ((frame - start, material) for frame, material in scene.contacts)
    return replace(
        scene,
        canvas=replace(scene.canvas, frames=frames),
        things=tuple(replace(thing, path=thing.path[taken]) for thing in scene.things),
        gripper=gripper,
        contacts=tuple(c for c in contacts if 0 <= c[0] < frames),
    )


@dataclass(slots=True)
class _Draft:
    """A thing whose path is not known yet."""

    colour: str
    shape: str
    size: str
    material: str
    radius: float
    canvas: Canvas

    def resized(self, rng: random.Random, size: str) -> _Draft:
        return _Draft(
            self.colour, self.shape, size, self.material, rng.uniform(*SIZES[size]), self.canvas
        )

    @property
    def half_width(self) -> float:
        return self.radius * HALF_WIDTH[self.shape]

    @property
    def below(self) -> float:
        return self.radius * BELOW[self.shape]

    @property
    def above(self) -> float:
        return self.radius * ABOVE[self.shape]

    def moving(self, motion: str, x: Track | float, y: Track | float) -> Thing:
        path = np.zeros((self.canvas.frames, 2))
        path[:, 0], path[:, 1] = x, y
        return Thing(self.colour, self.shape, self.size, self.material, self.radius, motion, path)


_Act = tuple[list[Thing], Gripper | None, list[tuple[float, str]]]


def _draft(rng: random.Random, colour: str, canvas: Canvas, materials: tuple[str, ...]) -> _Draft:
    size = rng.choice(list(SIZES))
    shape, material = rng.choice(SHAPES), rng.choice(materials)
    return _Draft(colour, shape, size, material, rng.uniform(*SIZES[size]), canvas)


def _single(rng: random.Random, drafts: list[_Draft], canvas: Canvas) -> _Act:
    motion = rng.choice(list(MOTIONS))
    return [_straight(rng, drafts[0], motion, (0, canvas.height))], None, []


def _rows(count: int, rng: random.Random, drafts: list[_Draft], canvas: Canvas) -> _Act:
    """Small things in rows one above the other."""
    step = canvas.height / count
    things = [
        _straight(
            rng,
            draft.resized(rng, "small"),
            rng.choice(("right", "left", "still")),
            (row * step, (row + 1) * step),
        )
        for row, draft in enumerate(drafts[:count])
    ]
    return things, None, []


def _two(rng: random.Random, drafts: list[_Draft], canvas: Canvas) -> _Act:
    return _rows(2, rng, drafts, canvas)


def _three(rng: random.Random, drafts: list[_Draft], canvas: Canvas) -> _Act:
    return _rows(3, rng, drafts, canvas)


def _straight(rng: random.Random, draft: _Draft, motion: str, rows: tuple[float, float]) -> Thing:
    """A straight way at constant speed that stays on the canvas, within ``rows``."""
    canvas, way = draft.canvas, MOTIONS[motion]
    margin = 1.35 * draft.radius + 3
    margin_y = min(margin, (rows[1] - rows[0]) / 2)
    lows, highs = (margin, rows[0] + margin_y), (canvas.width - margin, rows[1] - margin_y)
    far = rng.uniform(90, 160) if way[0] else rng.uniform(55, 95)
    axes = []
    for axis in (0, 1):
        step = way[axis] * min(far, highs[axis] - lows[axis])
        start = rng.uniform(lows[axis] - min(step, 0), highs[axis] - max(step, 0))
        axes.append(start + step * canvas.progress)
    return draft.moving(motion, *axes)


def _push(rng: random.Random, drafts: list[_Draft], canvas: Canvas) -> _Act:
    a, b = drafts[:2]
    right = rng.random() < 0.5
    reach = a.half_width + b.half_width
    room = canvas.width - 2 * reach - 8
    far = min(rng.uniform(110, 140), room)
    contact = rng.uniform(0.3, 0.5)
    start = a.half_width + 4 + rng.uniform(0, max(room - far, 0))
    xa = start + far * canvas.progress
    xb = start + reach + far * np.maximum(canvas.progress, contact)
    floor = rng.uniform(canvas.height * 0.47, canvas.height - 10)
    way = "right" if right else "left"
    things = [
        draft.moving(way, x if right else canvas.width - x, floor - draft.below)
        for draft, x in ((a, xa), (b, xb))
    ]
    return things, None, [(contact * (canvas.frames - 1), b.material)]


def _lift(rng: random.Random, drafts: list[_Draft], canvas: Canvas) -> _Act:
    """The gripper comes down, closes at 40 % of the time and lifts."""
    thing, s = drafts[0], canvas.progress
    x, floor, high = _gripping_place(rng, thing, canvas)
    y = floor + (high - floor) * np.clip((s - 0.4) / 0.6, 0, 1)
    approach = floor - 45 * (1 - np.clip(s / 0.35, 0, 1))
    opening = 12 * np.clip(1 - s / 0.4, 0, 1)
    gripper = _gripper(thing, x, np.where(s < 0.4, approach, y), opening)
    contact = 0.4 * (canvas.frames - 1)
    return [thing.moving("up", x, y)], gripper, [(contact, thing.material)]


def _pick(rng: random.Random, drafts: list[_Draft], canvas: Canvas) -> _Act:
    """Of two small things on the floor the gripper goes to the first, closes and lifts it."""
    thing, other = (draft.resized(rng, "small") for draft in drafts[:2])
    s, floor = canvas.progress, rng.uniform(0.82, 0.94) * canvas.height
    xs = [
        rng.uniform(42, canvas.width / 2 - 32),
        rng.uniform(canvas.width / 2 + 32, canvas.width - 42),
    ]
    rng.shuffle(xs)
    y, high = floor - thing.below, floor - rng.uniform(80, 100)
    over = _between(s, 0.0, 0.3, canvas.width / 2 + rng.uniform(-25, 25), xs[0])
    centre = _between(s, 0.3, 0.5, high, y) + _between(s, 0.65, 1.0, 0, high - y)
    gripper = _gripper(thing, over, centre, _between(s, 0.5, 0.65, 12, 0))
    held = s >= 0.65
    things = [
        thing.moving("up", xs[0], np.where(held, centre, y)),
        other.moving("still", xs[1], floor - other.below),
    ]
    return things, gripper, [(0.65 * (canvas.frames - 1), thing.material)]


def _between(s: Track, start: float, end: float, before: float, after: float) -> Track:
    """``before`` until a share of the time, ``after`` from another one on, and straight from the one to the other."""
    return before + (after - before) * np.clip((s - start) / (end - start), 0, 1)


def _drop(rng: random.Random, drafts: list[_Draft], canvas: Canvas) -> _Act:
    """The gripper opens at 40 % of the time and lets the thing fall."""
    thing, s = drafts[0], canvas.progress
    x, floor, high = _gripping_place(rng, thing, canvas)
    fallen = np.clip((s - 0.4) / 0.6 * 1.3, 0, 1)
    opening = 12 * np.clip((s - 0.3) / 0.15, 0, 1)
    gripper = _gripper(thing, x, np.full_like(s, high), opening)
    contact = (0.4 + 0.6 / 1.3) * (canvas.frames - 1)
    things = [thing.moving("down", x, high + (floor - high) * fallen**2)]
    return things, gripper, [(contact, thing.material)]


def _stack(rng: random.Random, drafts: list[_Draft], canvas: Canvas) -> _Act:
    """The gripper puts a small thing on a large square."""
    a, b = drafts[0].resized(rng, "small"), drafts[1].resized(rng, "large")
    b.shape = "square"
    s = canvas.progress
    x, floor = rng.uniform(60, canvas.width - 60), rng.uniform(0.8, 0.95) * canvas.height
    top = floor - 2 * b.below
    end = top - a.below
    start = max(end - rng.uniform(45, 60), 2.4 * a.radius + 4)
    y = start + (end - start) * np.clip(s / 0.6, 0, 1)
    palm = np.where(s < 0.7, y, end - 40 * np.clip((s - 0.7) / 0.3, 0, 1))
    gripper = _gripper(a, x, palm, 12 * np.clip((s - 0.6) / 0.1, 0, 1))
    things = [b.moving("still", x, floor - b.below), a.moving("down", x, y)]
    return things, gripper, [(0.6 * (canvas.frames - 1), b.material)]


def _gripping_place(
    rng: random.Random, thing: _Draft, canvas: Canvas
) -> tuple[float, float, float]:
    """x, and y of the thing on the floor and in the air."""
    x = rng.uniform(60, canvas.width - 60)
    floor = rng.uniform(canvas.height - 42, canvas.height - 10) - thing.radius
    return x, floor, floor - rng.uniform(55, 80)


def _gripper(thing: _Draft, x: Track | float, y: Track, opening: Track) -> Gripper:
    """A gripper around the centre ``y`` of a thing, ``opening`` wider than it needs to be."""
    palm = 1.4 * thing.radius + 4
    columns = [np.zeros_like(y) + x, y - palm, thing.half_width + 3 + opening]
    columns.append(np.full_like(y, palm + 0.5 * thing.radius))
    return Gripper(np.stack(columns, 1))


def _bounce(rng: random.Random, drafts: list[_Draft], canvas: Canvas) -> _Act:
    """A thing falls to the floor and jumps up again, once."""
    thing, s = drafts[0], canvas.progress
    hit = rng.uniform(0.4, 0.55)
    floor = rng.uniform(canvas.height * 0.75, canvas.height - 8) - thing.below
    high = max(floor - rng.uniform(70, 110), thing.above + 4)
    rebound = 0.6 * (floor - high)
    after = np.clip((s - hit) / (1 - hit), 0, 1)
    falling = high + (floor - high) * np.clip(s / hit, 0, 1) ** 2
    y = np.where(s < hit, falling, floor - rebound * (1 - (1 - after) ** 2))
    x = rng.uniform(thing.half_width + 4, canvas.width - thing.half_width - 4)
    return [thing.moving("down", x, y)], None, [(hit * (canvas.frames - 1), thing.material)]


def _hide(rng: random.Random, drafts: list[_Draft], canvas: Canvas) -> _Act:
    """A small thing passes behind a large one, which stands still."""
    a, b = drafts[0].resized(rng, "small"), drafts[1].resized(rng, "large")
    right = rng.random() < 0.5
    far = min(rng.uniform(150, 190), canvas.width - 2 * a.half_width - 8)
    start = rng.uniform(a.half_width + 4, canvas.width - far - a.half_width - 4)
    x = start + far * canvas.progress
    middle = start + far * rng.uniform(0.45, 0.55)
    y = rng.uniform(b.above + 4, canvas.height - b.below - 4)
    if not right:
        x, middle = canvas.width - x, canvas.width - middle
    things = [a.moving("right" if right else "left", x, y), b.moving("still", middle, y)]
    return things, None, []


_ACTS = {
    "single": _single,
    "two": _two,
    "three": _three,
    "push": _push,
    "lift": _lift,
    "pick": _pick,
    "drop": _drop,
    "stack": _stack,
    "bounce": _bounce,
    "hide": _hide,
}
