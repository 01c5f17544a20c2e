"""HTTP client of the nodes: JSON in and out, with what every ComfyUI has (torch, numpy, Pillow, PyAV)."""

from __future__ import annotations

import base64
import io
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import av
import numpy as np
import torch
from PIL import Image

POLL_SECONDS = 0.5
SAMPLE_RATE = 48_000  # of silence
# The key of the server is never an input: workflows are shared.
KEY = "VLLM_API_KEY"


def call(server: str, path: str, body: Any = None, method: str | None = None) -> bytes:
    """The answer to one request; a RuntimeError with the server's own words where it is an error."""
    headers = {"Content-Type": "application/json"}
    if os.environ.get(KEY):
        headers["Authorization"] = f"Bearer {os.environ[KEY]}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        server.rstrip("/") + path, data=data, headers=headers, method=method
    )
    try:
        with urllib.request.urlopen(request) as answer:
            return bytes(answer.read())
    except urllib.error.HTTPError as error:
        text = error.read()
        try:
            message = json.loads(text)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = text.decode(errors="replace") or error.reason
        raise RuntimeError(f"Cosmos 3: {message}") from None
    except urllib.error.URLError as error:
        raise RuntimeError(f"Cosmos 3: no server at {server} ({error.reason})") from None


def made_video(
    server: str,
    fields: dict[str, Any],
    progress: Callable[[int], None],
    cancelled: Callable[[], bool],
) -> bytes:
    """The MP4 of a request. ``progress`` is told percent; a job that is cancelled is deleted."""
    job = json.loads(call(server, "/v1/videos", fields))
    while job["status"] in ("queued", "in_progress"):
        if cancelled():
            call(server, f"/v1/videos/{job['id']}", method="DELETE")
            raise RuntimeError("Cosmos 3: cancelled")
        time.sleep(POLL_SECONDS)
        job = json.loads(call(server, f"/v1/videos/{job['id']}"))
        progress(job["progress"])
    if job["status"] != "completed":
        raise RuntimeError(f"Cosmos 3: {job['error']['message']}")
    return call(server, f"/v1/videos/{job['id']}/content")


def model_of(server: str) -> str:
    """The name of the served model."""
    return str(json.loads(call(server, "/v1/models"))["data"][0]["id"])


def png_url(image: torch.Tensor) -> str:
    """One picture of an IMAGE, floats [H, W, 3] from 0 to 1, as a data URL."""
    levels = (image[..., :3].clamp(0, 1) * 255).round().byte().cpu().numpy()
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def decoded_picture(data: bytes) -> torch.Tensor:
    """An encoded picture as an IMAGE of one: floats [1, H, W, 3] from 0 to 1."""
    levels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    return torch.from_numpy(levels.copy())[None].float() / 255


def decoded_video(data: bytes) -> tuple[torch.Tensor, dict[str, Any], float]:
    """An MP4 as IMAGE [T, H, W, 3], AUDIO and frames per second. Without sound the audio is silence."""
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        fps = float(stream.average_rate)
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    images = torch.from_numpy(frames).float() / 255
    with av.open(io.BytesIO(data)) as container:
        if container.streams.audio:
            rate = container.streams.audio[0].rate
            parts = [frame.to_ndarray() for frame in container.decode(audio=0)]
            sound = torch.from_numpy(np.concatenate(parts, axis=1)).float()
        else:
            rate = SAMPLE_RATE
            sound = torch.zeros(2, round(len(frames) / fps * rate))
    return images, {"waveform": sound[None], "sample_rate": rate}, fps
