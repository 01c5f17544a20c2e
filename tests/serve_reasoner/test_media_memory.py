"""Memory of the API process while eight requests at once bring the worst media: small files, many pixels."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from grey_media import grey_clip, grey_picture
from limits import HANG
from media_files import data_url, encoded, turned
from servers import Server

pytestmark = pytest.mark.serve

MIB = 2**20
AT_ONCE = 8


# A file that stands for many pixels, and how many MiB eight requests with one each may take.
WORST: dict[str, tuple[Callable[[], bytes], int]] = {
    "a still clip of 4096x4096": (lambda: grey_clip(4096, 12), 768),
    "a turned one": (lambda: turned(grey_clip(2048, 20), 90), 768),
    "a long one": (lambda: grey_clip(1024, 200), 768),
    "10 bits": (lambda: encoded(**DEEP, width=1280, height=720, frames=24), 768),
    "a PNG": (lambda: grey_picture(6000, "PNG"), 2560),
    "a TIFF": (lambda: grey_picture(6000, "TIFF", compression="tiff_adobe_deflate"), 2560),
}
DEEP = {"codec": "libx265", "pixels": "yuv420p10le", "x265-params": "log-level=none"}


@pytest.mark.parametrize("name", WORST)
def test_small_files_do_not_become_gigabytes(reasoner_server: Server, name: str) -> None:
    make, most = WORST[name]
    whole = make()
    assert len(whole) < 2 * MIB
    files = [whole + b"\0\0\0\x0cfree" + index.to_bytes(4, "big") for index in range(AT_ONCE + 1)]
    assert ask(reasoner_server, files.pop()) == 200
    Path(f"/proc/{reasoner_server.pid}/clear_refs").write_text("5")  # the peak starts anew
    base = memory(reasoner_server, "VmRSS")
    with ThreadPoolExecutor(AT_ONCE) as threads:
        statuses = list(threads.map(lambda file: ask(reasoner_server, file), files))
    assert set(statuses) <= {200, 413, 429}
    assert memory(reasoner_server, "VmHWM") - base < most * MIB


def ask(server: Server, data: bytes) -> int:
    modality = "video" if data[4:8] == b"ftyp" else "image"
    url = {f"{modality}_url": {"url": data_url(data, f"{modality}/x")}, "type": f"{modality}_url"}
    body = {
        "model": server.model,
        "messages": [{"role": "user", "content": [url, {"type": "text", "text": "what?"}]}],
        "mm_processor_kwargs": {"fps": 24} if modality == "video" else {},
        "max_tokens": 1,
    }
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=HANG).status_code


def memory(server: Server, name: str) -> int:
    """Bytes of the process that listens."""
    status = Path(f"/proc/{server.pid}/status").read_text()
    return 1024 * int(re.findall(rf"{name}:\s+(\d+)", status)[0])
