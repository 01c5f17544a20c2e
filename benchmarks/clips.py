"""Synthetic media for load: each index gives other content, the same index always the same.

A clip is a seeded texture that drifts, as H.264 in MP4; a picture is its first frame as PNG. Content
is unique so that neither the processor cache nor the prefix cache of a server can answer for it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from multiprocessing import get_context

import av
import numpy as np
from PIL import Image


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipShape:
    """Size and length of the clips; ``fps`` frames a second in the container."""

    width: int = 832
    height: int = 480
    seconds: float = 10.0
    fps: float = 24.0


def clip(shape: ClipShape, index: int) -> bytes:
    """The MP4 with this number."""
    buffer = io.BytesIO()
    rate = Fraction(shape.fps).limit_denominator(1000)
    with av.open(buffer, "w", format="mp4") as container:
        options = {"preset": "ultrafast", "crf": "26", "threads": "1"}
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = shape.width, shape.height, "yuv420p"
        for number, pixels in enumerate(frames_of(shape, index)):
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def frames_of(shape: ClipShape, index: int) -> Iterator[np.ndarray]:
    """The frames of the clip with this number, uint8 [H, W, 3]."""
    texture, steps = _texture(shape, index)
    for number in range(max(1, round(shape.seconds * shape.fps))):
        yield _window(texture, steps, shape, number)


def picture(shape: ClipShape, index: int) -> bytes:
    """The PNG with this number."""
    texture, steps = _texture(shape, index)
    buffer = io.BytesIO()
    Image.fromarray(_window(texture, steps, shape, 0)).save(buffer, "png", compress_level=1)
    return buffer.getvalue()


def make_all(kind: str, shape: ClipShape, indices: Iterable[int]) -> list[bytes]:
    """The clips ("video") or pictures ("image") with these numbers, made on all cores."""
    indices = list(indices)
    if not indices:
        return []
    make = {"video": clip, "image": picture}[kind]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        return list(pool.map(partial(make, shape), indices, chunksize=4))


def _texture(shape: ClipShape, index: int) -> tuple[np.ndarray, np.ndarray]:
    """A smooth random texture of twice the frame's size [2H, 2W, 3], and its drift per frame."""
    random = np.random.default_rng((7, index))
    coarse = Image.fromarray(random.integers(0, 256, (18, 32, 3), dtype=np.uint8))
    texture = np.asarray(
        coarse.resize((2 * shape.width, 2 * shape.height), Image.Resampling.BICUBIC)
    )
    return texture, random.integers(1, 5, 2)


def _window(texture: np.ndarray, steps: np.ndarray, shape: ClipShape, number: int) -> np.ndarray:
    """The frame: a window that moves over the texture and turns back at its edges."""
    top, left = (
        abs((int(step) * number + size) % (2 * size) - size)
        for step, size in zip(steps, (shape.height, shape.width), strict=True)
    )
    return np.ascontiguousarray(texture[top : top + shape.height, left : left + shape.width])
