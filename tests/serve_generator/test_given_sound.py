"""Sound as an input over HTTP: a video that follows it, and a clip whose sound is kept."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import pytest
from generators import SMALL, create, finished
from limits import HANG
from media_files import data_url, picture, png
from servers import Server

from vllm_cosmos3.media import write_video

pytestmark = pytest.mark.serve


@pytest.fixture(scope="module")
def sounding(media_folder: Path) -> Path:
    """Two seconds of a clip with a tone on the left alone."""
    tone = 0.5 * np.sin(np.arange(96_000) / 20)
    sound = np.stack([tone, np.zeros_like(tone)]).astype(np.float32)
    frames = np.zeros((48, 64, 64, 3), np.uint8)
    frames[..., 0] = np.arange(48)[:, None, None] * 5
    write_video(media_folder / "sounding.mp4", frames, fps=24, sound=sound)
    return media_folder / "sounding.mp4"


def track(video: bytes) -> np.ndarray:
    with av.open(BytesIO(video)) as container:
        return np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=1)


def check_tone(video: bytes, seconds: float) -> None:
    sound = track(video)
    assert sound.shape[1] == pytest.approx(seconds * 48_000, abs=1100)
    assert np.abs(sound[0, 2000:8000]).max() == pytest.approx(0.5, abs=0.05)
    assert np.abs(sound[1]).max() < 0.01


@pytest.mark.parametrize("name", ["sound_path", "audio_reference", "source_audio"])
def test_a_sound_is_uploaded_beside_a_first_frame(
    name: str, generator_server: Server, sounding: Path
) -> None:
    files = {
        "input_reference": ("a.png", png(picture(64, 64)), "image/png"),
        name: ("a.mp4", sounding.read_bytes(), "audio/mp4"),
    }
    fields = {"prompt": "a boat", **{name: str(value) for name, value in SMALL.items()}}
    url = f"{generator_server.url}/v1/videos/sync"
    answer = httpx.post(url, data=fields, files=files, timeout=HANG)
    assert answer.status_code == 200, answer.text
    check_tone(answer.content, 5 / 24)


@pytest.mark.parametrize("by", ["url", "path"])
def test_a_sound_is_named(by: str, generator_server: Server, sounding: Path) -> None:
    name = sounding.as_uri() if by == "url" else sounding.name
    sent: dict[str, Any] = {"sound_path": {"audio_url": {"url": name}}}
    job = finished(generator_server, create(generator_server, **SMALL, **sent))
    effective = job["cosmos3"]["effective"]
    assert (effective["mode"], effective["sound_path"]) == ("text2video", name)
    assert job["cosmos3"]["sources"]["sound_path"] == "request"


@pytest.mark.parametrize("fields", [{}, {"edge": True}])
def test_the_sound_of_a_clip_is_kept(
    fields: dict[str, Any], generator_server: Server, sounding: Path
) -> None:
    clip = data_url(sounding.read_bytes(), "video/mp4")
    body = SMALL | {
        "prompt": "a boat",
        "input_reference": clip,
        "keep_sound": True,
        "num_frames": 13,
    }
    body |= {"num_frames": None, "max_frames": 13, **fields} if fields else {}
    url = f"{generator_server.url}/v1/videos/sync"
    answer = httpx.post(url, json=body, timeout=HANG)
    assert answer.status_code == 200, answer.text
    check_tone(answer.content, 13 / 24)


def test_what_the_server_says_of_it(generator_server: Server) -> None:
    (model,) = httpx.get(f"{generator_server.url}/v1/models").json()["data"]
    assert model["cosmos3"]["sound_input"] is True
    assert model["cosmos3"]["defaults"]["image2image"]["flow_shift"] == 5.0
