"""Pictures and clips that the tests draw themselves."""

from __future__ import annotations

import base64
from io import BytesIO
from pathlib import Path

import av
import numpy as np
from PIL import Image


def picture(width: int = 128, height: int = 96, seed: int = 0) -> Image.Image:
    """A smooth random picture, different for each seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def clip(path: Path, *, frames: int = 48, fps: int = 24, seed: int = 0, size: int = 64) -> Path:
    """An H.264 clip of a moving square."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        background = np.asarray(picture(size, size, seed))
        for index in range(frames):
            pixels = background.copy()
            left = index * (size - 16) // max(frames - 1, 1)
            pixels[8:24, left : left + 16] = (255, 40, 40)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def png(image: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def animation(images: list[Image.Image]) -> bytes:
    """The pictures as a GIF file, ten a second."""
    buffer = BytesIO()
    images[0].save(buffer, "GIF", save_all=True, append_images=images[1:], duration=100)
    return buffer.getvalue()


def data_url(data: bytes, kind: str) -> str:
    """``data:`` URL of a file in memory; ``kind`` is its media type."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
