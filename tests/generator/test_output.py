"""What a result is in Python: short to print, to play in a notebook, in the form of each library."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from vllm_cosmos3.errors import InvalidRequest, Unsupported
from vllm_cosmos3.generator.output import Output, Sample
from vllm_cosmos3.media import Pixels, read_video


def levels(frames: int = 9, height: int = 64, width: int = 96) -> Pixels:
    """A bright square that moves over a dark ground: no two frames are equal."""
    video = np.full((frames, height, width, 3), 30, np.uint8)
    for index in range(frames):
        video[index, 16:48, 4 * index : 4 * index + 32] = (200, 120, 40)
    return video


def clip(sound: np.ndarray | None = None) -> Output:
    sample = Sample(seed=5, video=levels(), sound=sound)
    return Output(samples=(sample,), fps=12.0, sample_rate=48_000)


TONE = np.sin(np.arange(36_000) / 20).astype(np.float32)[None].repeat(2, axis=0)


def test_it_is_short_to_print() -> None:
    assert repr(clip(TONE)) == (
        "<Output: 96x64, 9 frames at 12 fps, 0.75 s with sound at 48000 Hz, seed 5>"
    )
    assert repr(clip().samples[0]) == "Sample(seed=5, video=[9, 64, 96, 3])"
    latents = Sample(seed=1, latents={"vision": np.zeros((1, 48, 3, 4, 6), np.float32)})
    assert repr(Output(samples=(latents,), fps=24)) == "<Output: vision [1, 48, 3, 4, 6], seed 1>"


def test_a_notebook_plays_it() -> None:
    (data,) = re.findall(
        r'<video [^>]*src="data:video/mp4;base64,([^"]+)"', clip(TONE)._repr_html_()
    )
    assert read_video(base64.b64decode(data), frames=99).shape == (9, 64, 96, 3)
    image = Output(samples=(Sample(seed=1, image=levels()[0]),) * 2, fps=24)
    assert len(re.findall(r'<img [^>]*src="data:image/png;base64,', image._repr_html_())) == 2


def test_frames_of_each_library() -> None:
    output, video = clip(), levels()
    assert output.frames is output.video
    assert [np.array_equal(np.asarray(picture), frame) for picture, frame in zip(output.pil(), video, strict=True)] == [True] * 9  # fmt: skip
    tensor = output.torch()
    assert (tensor.dtype, tuple(tensor.shape)) == (torch.uint8, (9, 3, 64, 96))
    assert (tensor.permute(0, 2, 3, 1).numpy() == video).all()
    assert Output(samples=(Sample(seed=1, image=video[0]),), fps=24).frames.shape == (1, 64, 96, 3)
    with pytest.raises(Unsupported, match="only latents"):
        _ = Output(samples=(Sample(seed=1, latents={}),), fps=24).frames


def test_webm_has_picture_and_sound(tmp_path: Path) -> None:
    (file,) = clip(TONE).save(tmp_path / "a.webm")
    with av.open(str(file)) as container:
        assert container.format.name == "matroska,webm"
        names = [stream.codec_context.name for stream in container.streams]
        assert names == ["libdav1d" if "dav1d" in names[0] else "vp9", "opus"]
        assert float(container.duration / 1e6) == pytest.approx(0.75, abs=0.05)
    read = read_video(file, frames=99)
    assert read.shape == (9, 64, 96, 3)
    assert np.abs(read.astype(int) - levels()).mean() < 6


def test_gif_moves_at_its_rate(tmp_path: Path) -> None:
    (file,) = clip().save(tmp_path / "a.gif")
    with Image.open(file) as image:
        times = []
        for index in range(image.n_frames):
            image.seek(index)
            times.append(image.info["duration"])
        assert image.info["loop"] == 0
    assert (len(times), sum(times)) == (9, 750)


def test_arrays_and_folders_of_frames(tmp_path: Path) -> None:
    (file,) = clip().save(tmp_path / "a.npy")
    assert (np.load(file) == levels()).all()
    for target in (f"{tmp_path}/frames/", tmp_path / "other" / "%05d.png"):
        files = clip().save(target)
        assert [file.name for file in files] == [f"{index:05d}.png" for index in range(9)]
        for file, frame in zip(files, levels(), strict=True):
            with Image.open(file) as image:
                assert (np.asarray(image) == frame).all()
    with pytest.raises(InvalidRequest, match="one place for a number"):
        clip().save(tmp_path / "%05d-%05d.png")
    image = Output(samples=(Sample(seed=1, image=levels()[0]),), fps=24)
    assert image.save(f"{tmp_path}/picture/") == [tmp_path / "picture" / "00000.png"]
    assert np.load(image.save(tmp_path / "b.npy")[0]).shape == (64, 96, 3)
    with pytest.raises(InvalidRequest, match=r"a file of type \.png, \.jpg"):
        image.save(tmp_path / "b.webm")
