"""Pixels of scenes on any device: anti-aliased flat shapes over a background that darkens downwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from training.scenes import COLOURS, MATERIALS, SHAPES, TONES, Scene

THINGS = 3  # at most, in one scene
SPOT = 6.0  # pixels at most, of the radius of a spot
INKS = 250.0, 134.0  # of metal and wood; a dark one, blurred, would turn orange into red
SEGMENTS = ((255, 80, 80), (80, 255, 80), (80, 80, 255))  # of things in a map of segments
_SPOTS = {"rubber": 0.0, "wood": -1.0, "metal": 1.0}


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """Numbers of scenes that `render` needs, scenes in front.

    ``things`` [B, N, T, 8]: x, y, radius (0: no thing), shape, red, green, blue, spot.
    ``gripper`` [B, T, 4], opening 0: none. ``tone`` [B, 3].
    """

    things: Tensor
    gripper: Tensor
    tone: Tensor

    def to(self, device: torch.device | str) -> Packed:
        return Packed(*(getattr(self, f.name).to(device) for f in fields(self)))

    def take(self, index: Tensor | slice) -> Packed:
        return Packed(*(getattr(self, f.name)[index] for f in fields(self)))

    def at(self, index: Tensor) -> Packed:
        """Frames ``index`` [B, T'] of each scene."""
        things = index[:, None, :, None].expand(-1, self.things.shape[1], -1, 8)
        gripper = index[:, :, None].expand(-1, -1, 4)
        return Packed(self.things.gather(2, things), self.gripper.gather(1, gripper), self.tone)

    def frames(self, index: Sequence[int]) -> Packed:
        chosen = torch.tensor(list(index), device=self.things.device)
        return Packed(
            self.things.index_select(2, chosen), self.gripper.index_select(1, chosen), self.tone
        )

    def __len__(self) -> int:
        return len(self.tone)


def pack(scenes: Sequence[Scene]) -> Packed:
    """The numbers of scenes of the same length."""
    frames = scenes[0].canvas.frames
    things = np.zeros((len(scenes), THINGS, frames, 8), np.float32)
    gripper = np.zeros((len(scenes), frames, 4), np.float32)
    tone = np.array([TONES[scene.tone] for scene in scenes], np.float32)
    for i, scene in enumerate(scenes):
        for j, thing in enumerate(scene.things):
            row = things[i, j]
            row[:, :2] = thing.path
            row[:, 2:] = (
                thing.radius,
                SHAPES.index(thing.shape),
                *COLOURS[thing.colour],
                _SPOTS[thing.material],
            )
        if scene.gripper is not None:
            gripper[i] = scene.gripper.path
    return Packed(torch.from_numpy(things), torch.from_numpy(gripper), torch.from_numpy(tone))


def render(
    packed: Packed,
    height: int,
    width: int,
    *,
    canvas_height: int | None = None,
    corner: Tensor | None = None,
) -> Tensor:
    """Pixels [B, T, height, width, 3] in [-1, 1].

    ``corner`` [B, 2] is the left upper corner of each scene's window of a canvas of
    ``canvas_height``.
    """
    things, device = packed.things, packed.things.device
    y = torch.arange(height, device=device).view(1, 1, -1, 1) + 0.5
    x = torch.arange(width, device=device).view(1, 1, 1, -1) + 0.5
    if corner is not None:
        x, y = x + corner[:, 0].view(-1, 1, 1, 1), y + corner[:, 1].view(-1, 1, 1, 1)
    shade = 1.06 - 0.16 * (y / (canvas_height or height))
    image = packed.tone.view(-1, 1, 1, 1, 3) * shade.unsqueeze(-1)
    image = image.expand(-1, things.shape[2], -1, width, -1)
    for j in range(things.shape[1]):
        cx, cy, radius, shape, spot = (things[:, j, :, k, None, None] for k in (0, 1, 2, 3, 7))
        edge = _distance(x - cx, y - cy, radius, shape)
        alpha = (0.5 - edge).clamp(0, 1) * (radius > 0)
        inner = torch.sqrt((x - cx).square() + (y - cy).square()) - (0.3 * radius).clamp(max=SPOT)
        mark = ((0.5 - inner).clamp(0, 1) * spot.abs()).unsqueeze(-1)
        colour = things[:, j, :, None, None, 4:7]
        ink = torch.where(spot > 0, *INKS).unsqueeze(-1)
        colour = colour + mark * (ink - colour)
        image = image + alpha.unsqueeze(-1) * (colour - image)
    alpha = (_gripper_alpha(packed.gripper, x, y)).unsqueeze(-1)
    image = image + alpha * (12.0 - image)
    return image / 127.5 - 1


def segmented(packed: Packed) -> Packed:
    """The same scenes as maps of segments: each thing in the colour of its place, on black, without spots."""
    things = packed.things.clone()
    for place, colour in enumerate(SEGMENTS):
        things[:, place, :, 4:7] = torch.tensor(colour, dtype=things.dtype)
    things[..., 7] = 0
    return Packed(things, packed.gripper, torch.zeros_like(packed.tone))


def _distance(dx: Tensor, dy: Tensor, radius: Tensor, shape: Tensor) -> Tensor:
    """Signed distance to the outline, negative inside. Shapes are numbered as in SHAPES."""
    square = torch.maximum(dx.abs(), dy.abs()) - 0.9 * radius
    circle = torch.sqrt(dx * dx + dy * dy) - radius
    side = (dx.abs() * 2.2 - (dy + 1.3 * radius) * 1.25) / 2.53
    triangle = torch.maximum(dy - 0.9 * radius, side)
    return torch.where(shape == 0, square, torch.where(shape == 1, circle, triangle))


def _gripper_alpha(gripper: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Coverage by a stem from above, a palm and two fingers."""
    gx, gy, opening, finger = (gripper[:, :, k, None, None] for k in range(4))
    dx, dy = (x - gx).abs(), y - gy
    stem = torch.maximum(dx - 4, dy)
    palm = torch.maximum(dx - (opening + 6), dy.abs() - 4)
    fingers = torch.maximum((dx - opening - 3).abs() - 3, (dy - finger / 2).abs() - finger / 2)
    edge = torch.minimum(torch.minimum(stem, palm), fingers)
    return (0.5 - edge).clamp(0, 1) * (opening > 0)


def occupied(pixels: Tensor, grow: int = 3) -> Tensor:
    """Bool [B, T, H, W]: pixels that are no background, and what is within ``grow`` of them."""
    there = ((pixels.amax(-1) - pixels.amin(-1)) > 0.4) | (pixels.amax(-1) < -0.7)
    flat = there.float().flatten(0, 1).unsqueeze(1)
    near = torch.nn.functional.max_pool2d(flat, 2 * grow + 1, 1, grow)
    return near.squeeze(1).view(there.shape) > 0


def to_bytes(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] as uint8."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def true_clip(scene: Scene, frames: Sequence[int] | None = None) -> Tensor:
    """The world's own clip of a scene, or some frames of it, uint8 [T, H, W, 3]."""
    canvas = scene.canvas
    packed = pack([scene]).frames(range(canvas.frames) if frames is None else frames)
    return to_bytes(render(packed, canvas.height, canvas.width))[0]


assert set(_SPOTS) == set(MATERIALS)
