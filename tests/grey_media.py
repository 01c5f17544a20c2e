"""Small files that stand for many pixels: grey clips and pictures for tests of memory."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import av
import numpy as np
from PIL import Image


def grey_clip(side: int, frames: int) -> bytes:
    """A grey wall: a few kilobytes that stand for ``frames`` times ``side`` squared pixels."""
    buffer = BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=24, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
        wall = av.VideoFrame.from_ndarray(np.full((side * 3 // 2, side), 120, np.uint8), "yuv420p")
        for index in range(frames):
            wall.pts = index
            file.mux(stream.encode(wall))
        file.mux(stream.encode(None))
    return buffer.getvalue()


def grey_picture(side: int, kind: str, **options: Any) -> bytes:
    buffer = BytesIO()
    Image.new("L", (side, side), 120).save(buffer, kind, **options)
    return buffer.getvalue()
