"""Memory of the API process while eight requests at once bring the worst media: small files, many pixels."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from generators import create, finished
from grey_media import grey_clip, grey_picture
from limits import HANG
from servers import Server

pytestmark = pytest.mark.serve
MIB = 2**20
AT_ONCE = 8
SMALL = {"prompt": "a boat", "size": "64x64", "num_frames": 9, "num_inference_steps": 1}


# The field, a file that stands for many pixels, and how many MiB eight requests with one each may take.
WORST: dict[str, tuple[str, Callable[[], bytes], int]] = {
    "a clip": ("input_reference", lambda: grey_clip(4096, 6), 2048),
    "a control": ("edge", lambda: grey_clip(1448, 12), 384),
    "a picture": ("input_reference", lambda: grey_picture(4242, "TIFF", compression="tiff_adobe_deflate"), 1024),
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
