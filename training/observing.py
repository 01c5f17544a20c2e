"""What clips show, by classical vision: nothing of the scene, the prompt or a model is known here.

Pixels are sorted by the palette's colours; shape is how much of its bounding box a thing fills and
how far below the middle its centroid is, size its area, motion the way of its centroid. The gripper
is what is black.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from training.captions import Caption
from training.scenes import COLOURS, TONES, Scene

LEAST_AREA = 250  # pixels of a colour or of black below which nothing is seen
MOVED = 24  # pixels
TOUCHING = 4  # pixels between two bounding boxes
_BEGUN = 3  # pixels from where a thing was
_LARGE = 1500  # pixels
_TRIANGLE, _BLUNT_TRIANGLE, _CIRCLE = 0.6, 0.74, 0.885  # shares of the box that shapes fill at most
_LOW = 0.07  # of the height: how far the centroid of a triangle is below the middle, at least

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class SeenThing:
    """One colour of a clip. ``centres`` [T, 2], ``boxes`` [T, 4] (left, top, right, bottom);
    NaN in frames where it is not seen."""

    colour: str
    shape: str
    size: str
    motion: str
    centres: Floats
    boxes: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """What a clip shows. ``gripper`` [T, 2] is the middle and the lower edge of what is black."""

    things: tuple[SeenThing, ...]
    tone: str
    gripper: Floats | None

    def __str__(self) -> str:
        """In words: "a small red circle that moves right, on a grey background"."""
        moves = {"still": "stands still"}
        things = [
            f"a {t.size} {t.colour} {t.shape} that {moves.get(t.motion, f'moves {t.motion}')}"
            for t in self.things
        ]
        things += ["a gripper"] if self.gripper is not None else []
        return f"{' and '.join(things) or 'nothing'}, on a {self.tone} background"

    def contact(self) -> float | None:
        """First frame in which the boxes of two things touch.

        None if there are no two things, or they never touch.
        """
        if len(self.things) < 2:
            return None
        gap = _gap(self.things[0].boxes, self.things[1].boxes)
        touching = np.flatnonzero(gap <= TOUCHING)
        return float(touching[0]) if len(touching) else None

    def push(self) -> float | None:
        """Last frame before the second of two things begins to move; None if there are no two, or one rests."""
        begun = [_begun(thing.centres) for thing in self.things]
        return None if len(begun) != 2 or None in begun else max(begun) - 1


@torch.no_grad()
def observe(video: Tensor | NDArray[np.uint8]) -> Seen:
    """What the clip uint8 [T, H, W, 3] shows."""
    return observe_all(torch.as_tensor(video).unsqueeze(0))[0]


@torch.no_grad()
def observe_all(videos: Tensor, batch: int = 16) -> list[Seen]:
    """What each of the clips uint8 [B, T, H, W, 3] shows; the counting is done where they are."""
    seen: list[Seen] = []
    for part in videos.split(batch):
        counted = {name: value.cpu().double().numpy() for name, value in _count(part).items()}
        seen += [_read({n: v[i] for n, v in counted.items()}) for i in range(len(part))]
    return seen


def _count(videos: Tensor) -> dict[str, Tensor]:
    """Area, centroid and bounding box of each colour and of black; level of the background."""
    v = videos.float()
    palette = torch.tensor(list(COLOURS.values()), device=v.device, dtype=torch.float32)
    high, low = v.amax(-1), v.amin(-1)
    saturated, black = (high - low) > 70, high < 42
    nearest = torch.stack([(v - colour).square().sum(-1) for colour in palette]).argmin(0)
    masks = [_solid(saturated & (nearest == i)) for i in range(len(palette))]
    mask = torch.stack([*masks, black], 2)  # [B, T, colours, H, W]
    rows, columns = mask.sum(4).float(), mask.sum(3).float()
    area = rows.sum(3)
    ys = torch.arange(rows.shape[3], device=v.device).float()
    xs = torch.arange(columns.shape[3], device=v.device).float()
    flat = v.mean(-1)[:, :, ::4, ::4].flatten(1)
    plain = ~(saturated | black)[:, :, ::4, ::4].flatten(1)
    return {
        "area": area,
        "y": (rows * ys).sum(3) / area.clamp(min=1),
        "x": (columns * xs).sum(3) / area.clamp(min=1),
        "top": _first(rows >= 2),
        "bottom": rows.shape[3] - _first((rows >= 2).flip(3)),
        "left": _first(columns >= 2),
        "right": columns.shape[3] - _first((columns >= 2).flip(3)),
        "height": (rows >= 2).sum(3),
        "width": (columns >= 2).sum(3),
        "level": flat.masked_fill(~plain, torch.nan).nanmedian(1).values,
    }


def _solid(mask: Tensor) -> Tensor:
    """A mask [B, T, H, W] without what is thinner than two pixels, as where two colours blend to a third,
    and with what it encloses in its row and its column: things are convex, and have spots."""
    kept = 1 - F.max_pool2d(1 - mask.float(), 2, 1)
    thick = F.max_pool2d(F.pad(kept, (1, 1, 1, 1)), 2, 1) > 0
    sides = (thick.flip(flips).cummax(axis).values.flip(flips)
             for axis in (2, 3) for flips in ((), (axis,)))  # fmt: skip
    return torch.stack(list(sides)).all(0)


def _first(mask: Tensor) -> Tensor:
    """Index of the first True along the last axis; its length if there is none."""
    count = mask.shape[-1]
    order = torch.arange(count, device=mask.device).expand_as(mask)
    return torch.where(mask, order, count).amin(-1)


def _read(n: dict[str, Floats]) -> Seen:
    things = []
    for index, colour in enumerate(COLOURS):
        visible = n["area"][:, index] > LEAST_AREA
        if visible.mean() >= 0.6:
            things.append(_thing(colour, index, visible, n))
    level = float(np.nan_to_num(n["level"]))
    tone = min(TONES, key=lambda name: abs(level - float(np.mean(TONES[name]))))
    black = n["area"][:, -1] > LEAST_AREA
    gripper = None
    if black.mean() > 0.6:
        gripper = np.stack([(n["left"] + n["right"])[:, -1] / 2, n["bottom"][:, -1]], 1)
        gripper[~black] = np.nan
    return Seen(tuple(things), tone, gripper)


def _thing(colour: str, index: int, visible: NDArray[np.bool_], n: dict[str, Floats]) -> SeenThing:
    area = n["area"][:, index]
    box = n["height"][:, index] * n["width"][:, index]
    fill = float(np.median((area / np.maximum(box, 1))[visible]))
    middle = (n["top"] + n["bottom"])[:, index] / 2 - 0.5
    lean = (n["y"][:, index] - middle) / np.maximum(n["height"][:, index], 1)
    low = float(np.median(lean[visible])) > _LOW
    if fill < _TRIANGLE or (low and fill < _BLUNT_TRIANGLE):
        shape = "triangle"
    else:
        shape = "circle" if fill < _CIRCLE else "square"
    size = "large" if np.median(area[visible]) > _LARGE else "small"
    centres = np.stack([n["x"][:, index], n["y"][:, index]], 1)
    boxes = np.stack([n[side][:, index] for side in ("left", "top", "right", "bottom")], 1)
    for table in (centres, boxes):
        table[~visible] = np.nan
    return SeenThing(colour, shape, size, _motion(centres[visible]), centres, boxes)


def _motion(centres: Floats) -> str:
    dx, dy = centres[-2:].mean(0) - centres[:2].mean(0)
    if max(abs(dx), abs(dy)) <= MOVED:
        return "still"
    if abs(dx) > abs(dy):
        return "right" if dx > 0 else "left"
    return "down" if dy > 0 else "up"


def _begun(centres: Floats) -> float | None:
    """First frame in which a thing is elsewhere than at first; None if it stays."""
    start = centres[~np.isnan(centres[:, 0])][:2].mean(0)
    elsewhere = np.flatnonzero(np.abs(centres - start).max(1) > _BEGUN)
    return float(elsewhere[0]) if len(elsewhere) else None


def _gap(a: Floats, b: Floats) -> Floats:
    """Horizontal and vertical distance of two boxes, the larger of both; negative: they overlap."""
    across = np.maximum(a[:, 0] - b[:, 2], b[:, 0] - a[:, 2])
    along = np.maximum(a[:, 1] - b[:, 3], b[:, 1] - a[:, 3])
    return np.maximum(across, along)


def confirm(scene: Scene, caption: Caption, seen: Seen) -> dict[str, bool]:
    """Which of the attributes that a caption tells are seen. ``all`` is every one together."""
    found = {thing.colour: thing for thing in seen.things}
    pairs = [(thing, found.get(thing.colour)) for thing in scene.things]
    result = {
        "colour": set(found) == {thing.colour for thing in scene.things},
        "shape": all(o is not None and o.shape == t.shape for t, o in pairs),
        "gripper": (seen.gripper is not None) == (scene.gripper is not None),
    }
    if scene.canvas.frames > 1:
        result["motion"] = all(o is not None and o.motion == t.motion for t, o in pairs)
    if any(caption.sizes):
        result["size"] = all(
            o is not None and (not said or o.size == t.size)
            for (t, o), said in zip(pairs, caption.sizes, strict=True)
        )
    if caption.tone:
        result["tone"] = seen.tone == scene.tone
    result["all"] = all(result.values())
    return result


def confirm_all(
    scenes: Sequence[Scene], captions: Sequence[Caption], videos: Tensor
) -> list[dict[str, bool]]:
    """`confirm` for each scene and its clip uint8 [B, T, H, W, 3]."""
    rows = zip(scenes, captions, observe_all(videos), strict=True)
    return [confirm(*row) for row in rows]
