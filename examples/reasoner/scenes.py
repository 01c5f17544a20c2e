"""Pictures and clips for the examples, drawn here so that nothing has to be downloaded.

A scene is a function from time in [0, 1] to a picture. ``media("table.mp4")`` draws what is missing
into a folder and returns the path; ``python scenes.py DIR`` draws everything to look at.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 640, 480
SECONDS, FPS = 4, 12
SMOOTH = 2  # drawn twice as large, then reduced: PIL does not smooth edges

Scene = Callable[[float], Image.Image]
Colour = str | tuple[int, ...]


def media(name: str, folder: str | Path = "cosmos3-examples") -> Path:
    """Path of a drawn picture or clip such as ``table.png`` or ``road.mp4``; draws it if missing."""
    if name not in MEDIA:
        raise KeyError(f"no drawn file is called {name!r}; there are {', '.join(MEDIA)}")
    path = Path(folder) / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".png":
            MEDIA[name](0.0).save(path)
        else:
            write_clip(path, MEDIA[name])
    return path


def write_clip(path: Path, scene: Scene, seconds: float = SECONDS, fps: int = FPS) -> None:
    """Write the scene as H.264 in MP4, ``seconds * fps`` frames of even width and height."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "20"})
        (stream.width, stream.height), stream.pix_fmt = scene(0.0).size, "yuv420p"
        count = round(seconds * fps)
        for index in range(count):
            frame = av.VideoFrame.from_image(scene(index / max(1, count - 1)))
            frame.pts, frame.time_base = index, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


class Canvas:
    """ImageDraw in units of the final picture, smoothed."""

    def __init__(self, sky: tuple[int, int, int], ground: tuple[int, int, int]) -> None:
        self.image = Image.new("RGB", (WIDTH * SMOOTH, HEIGHT * SMOOTH))
        self.draw = ImageDraw.Draw(self.image)
        for row in range(HEIGHT):  # a vertical gradient
            share = row / HEIGHT
            colour = tuple(round(a + (b - a) * share) for a, b in zip(sky, ground, strict=True))
            self.draw.rectangle(self._scaled(0, row, WIDTH, row + 1), fill=colour)

    def box(self, x: float, y: float, w: float, h: float, fill: Colour, radius: float = 0) -> None:
        corners = self._scaled(x, y, x + w, y + h)
        self.draw.rounded_rectangle(corners, radius=radius * SMOOTH, fill=fill)

    def disc(self, x: float, y: float, rx: float, fill: Colour, ry: float | None = None) -> None:
        ry = rx if ry is None else ry
        self.draw.ellipse(self._scaled(x - rx, y - ry, x + rx, y + ry), fill=fill)

    def shape(self, points: list[tuple[float, float]], fill: Colour) -> None:
        self.draw.polygon(self._scaled(*(v for p in points for v in p)), fill=fill)

    def line(self, points: list[tuple[float, float]], fill: Colour, width: float) -> None:
        self.draw.line(
            self._scaled(*(v for p in points for v in p)),
            fill=fill,
            width=round(width * SMOOTH),
            joint="curve",
        )
        for x, y in points:  # round ends and joints
            self.disc(x, y, width / 2, fill)

    def text(self, x: float, y: float, text: str, fill: Colour, size: int = 18) -> None:
        font = ImageFont.load_default(size * SMOOTH)
        self.draw.text((x * SMOOTH, y * SMOOTH), text, fill=fill, font=font, anchor="mm")

    def done(self) -> Image.Image:
        return self.image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)

    @staticmethod
    def _scaled(*values: float) -> list[float]:
        return [v * SMOOTH for v in values]


def table(t: float) -> Image.Image:
    """A gripper takes the red cube from a table and lays it into a tray."""
    canvas = Canvas((226, 232, 238), (196, 204, 212))
    canvas.shape([(60, 250), (580, 250), (640, 430), (0, 430)], (186, 140, 96))
    canvas.box(0, 430, WIDTH, 22, (140, 100, 64))
    canvas.shape([(430, 325), (580, 325), (602, 395), (416, 395)], (92, 98, 108))
    canvas.shape([(442, 333), (568, 333), (584, 385), (430, 385)], (128, 136, 148))
    _cube(canvas, 235, 300, 46, (58, 134, 210))
    _cube(canvas, 318, 340, 52, (72, 168, 96))

    # over the cube, down, up with it, over the tray, down, open and away
    x = _along(t, [(0, 330), (0.2, 140), (0.55, 140), (0.8, 510), (1, 510)])
    y = _along(
        t, [(0, 110), (0.2, 190), (0.35, 330), (0.55, 190), (0.8, 190), (0.92, 320), (1, 240)]
    )
    opening = _along(t, [(0, 34), (0.33, 34), (0.37, 26), (0.92, 26), (0.95, 36), (1, 36)])
    held = 0.36 <= t <= 0.93
    cube_x, cube_y = (x, y) if held else ((140, 330) if t < 0.36 else (510, 320))
    canvas.disc(cube_x + 8, 374, 40, (120, 92, 66), 6)
    _cube(canvas, cube_x - 23, cube_y, 46, (214, 64, 58))
    canvas.line([(x, -10), (x, y - 62)], (84, 90, 100), 22)
    canvas.box(x - 44, y - 66, 88, 26, (52, 58, 68), 8)
    for side in (-1, 1):
        canvas.box(x + side * opening - 6, y - 44, 12, 66, (70, 78, 90), 5)
    return canvas.done()


def marked_table(t: float) -> Image.Image:
    """The table at a moment, its subjects marked with numbers."""
    picture = table(t)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(20)
    for number, (x, y) in enumerate([(140, 310), (258, 285), (344, 320), (510, 350), (330, 60)], 1):
        draw.ellipse((x - 15, y - 15, x + 15, y + 15), fill="white", outline="black", width=2)
        draw.text((x, y), str(number), fill="black", font=font, anchor="mm")
    return picture


def road(t: float) -> Image.Image:
    """Behind a braking car on a straight road, a pedestrian steps out ahead."""
    canvas = Canvas((150, 190, 228), (214, 226, 236))
    canvas.box(0, 220, WIDTH, HEIGHT - 220, (112, 146, 96))
    for x, height in ((30, 90), (105, 60), (490, 70), (560, 110)):
        canvas.box(x, 222 - height, 62, height, (158, 160, 170))
        for window in range(int(height // 24)):
            canvas.box(x + 10, 230 - height + window * 24, 42, 9, (206, 216, 226))
    canvas.shape([(296, 220), (344, 220), (700, 480), (-60, 480)], (78, 80, 86))
    for side in (-1, 1):
        edge = [(320 + side * 22, 220), (320 + side * 24, 220), (320 + side * 352, 480)]
        canvas.shape([*edge, (320 + side * 330, 480)], (228, 228, 222))
    travelled = 6 * (t - t * t / 2.4)  # slowing down
    for dash in range(14):
        depth = dash - travelled % 1
        near, far = (_road_row(max(0.0, depth + length)) for length in (0.0, 0.45))
        if depth > -0.45:
            w = (near - 220) / 26, (far - 220) / 26
            points = [(320 - w[0], near), (320 + w[0], near), (320 + w[1], far), (320 - w[1], far)]
            canvas.shape(points, (236, 226, 160))

    walk = max(0.0, (t - 0.35) / 0.65)
    _person(canvas, 520 - 230 * walk, 268, 0.42, phase=walk * 9, shirt=(232, 150, 44))
    size = _along(t, [(0, 0.55), (1, 1.0)])
    _car(canvas, 350 + 30 * size, 285 + 62 * size, size, braking=t > 0.3)
    canvas.line([(610, 480), (610, 120)], (70, 70, 74), 9)
    canvas.box(592, 70, 36, 92, (42, 44, 48), 6)
    for index, colour in enumerate([(222, 60, 50), (232, 190, 60), (80, 190, 100)]):
        lit = index == (0 if t > 0.3 else 1)
        canvas.disc(610, 88 + index * 28, 11, colour if lit else (70, 72, 74))
    return canvas.done()


def ball(t: float, *, teleports: bool = False) -> Image.Image:
    """A ball bounces across a floor; the impossible one vanishes for a moment and jumps back."""
    canvas = Canvas((236, 232, 224), (214, 206, 196))
    canvas.box(0, 380, WIDTH, 100, (150, 128, 110))
    canvas.box(0, 380, WIDTH, 4, (112, 94, 80))
    hidden = teleports and 0.45 < t < 0.6
    along = t - 0.4 if teleports and t >= 0.6 else t
    x = 60 + 520 * along
    bounce = abs(math.cos(along * 3.5 * math.pi))
    y = 350 - 210 * bounce * (1 - 0.45 * along)
    if not hidden:
        canvas.disc(x, 388, 18 + 14 * (y / 350), (118, 100, 88), 5)
        canvas.disc(x, y, 32, (206, 70, 52))
        canvas.disc(x - 10, y - 11, 9, (240, 150, 130))
    return canvas.done()


def teleporting_ball(t: float) -> Image.Image:
    """The ball that breaks object permanence."""
    return ball(t, teleports=True)


def doorway(t: float) -> Image.Image:
    """A person carries a box towards a closed door and stops in front of it."""
    canvas = Canvas((234, 228, 214), (222, 214, 198))
    canvas.box(0, 400, WIDTH, 80, (142, 118, 92))
    canvas.box(0, 394, WIDTH, 8, (250, 248, 242))
    canvas.box(452, 128, 132, 270, (250, 248, 242), 3)
    canvas.box(462, 138, 112, 260, (120, 84, 58), 3)
    for top in (156, 280):
        canvas.box(478, top, 80, 96, (138, 98, 70), 3)
    canvas.disc(478, 268, 7, (222, 190, 92))
    canvas.box(70, 150, 130, 96, (250, 248, 242))
    canvas.box(80, 160, 110, 76, (168, 206, 228))
    walked = min(1.0, t / 0.8)
    x = 70 + 290 * walked
    _person(canvas, x, 262, 1.0, phase=walked * 14 * (t < 0.8), shirt=(58, 110, 168), carrying=True)
    canvas.box(x + 22, 268, 74, 58, (196, 152, 98), 2)
    canvas.box(x + 54, 268, 10, 58, (226, 200, 150))
    return canvas.done()


def _cube(canvas: Canvas, x: float, y: float, size: float, colour: tuple[int, int, int]) -> None:
    """A cube whose front face has its upper left corner at x, y."""
    depth = size * 0.3
    light = tuple(min(255, c + 36) for c in colour)
    dark = tuple(int(c * 0.7) for c in colour)
    right, bottom = x + size, y + size
    top = [(x, y), (x + depth, y - depth), (right + depth, y - depth), (right, y)]
    canvas.shape(top, light)
    side = [
        (right, y),
        (right + depth, y - depth),
        (right + depth, bottom - depth),
        (right, bottom),
    ]
    canvas.shape(side, dark)
    canvas.box(x, y, size, size, colour)


def _person(
    canvas: Canvas,
    x: float,
    y: float,
    size: float,
    *,
    phase: float,
    shirt: Colour,
    carrying: bool = False,
) -> None:
    """A walking figure with the shoulders at x, y; its feet are 135 * size lower."""
    swing = math.sin(phase) * 26 * size
    hip = y + 66 * size
    for side, shade in ((-1, (52, 56, 70)), (1, (66, 72, 88))):
        canvas.line([(x, hip), (x + side * swing, y + 130 * size)], shade, 17 * size)
    canvas.line([(x, y), (x, hip)], shirt, 34 * size)
    hands = [(x + 44 * size, y + 50 * size)] if carrying else [(x - swing, y + 58 * size)]
    for hand in hands:
        canvas.line([(x, y + 4 * size), hand], (226, 178, 142), 11 * size)
    canvas.disc(x, y - 40 * size, 21 * size, (226, 178, 142))
    canvas.disc(x - 3 * size, y - 50 * size, 20 * size, (74, 52, 40), 12 * size)


def _car(canvas: Canvas, x: float, y: float, size: float, *, braking: bool) -> None:
    """The back of a car standing on the point x, y."""
    w, h = 150 * size, 62 * size
    canvas.disc(x, y, w * 0.56, (56, 58, 62), 8 * size)
    for side in (-1, 1):
        canvas.box(
            x + side * w * 0.36 - 12 * size, y - 20 * size, 24 * size, 22 * size, (30, 30, 34), 4
        )
    roof = [(-0.34, -1.62), (0.34, -1.62), (0.44, -0.9), (-0.44, -0.9)]
    canvas.shape([(x + a * w, y + b * h) for a, b in roof], (46, 92, 150))
    glass = [(-0.29, -1.52), (0.29, -1.52), (0.37, -0.95), (-0.37, -0.95)]
    canvas.shape([(x + a * w, y + b * h) for a, b in glass], (166, 196, 216))
    canvas.box(x - w / 2, y - h, w, h * 0.86, (58, 112, 176), 9 * size)
    canvas.box(x - w * 0.16, y - h * 0.48, w * 0.32, h * 0.24, (240, 240, 236), 2)
    lamp = (255, 58, 44) if braking else (132, 34, 34)
    for side in (-1, 1):
        canvas.box(x + side * w * 0.37 - w * 0.09, y - h * 0.86, w * 0.18, h * 0.28, lamp, 4 * size)


def _road_row(depth: float) -> float:
    """Row of the picture where a point of the road at this depth appears; the horizon is 220."""
    return 220 + 260 / (1 + 0.9 * depth)


def _along(t: float, stops: list[tuple[float, float]]) -> float:
    """The value at time t between (time, value) stops, eased at each stop."""
    for (t0, v0), (t1, v1) in pairwise(stops):
        if t <= t1:
            share = (t - t0) / (t1 - t0)
            return v0 + (v1 - v0) * (3 - 2 * share) * share * share
    return stops[-1][1]


MEDIA: dict[str, Scene] = {
    "table.png": table,
    "marked.png": marked_table,
    "table.mp4": table,
    "road.mp4": road,
    "ball.mp4": ball,
    "teleport.mp4": teleporting_ball,
    "doorway.mp4": doorway,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", default="cosmos3-examples")
    folder = parser.parse_args().folder
    for name in MEDIA:
        print(media(name, folder))


if __name__ == "__main__":
    main()
