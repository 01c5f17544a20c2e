"""Frames of a clip: all of them for ``num_frames == -1``, at most the cap, else as vLLM does."""

from __future__ import annotations

import sys
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from media_files import clip, picture, png
from vllm.multimodal.video import Qwen3VLVideoBackend

from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.reasoner.media.limits import FPS as FPS_CAP
from vllm_cosmos3.reasoner.media.limits import FRAMES, max_video_fps, max_video_frames
from vllm_cosmos3.reasoner.media.video_loader import Cosmos3VideoBackend

TOTAL, FPS = 48, 24


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return clip(tmp_path_factory.mktemp("clip") / "a.mp4", frames=TOTAL, fps=FPS).read_bytes()


def test_minus_one_gives_every_frame(data: bytes) -> None:
    frames, metadata = Cosmos3VideoBackend.load_bytes(data, num_frames=-1)
    assert frames.shape == (TOTAL, 64, 64, 3)
    assert metadata["frames_indices"] == list(range(TOTAL))
    assert (metadata["fps"], metadata["do_sample_frames"]) == (FPS, True)


def test_without_it_vllm_decides(data: bytes) -> None:
    frames, metadata = Cosmos3VideoBackend.load_bytes(data, num_frames=32)
    stock_frames, stock_metadata = Qwen3VLVideoBackend.load_bytes(data, num_frames=32)
    assert np.array_equal(frames.pixels(), stock_frames)
    assert metadata | {"video_backend": "opencv"} == stock_metadata


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20, deadline=None
)
@given(cap=st.integers(min_value=1, max_value=60))
def test_cap_thins_evenly_and_keeps_the_duration(data: bytes, cap: int) -> None:
    frames, metadata = Cosmos3VideoBackend.load_bytes(data, num_frames=-1, max_frames=cap)
    assert len(frames) == metadata["total_num_frames"] == min(cap, TOTAL)
    assert len(frames) / metadata["fps"] == pytest.approx(TOTAL / FPS)


def test_requests_cannot_raise_the_cap_of_the_operator(
    data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FRAMES, "5")
    frames, _ = Cosmos3VideoBackend.load_bytes(data, num_frames=-1, max_frames=40)
    assert len(frames) == 5


@pytest.mark.parametrize("count", [1, 6, 24, 400])
def test_a_number_of_frames_is_followed(data: bytes, count: int) -> None:
    frames, metadata = Cosmos3VideoBackend.load_bytes(data, num_frames=count, evenly=True)
    assert len(frames) == min(count, TOTAL)
    assert metadata["frames_indices"][0] == 0
    assert metadata["frames_indices"][-1] == (TOTAL - 1 if count > 1 else 0)
    assert (metadata["total_num_frames"], metadata["fps"]) == (TOTAL, FPS)


@pytest.mark.parametrize("text", ["inf", "nan", "0", "many"])
def test_wrong_caps_are_named(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, cap in ((FRAMES, max_video_frames), (FPS_CAP, max_video_fps)):
        monkeypatch.setenv(name, text)
        with pytest.raises(InvalidRequest, match=f"{name} is '{text}', must be a number of at"):
            cap()


def test_pictures_are_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match="PNG image"):
        Cosmos3VideoBackend.load_bytes(png(picture()), num_frames=-1)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Invalid data found"),
        (b"# Read me", "Invalid data found"),
    ],
    ids=["empty", "text"],
)
def test_what_cannot_be_read_is_named(content: bytes, reason: str) -> None:
    says = rf"video_url is 'a file of {len(content)} bytes', must be a video, .* \({reason}"
    with pytest.raises(InvalidRequest, match=says):
        Cosmos3VideoBackend.load_bytes(content, num_frames=-1)


def test_an_animated_webp_is_read_or_named() -> None:
    """PyAV's FFmpeg reads it from PyAV 19."""
    buffer = BytesIO()
    pictures = [picture(seed=seed) for seed in range(3)]
    pictures[0].save(buffer, "WEBP", save_all=True, append_images=pictures[1:], lossless=True)
    if int(av.__version__.split(".")[0]) < 19:
        with pytest.raises(
            InvalidRequest, match=r"must be a video, .* \(its frames are of no known"
        ):
            Cosmos3VideoBackend.load_bytes(buffer.getvalue(), num_frames=-1)
    else:
        frames, _ = Cosmos3VideoBackend.load_bytes(buffer.getvalue(), num_frames=-1)
        assert np.array_equal(frames.pixels(), np.stack([np.asarray(p) for p in pictures]))


def test_decoders_that_are_not_there_are_named(
    data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    for name in ("torchcodec", "nope", None):
        with pytest.raises(InvalidRequest, match=r"^media_io_kwargs\.video.* is .*, must be"):
            Cosmos3VideoBackend.load_bytes(data, num_frames=-1, backend=name)


@pytest.mark.parametrize("name", ["num_frames", "max_frames", "fps"])
@pytest.mark.parametrize("value", [0, -3, "four"])
def test_wrong_options_are_named(name: str, value: object, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=f"media_io_kwargs.video.{name} is {value!r}"):
        Cosmos3VideoBackend.load_bytes(b"", **{"num_frames": -1, name: value})
