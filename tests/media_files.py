"""Pictures and clips that the tests draw themselves."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import av
import numpy as np
from PIL import Image


@contextmanager
def file_server(folder: Path, before: Callable[[str], object] = lambda _: None) -> Iterator[str]:
    """The address of a server of the files of a folder. ``before`` is called with the path that is asked for."""

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            before(self.path)
            super().do_GET()

    handler = partial(Handler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


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


def encoded(  # a clip has that many properties
    *,
    codec: str = "libx264",
    container: str = "mp4",
    width: int = 96,
    height: int = 64,
    frames: int = 24,
    fps: Fraction | int = 24,
    pixels: str = "yuv420p",
    title: str = "",
    without: Container[int] = (),
    **options: str,
) -> bytes:
    """A clip of a drifting texture, as a file in memory; frames ``without`` were lost."""
    texture = np.asarray(picture(2 * width, 2 * height, seed=frames))
    buffer = BytesIO()
    with av.open(buffer, "w", format=container) as file:
        stream = file.add_stream(codec, rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        if title:
            file.metadata["title"] = title
        for index in (index for index in range(frames) if index not in without):
            top, left = index % height, 2 * index % width
            window = np.ascontiguousarray(texture[top : top + height, left : left + width])
            frame = av.VideoFrame.from_ndarray(window, format="rgb24")
            frame.pts = index
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return buffer.getvalue()


def turned(data: bytes, degrees: int, container: str = "mp4") -> bytes:
    """The same clip with a note to players that they must turn it."""
    buffer = BytesIO()
    with av.open(BytesIO(data)) as source, av.open(buffer, "w", format=container) as file:
        stream = file.add_stream_from_template(source.streams.video[0])
        stream.set_display_rotation(degrees)
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = stream
                file.mux(packet)
    return buffer.getvalue()


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
