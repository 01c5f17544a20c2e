"""Memory of the API process while eight requests at once bring the worst media: small files, many pixels."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import pytest
from generators import create, finished
from limits import HANG
from PIL import Image
from servers import Server

pytestmark = pytest.mark.serve
MIB = 2**20
AT_ONCE = 8
SMALL = {"prompt": "a boat", "size": "64x64", "num_frames": 9, "num_inference_steps": 1}


def grey_clip(side: int, frames: int) -> bytes:
    """A grey wall: a few kilobytes that stand for ``frames`` times ``side`` squared pixels."""
    buffer = io.BytesIO()
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
    buffer = io.BytesIO()
    Image.new("L", (side, side), 120).save(buffer, kind, **options)
    return buffer.getvalue()


# The field, a file that stands for many pixels, and how many MiB eight requests with one each may take.
WORST: dict[str, tuple[str, Callable[[], bytes], int]] = {
    "a clip": ("input_reference", lambda: grey_clip(4096, 6), 2048),
    "a control": ("edge", lambda: grey_clip(2048, 12), 768),
    "a picture": ("input_reference", lambda: grey_picture(6000, "TIFF", compression="tiff_adobe_deflate"), 2048),
}  # fmt: skip


@pytest.mark.parametrize("name", WORST)
def test_small_files_do_not_become_gigabytes(generator_server: Server, name: str) -> None:
    field, make, most = WORST[name]
    whole = make()
    assert len(whole) < 2 * MIB
    finished(generator_server, create(generator_server, **{**SMALL, "prompt": "a warm-up"}))
    Path(f"/proc/{generator_server.pid}/clear_refs").write_text("5")  # the peak starts anew
    base = memory(generator_server, "VmRSS")

    def ask(seed: int) -> httpx.Response:
        return httpx.post(
            f"{generator_server.url}/v1/videos",
            data={**SMALL, "seed": seed},
            files={field: ("it", whole)},
            timeout=HANG,
        )

    with ThreadPoolExecutor(AT_ONCE) as threads:
        answers = list(threads.map(ask, range(AT_ONCE)))
    assert memory(generator_server, "VmHWM") - base < most * MIB
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) <= {200, 413, 429}
    assert 200 in statuses
    for answer in answers:
        if answer.status_code == 200:
            url = f"{generator_server.url}/v1/videos/{answer.json()['id']}"
            assert httpx.delete(url, timeout=HANG).status_code == 200


def memory(server: Server, name: str) -> int:
    """Bytes of the process that listens."""
    status = Path(f"/proc/{server.pid}/status").read_text()
    return 1024 * int(re.findall(rf"{name}:\s+(\d+)", status)[0])
