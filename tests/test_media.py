"""What is written reads back the same, and what users send becomes upright RGB or one clear error."""

from __future__ import annotations

import gc
import io
import os
import re
import struct
import subprocess
import sys
import wave
import zlib
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from limits import HANG
from PIL import Image
from torchvision.transforms.v2 import functional as tv

from vllm_cosmos3 import media
from vllm_cosmos3.errors import Busy, InvalidRequest, Unsupported
from vllm_cosmos3.media_budget import MediaBudget, media_budget

TAG_ORIENTATION = 274


def clip(frames: int, height: int, width: int) -> media.Pixels:
    """A smooth picture whose blue says which frame it is."""
    y, x = np.mgrid[0:height, 0:width]
    red, green = x * 255 // width, y * 255 // height
    return np.stack(
        [np.stack([red, green, np.full_like(red, 10 * t % 250)], -1) for t in range(frames)]
    ).astype(np.uint8)


def tones(samples: int) -> np.ndarray:
    t = np.arange(samples) / 48_000
    both = np.stack([np.sin(2 * np.pi * 440 * t), np.sin(2 * np.pi * 880 * t)])
    return (0.2 * both).astype(np.float32)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def distance(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    media.write_video(path, clip(20, 48, 64), fps=24)
    return path.read_bytes()


# Sound in


def wav(samples: np.ndarray, rate: int) -> bytes:
    """16-bit PCM of float32 [channels, N]."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(len(samples))
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes((samples.T * 32767).round().astype("<i2").tobytes())
    return file.getvalue()


def sound_of(source: str | Path | bytes, samples: int) -> np.ndarray:
    with media_budget().lease() as lease:
        return media.read_sound(source, samples=samples, rate=48_000, field="sound", lease=lease)


def test_sound_is_resampled_cut_and_filled_up() -> None:
    time = np.arange(44_100) / 44_100
    file = wav(0.5 * np.sin(2 * np.pi * 440 * time)[None], 44_100)
    whole, part = sound_of(file, 60_000), sound_of(file, 1000)
    wanted = 0.5 * np.sin(2 * np.pi * 440 * np.arange(60_000) / 48_000)
    wanted[48_000:] = 0
    assert (whole.shape, whole.dtype) == ((2, 60_000), np.float32)
    assert np.array_equal(whole[0], whole[1])  # one channel sounds on both sides, as loud
    assert np.abs(whole[0] - wanted)[100:47_900].max() < 1e-3
    assert not whole[:, 48_100:].any()
    assert np.array_equal(part, whole[:, :1000])


def test_sound_of_a_clip_begins_where_its_frames_do(tmp_path: Path) -> None:
    sound = tones(48_000) * 0.1
    sound[1, 30_000] = 0.9
    media.write_video(tmp_path / "v.mp4", clip(24, 32, 32), fps=24, sound=sound)
    read = sound_of(tmp_path / "v.mp4", 48_000)
    assert abs(int(np.abs(read[1]).argmax()) - 30_000) <= 1
    assert np.abs(read[0] - sound[0])[5000:40_000].max() < 0.01


@pytest.mark.parametrize("late", [-480, 480])
def test_sound_that_begins_before_or_after_the_frames(tmp_path: Path, late: int) -> None:
    with av.open(str(tmp_path / "v.mkv"), "w") as file:
        picture = file.add_stream("libx264", rate=10)
        picture.width = picture.height = 32
        audio = file.add_stream("pcm_s16le", rate=48_000, layout="stereo")
        pulse = np.zeros((1, 2 * 9600), np.int16)
        pulse[0, 2 * 2400] = 30_000
        frame = av.AudioFrame.from_ndarray(pulse, format="s16", layout="stereo")
        frame.sample_rate, frame.pts, frame.time_base = 48_000, 4800 + late, Fraction(1, 48_000)
        file.mux(audio.encode(frame))
        for index, pixels in enumerate(clip(5, 32, 32)):
            shown = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            shown.pts, shown.time_base = index + 1, Fraction(1, 10)  # the first at 0.1 s
            file.mux(picture.encode(shown))
        file.mux(picture.encode(None))
    assert int(sound_of(tmp_path / "v.mkv", 9600)[0].argmax()) == 2400 + late


def test_what_has_no_sound_is_refused(video: bytes) -> None:
    for source, words in (
        (video, "a file with a sound track that can be decoded"),
        (b"garbage", "a complete WAV, MP3"),
        (wav(tones(4096), 48_000)[:30], "a complete WAV, MP3"),
    ):
        with pytest.raises(InvalidRequest, match=f"^sound is .*{words}"):
            sound_of(source, 100)


# Out


@pytest.mark.parametrize(
    ("fps", "rate"),
    [(24, Fraction(24)), (30, Fraction(30)), (23.976, Fraction(24000, 1001)), (10, Fraction(10))],
)
@pytest.mark.parametrize(("height", "width"), [(48, 80), (33, 47)])
def test_video_reads_back(
    tmp_path: Path, fps: float, rate: Fraction, height: int, width: int
) -> None:
    frames = clip(25, height, width)
    media.write_video(tmp_path / "v.mp4", frames, fps=fps, sound=tones(48_000))
    with av.open(str(tmp_path / "v.mp4")) as container:
        picture, audio = container.streams.video[0], container.streams.audio[0]
        assert picture.average_rate == rate
        assert picture.frames == 25
        assert (picture.codec_context.name, picture.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (picture.height, picture.width) == (height + height % 2, width + width % 2)
        assert float(picture.duration * picture.time_base) == pytest.approx(25 / rate, abs=1e-3)
        assert (audio.rate, audio.channels, audio.codec_context.name) == (48_000, 2, "aac")
        assert container.duration / 1e6 == pytest.approx(max(25 / rate, 1), abs=2e-3)
        back = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    assert distance(back[:, :height, :width], frames) < 3


def test_sound_is_not_delayed_and_lies_between_the_frames(tmp_path: Path) -> None:
    sound = tones(96_000) * 0.1
    sound[1, 30_000] = 0.9
    media.write_video(tmp_path / "v.mp4", clip(48, 32, 32), fps=24, sound=sound)
    with av.open(str(tmp_path / "v.mp4")) as container:
        decoded = list(container.decode(audio=0))
    assert decoded[0].pts == 0
    waveform = np.concatenate([frame.to_ndarray() for frame in decoded], axis=1)
    assert abs(int(np.abs(waveform[1]).argmax()) - 30_000) <= 1
    near = waveform[0, 40_000:50_000] - sound[0, 40_000:50_000]
    assert np.abs(near).max() < 0.01
    with av.open(str(tmp_path / "v.mp4")) as container:
        kinds = [packet.stream.type for packet in container.demux() if packet.size]
    assert "audio" in kinds[:5]
    assert "video" in kinds[-20:]


def test_chunks_make_the_same_video_as_the_whole(tmp_path: Path) -> None:
    frames = clip(17, 32, 48)
    sound = tones(34_000)
    media.write_video(tmp_path / "whole.mp4", frames, fps=24, sound=sound, crf=0)
    with media.VideoWriter(tmp_path / "chunks.mp4", fps=24, sound=sound, crf=0) as writer:
        for chunk in np.split(frames, [1, 5, 9, 13]):
            writer.write(chunk)
    # Not the bytes: x264 does not always make the same ones of the same frames.
    both = [media.read_video(tmp_path / f"{name}.mp4", frames=17) for name in ("chunks", "whole")]
    assert len(both[0]) == 17
    assert (both[0] == both[1]).all()


def test_index_precedes_the_data(video: bytes) -> None:
    assert video.index(b"moov") < video.index(b"mdat")


def test_lower_crf_is_closer_and_larger(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (6, 32, 48, 3), dtype=np.uint8)
    sizes, errors = [], []
    for crf in (5, 40):
        media.write_video(tmp_path / "v.mp4", noise, fps=24, crf=crf)
        sizes.append((tmp_path / "v.mp4").stat().st_size)
        errors.append(distance(media.read_video(tmp_path / "v.mp4", frames=6), noise))
    assert sizes[0] > sizes[1]
    assert errors[0] < errors[1]


def test_a_failure_of_the_caller_leaves_no_file(tmp_path: Path) -> None:
    def fail() -> None:
        with media.VideoWriter(tmp_path / "v.mp4", fps=24) as writer:
            writer.write(clip(3, 32, 32))
            raise RuntimeError("decoding failed")

    with pytest.raises(RuntimeError, match="decoding failed"):
        fail()
    assert not list(tmp_path.iterdir())


def test_a_failure_of_the_encoder_reaches_the_caller_and_leaves_no_file(tmp_path: Path) -> None:
    writer = media.VideoWriter(tmp_path / "v.mp4", fps=24)
    writer.write(clip(3, 32, 32))
    writer.write(np.zeros((1, 32, 32, 4), np.uint8))
    with pytest.raises(ValueError, match="shape"):
        writer.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fps", "rate"),
    [
        (24, "24"),
        (23.976, "24000/1001"),
        (29.97, "30000/1001"),
        (59.94, "60000/1001"),
        (12.5, "25/2"),
        (16.0, "16"),
        (7.3, "73/10"),
    ],
)
def test_frame_rate(fps: float, rate: str) -> None:
    assert media.frame_rate(fps) == Fraction(rate)


@pytest.mark.parametrize(
    ("suffix", "error"), [(".png", 0), (".jpg", 3), (".jpeg", 3), (".webp", 3)]
)
def test_pictures_read_back(tmp_path: Path, suffix: str, error: float) -> None:
    picture = clip(1, 33, 47)[0]
    media.write_image(tmp_path / f"p{suffix}", picture)
    assert distance(media.read_image(tmp_path / f"p{suffix}"), picture) <= error


def test_quality_makes_larger_pictures() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for kind in ("jpeg", "webp"):
        sizes = [len(media.encode_image(noise, kind, quality=quality)) for quality in (20, 95)]
        assert sizes[0] < sizes[1]


def test_unknown_suffix_names_the_possible_ones(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"path is .*p\.tga.*\.png, \.jpg, \.jpeg, \.webp"):
        media.write_image(tmp_path / "p.tga", clip(1, 8, 8)[0])


def test_thumbnail_keeps_the_shape() -> None:
    small = media.read_image(media.thumbnail(clip(1, 180, 320)[0], side=64))
    assert small.shape == (36, 64, 3)


# Pictures in


PICTURE = clip(1, 6, 10)[0]
UPRIGHT_FROM = {  # EXIF orientation: what has to be done to the stored picture
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: np.rot90(np.fliplr(x), 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(np.fliplr(x), -1),
    8: lambda x: np.rot90(x, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT_FROM)
def test_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[TAG_ORIENTATION] = orientation
    read = media.read_image(encoded(Image.fromarray(PICTURE), exif=exif))
    assert np.array_equal(read, UPRIGHT_FROM[orientation](PICTURE))


@pytest.mark.parametrize("alpha", [0, 128, 255])
def test_transparency_lies_over_white(alpha: int) -> None:
    rgba = np.dstack([PICTURE, np.full(PICTURE.shape[:2], alpha, np.uint8)])
    expected = PICTURE * (alpha / 255) + 255 * (1 - alpha / 255)
    assert np.abs(media.read_image(encoded(Image.fromarray(rgba))) - expected).max() <= 1


def test_transparent_palette_and_grey_lie_over_white() -> None:
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    assert (media.read_image(encoded(palette)) == [0, 255, 0]).all()
    assert (media.read_image(encoded(palette, transparency=1)) == 255).all()
    assert (media.read_image(encoded(Image.new("LA", (4, 4), (7, 0)))) == 255).all()


@pytest.mark.parametrize(
    ("image", "kind", "expected"),
    [
        (Image.new("L", (4, 4), 100), "PNG", 100),
        (Image.new("1", (4, 4), 1), "PNG", 255),
        (Image.new("I;16", (4, 4), 0x8000), "PNG", 128),
        (Image.new("I;16", (4, 4), 0xFFFF), "TIFF", 255),
        (Image.new("CMYK", (4, 4), (0, 0, 0, 155)), "JPEG", 100),
        (Image.new("YCbCr", (4, 4), (100, 128, 128)), "JPEG", 100),
    ],
    ids=lambda value: getattr(value, "mode", str(value)),
)
def test_other_colour_modes(image: Image.Image, kind: str, expected: int) -> None:
    read = media.read_image(encoded(image, kind))
    assert read.shape == (4, 4, 3)
    assert np.abs(read.astype(int) - expected).max() <= 2


def test_floating_point_levels_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="floating point"):
        media.read_image(encoded(Image.new("F", (4, 4), 0.5), "TIFF"))


def test_animation_gives_its_first_picture() -> None:
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    data = encoded(red, "GIF", save_all=True, append_images=[blue])
    assert (media.read_image(data) == [255, 0, 0]).all()


def test_arrays_and_pillow_images_pass() -> None:
    assert np.array_equal(media.read_image(PICTURE), PICTURE)
    assert np.array_equal(media.read_image(Image.fromarray(PICTURE)), PICTURE)
    assert np.array_equal(media.read_image(PICTURE.astype(np.float32) / 255), PICTURE)
    assert np.array_equal(media.read_image(PICTURE.transpose(2, 0, 1)), PICTURE)
    with pytest.raises(
        InvalidRequest, match=r"frame is .floats from 0 to .*must be floats from 0 to 1"
    ):
        media.read_image(PICTURE.astype(np.float32), field="frame")
    with pytest.raises(InvalidRequest, match=r"frame is 'int64 \[6, 10, 3\]'"):
        media.read_image(PICTURE.astype(np.int64), field="frame")


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    ihdr = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    idat = b"\x00\x00\x00\x00IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    return b"\x89PNG\r\n\x1a\n" + ihdr + idat


@pytest.mark.parametrize("side", [9_000, 12_000, 60_000])  # ours, Pillow's warning, Pillow's error
def test_decompression_bombs_are_refused_by_their_header(side: int) -> None:
    with pytest.raises(InvalidRequest, match="image is"):
        media.read_image(png_header(side, side))


def test_thin_lines_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="image is '4000x1', must be at most 20 times"):
        media.read_image(encoded(Image.new("RGB", (4000, 1))))


@pytest.mark.parametrize("read", [media.read_image, lambda s: media.read_video(s, frames=1)])
@pytest.mark.parametrize(
    "source",
    [
        b"",
        b"not a picture",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/hosts\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile /etc/hosts\n",
        "/no/such/file.png",
        "http://127.0.0.1/picture.png",
    ],
    ids=["empty", "text", "postscript", "playlist", "concat", "absent", "url"],
)
def test_everything_else_is_one_error_that_names_the_field(read: object, source: object) -> None:
    with pytest.raises(InvalidRequest, match=r"^(image|video) is "):
        read(source)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"]),
    keep=st.floats(0, 1),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=3),
)
def test_damaged_pictures_are_read_or_refused(
    kind: str, keep: float, flips: list[tuple[float, int]]
) -> None:
    data = bytearray(encoded(Image.fromarray(clip(1, 24, 32)[0]), kind))
    for place, value in flips:
        data[int(place * len(data))] = value
    with suppress(InvalidRequest):
        read = media.read_image(bytes(data[: int(keep * len(data))]))
        assert read.dtype == np.uint8
        assert read.shape[2] == 3


# Videos in


def blues(frames: media.Pixels) -> list[int]:
    """Which frames of `clip` these are."""
    return [round(float(value) / 10) for value in frames[..., 2].mean(axis=(1, 2))]


@pytest.mark.parametrize(
    ("count", "keep", "expected"),
    [
        (1, "first", [0]),
        (5, "first", [0, 1, 2, 3, 4]),
        (5, "last", [15, 16, 17, 18, 19]),
        (22, "first", list(range(20))),
        (22, "last", list(range(20))),
    ],
)
def test_first_or_last_frames(video: bytes, count: int, keep: str, expected: list[int]) -> None:
    frames = media.read_video(video, frames=count, keep=keep)
    assert frames.shape[1:] == (48, 64, 3)
    assert blues(frames) == expected
    pictures = list(clip(20, 48, 64))
    assert blues(media.read_video(pictures, frames=count, keep=keep)) == expected
    assert blues(media.read_video(np.stack(pictures), frames=count, keep=keep)) == expected


def write_at(
    path: Path, times: list[int], container_format: str = "mp4", title: str = "none"
) -> Path:
    """A video whose frames begin at ``times`` in hundredths of a second."""
    with av.open(str(path), "w", format=container_format) as container:
        container.metadata["title"] = title
        stream = container.add_stream("libx264", rate=100)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        for time, pixels in zip(times, clip(len(times), 32, 32), strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def test_a_file_that_cannot_be_ended_is_deleted(tmp_path: Path) -> None:
    """The disk is full at the end, when the encoder gives its last frames."""
    code = (
        "import resource, signal, sys; import numpy as np; from vllm_cosmos3 import media\n"
        "frames = np.random.default_rng(0).integers(0, 255, (30, 128, 128, 3), dtype=np.uint8)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "media.write_video(sys.argv[1], frames, fps=24)"
    )
    path = tmp_path / "v.mp4"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        check=False,
        text=True,
        timeout=HANG,
    )
    assert "File too large" in done.stderr
    assert not path.exists()


def test_of_variable_frame_rate_the_stored_frames_count(tmp_path: Path) -> None:
    path = write_at(tmp_path / "v.mp4", [0, 10, 50, 55, 80])
    assert blues(media.read_video(path, frames=5)) == [0, 1, 2, 3, 4]
    assert blues(media.read_video(path, frames=3, keep="last")) == [2, 3, 4]


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("turns", range(4))
def test_turned_and_mirrored_video_is_upright(video: bytes, turns: int, mirrored: bool) -> None:
    matrix = {0: (1, 0, 0, 1), -1: (0, 1, -1, 0), 2: (-1, 0, 0, -1), 1: (0, -1, 1, 0)}[
        turns if turns < 3 else -1
    ]
    if mirrored:  # from left to right, before it is turned
        matrix = (-matrix[0], -matrix[1], *matrix[2:])
    a, b, c, d = (value << 16 for value in matrix)
    place = video.index(b"tkhd") + 44
    turned = (
        video[:place] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + video[place + 36 :]
    )
    upright, stored = media.read_video(turned, frames=2), media.read_video(video, frames=2)
    stored = stored[:, :, ::-1] if mirrored else stored
    assert np.array_equal(upright, np.rot90(stored, turns, axes=(1, 2)))


@pytest.mark.parametrize("limit", [1, 3, 1000])
def test_frames_one_by_one_are_those_read_at_once(video: bytes, limit: int) -> None:
    array = media.read_video(video, frames=limit)
    for source in (video, media.read_video(video, frames=1000), list(array)):
        assert np.array_equal(np.stack(list(media.frames_of(source, limit=limit))), array)
    with pytest.raises(InvalidRequest, match="at least one frame"):
        next(media.frames_of([], limit=limit))
    with pytest.raises(InvalidRequest, match=r"depth\.control"):
        list(media.frames_of(b"garbage", limit=limit, field="depth.control"))


def test_rate_of_a_clip(tmp_path: Path) -> None:
    media.write_video(tmp_path / "a.mp4", clip(4, 32, 32), fps=23.976)
    assert media.rate_of(tmp_path / "a.mp4") == pytest.approx(23.976, abs=1e-3)
    assert media.rate_of(clip(4, 32, 32)) is None
    with pytest.raises(InvalidRequest):
        media.rate_of(b"garbage")


def test_a_title_may_be_in_any_encoding(tmp_path: Path) -> None:
    stored = write_at(tmp_path / "a.avi", [0, 1, 2], "avi", title="XXXXX").read_bytes()
    assert stored.count(b"XXXXX") == 1
    titled = stored.replace(b"XXXXX", "Étés!".encode("latin-1"))
    assert np.array_equal(media.read_video(titled, frames=3), media.read_video(stored, frames=3))
    assert media.rate_of(titled) == media.rate_of(stored)


def test_file_without_pictures_is_refused(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=48_000, layout="stereo")
        frame = av.AudioFrame.from_ndarray(tones(4096), format="fltp", layout="stereo")
        frame.sample_rate = 48_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(InvalidRequest, match="a file with a video track"):
        media.read_video(tmp_path / "v.mp4", frames=1)


def test_empty_and_uneven_lists_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="at least one frame"):
        media.read_video([], frames=1)
    with pytest.raises(InvalidRequest, match="one size"):
        media.read_video([clip(1, 8, 8)[0], clip(1, 8, 9)[0]], frames=2)


def test_too_many_frames_are_refused(video: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "MAX_FRAMES", 10)
    with pytest.raises(InvalidRequest, match="at most 10"):
        media.read_video(video, frames=2, keep="last")
    assert len(media.read_video(video, frames=2)) == 2


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9, 0.999])
def test_truncated_video_is_refused(video: bytes, share: float) -> None:
    with pytest.raises(InvalidRequest, match=r"video is '.* bytes', must be a complete MP4"):
        media.read_video(video[: int(share * len(video))], frames=20)


@settings(max_examples=100, deadline=None)
@given(
    flips=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=20
    ),
)
def test_damaged_video_is_read_or_refused(video: bytes, flips: list[tuple[float, int]]) -> None:
    data = bytearray(video)
    for place, value in flips:
        data[int(place * len(data))] = value
    with suppress(InvalidRequest):
        frames = media.read_video(bytes(data), frames=30)
        assert frames.dtype == np.uint8
        assert 0 < len(frames) <= 30


def test_a_codec_that_nobody_knows(video: bytes) -> None:
    _, entry = (
        at.start() for at in re.finditer(b"avc1", video[:1024])
    )  # after the brand of the file
    unknown = video[:entry] + b"zzzz" + video[entry + 4 :]
    with pytest.raises(InvalidRequest, match="a video track that can be decoded"):
        media.read_video(unknown, frames=20)


# Sizes


@settings(max_examples=60, deadline=None)
@given(
    source=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    target=st.tuples(st.integers(1, 5), st.integers(1, 5)),
)
def test_cover_crop_fills_the_canvas(source: tuple[int, int], target: tuple[int, int]) -> None:
    height, width = 16 * target[0], 16 * target[1]
    out = media.cover_crop(clip(2, *source), height=height, width=width)
    assert out.shape == (2, height, width, 3)


@pytest.mark.parametrize("source", [(33, 47), (100, 31), (48, 80), (7, 5), (481, 853)])
@pytest.mark.parametrize("target", [(48, 80), (80, 48), (64, 64)])
def test_cover_crop_agrees_with_torchvision(
    source: tuple[int, int], target: tuple[int, int]
) -> None:
    frame = np.random.default_rng(0).integers(0, 255, (1, *source, 3), dtype=np.uint8)
    scale = max(target[0] / source[0], target[1] / source[1])
    size = [int(np.ceil(scale * side)) for side in source]
    tensor = torch.from_numpy(frame).movedim(3, 1).float()
    expected = tv.center_crop(tv.resize(tensor, size, antialias=True), list(target)).round()
    out = media.cover_crop(frame, height=target[0], width=target[1])
    assert np.array_equal(out[0], expected[0].movedim(0, 2).numpy().astype(np.uint8))


def test_cover_crop_of_the_right_size_changes_nothing() -> None:
    frames = np.random.default_rng(0).integers(0, 255, (2, 32, 48, 3), dtype=np.uint8)
    assert np.array_equal(media.cover_crop(frames, height=32, width=48), frames)


# Pictures as cameras, phones and tools write them.

BOAT = Image.fromarray(clip(1, 48, 64)[0])
OTHER = Image.new("RGB", (64, 48), "red")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("MPO", {"append_images": [OTHER.resize((32, 24))], "quality": 95}),
        ("WEBP", {"append_images": [OTHER, BOAT], "lossless": True}),
        ("PNG", {"append_images": [OTHER]}),
        ("TIFF", {"append_images": [OTHER, OTHER]}),
        ("AVIF", {"append_images": [OTHER], "quality": 100}),
        ("GIF", {"append_images": []}),
        ("AVIF", {"append_images": [], "quality": 100}),
    ],
)
def test_of_several_pictures_the_first_is_taken(kind: str, options: dict[str, object]) -> None:
    file = encoded(BOAT, kind, save_all=True, **options)
    assert not media.is_clip(file, field="image")
    assert distance(media.read_image(file), np.array(BOAT)) < 3


def test_a_gif_that_moves_and_films_are_clips(video: bytes) -> None:
    moving = encoded(BOAT, "GIF", save_all=True, append_images=[OTHER])
    assert media.is_clip(moving, field="image")
    assert media.is_clip(video, field="image")


@pytest.mark.parametrize(
    "options",
    [{}, {"tile_size": 64}, {"chroma": 444}, {"save_all": True, "append_images": [OTHER]}],
    ids=["whole", "tiles", "444", "several"],
)
def test_pictures_of_phones(options: dict[str, object]) -> None:
    """HEIC, whole or in tiles as cameras write it, also beside others."""
    picture = BOAT.resize((160, 120))
    file = encoded(picture, "HEIF", quality=95, **options)
    assert not media.is_clip(file, field="image")
    assert distance(media.read_image(file), np.array(picture)) < 3


@pytest.mark.parametrize("orientation", UPRIGHT_FROM)
def test_pictures_of_phones_are_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[TAG_ORIENTATION] = orientation
    file = encoded(BOAT, "HEIF", quality=95, exif=exif.tobytes())
    assert distance(media.read_image(file), UPRIGHT_FROM[orientation](np.array(BOAT))) < 3


def test_a_picture_of_another_size_than_it_says_is_refused() -> None:
    file = encoded(BOAT, "HEIF", quality=95)
    at = file.index(b"ispe") + 8
    lying = file.replace(file[at : at + 8], struct.pack(">II", 32, 32))
    with pytest.raises(InvalidRequest) as refused:
        media.read_image(lying)
    assert refused.value.code == "invalid_media"


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"mif1", b"avif"])
@pytest.mark.parametrize("read", [media.read_image, media.is_clip])
def test_pictures_of_phones_that_are_damaged_are_named(brand: bytes, read: object) -> None:
    file = b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1" + brand + b"\0" * 99
    with pytest.raises(InvalidRequest, match=r"PNG, JPEG, WebP, AVIF, .*HEIC") as refused:
        read(file, field="image_reference")  # type: ignore[operator]
    assert refused.value.code == "invalid_media"


@pytest.mark.parametrize(
    "data", [b"\xff\x0a garbage", b"RIFF\0\0\0\0WEBPVP8 ", b"GIF89a", b"II*\0"]
)
def test_what_is_no_picture_and_no_clip_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequest) as refused:
        media.is_clip(data, field="image_reference")
    assert refused.value.code == "invalid_media"
    assert f"{media.AN_IMAGE} or {media.A_VIDEO}" in str(refused.value)


# Files are whole or not there.


def test_an_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    path.write_bytes(b"old")

    def cancel() -> None:
        with media.VideoWriter(path, fps=24) as writer:
            writer.write(clip(3, 32, 32))
            assert path.read_bytes() == b"old"
            raise ValueError("cancelled")

    with pytest.raises(ValueError, match="cancelled"):
        cancel()
    assert [file.name for file in tmp_path.iterdir()] == ["v.mp4"]
    assert path.read_bytes() == b"old"
    media.write_video(path, clip(3, 32, 32), fps=24)
    assert len(media.read_video(path, frames=9)) == 3
    assert [file.name for file in tmp_path.iterdir()] == ["v.mp4"]


@pytest.mark.parametrize(
    "name", ["a:b.mp4", "caf\udce9.mp4", "%d?#.mp4", "x" * 251 + ".mp4", "-y.mp4", "a b\n.mp4"]
)
def test_files_have_any_legal_name(tmp_path: Path, name: str) -> None:
    for folder in (tmp_path, tmp_path / "pipe:1"):
        folder.mkdir(exist_ok=True)
        media.write_video(folder / name, clip(2, 32, 32), fps=24)
        assert len(media.read_video(folder / name, frames=9)) == 2
        media.join_videos(folder / name, folder / name, folder / "joined.mp4", fps=24)
        assert len(media.read_video(folder / "joined.mp4", frames=9)) == 4
        media.write_image(folder / "p.png", clip(1, 8, 8)[0])


def test_a_link_goes_on_being_one(tmp_path: Path) -> None:
    (tmp_path / "link.png").symlink_to(tmp_path / "p.png")
    media.write_image(tmp_path / "link.png", clip(1, 8, 8)[0])
    assert (tmp_path / "link.png").is_symlink()
    assert media.read_image(tmp_path / "p.png").shape == (8, 8, 3)


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "v.mp4").mkdir()
    for path in (tmp_path / "v.mp4", tmp_path / "none" / "v.mp4"):
        with pytest.raises(OSError, match=r"v\.mp4"):
            media.write_video(path, clip(2, 32, 32), fps=24)
    assert (tmp_path / "v.mp4").is_dir()


@pytest.mark.parametrize("size", [(192, 320), (48, 64), (208, 336)])
def test_the_same_frames_make_the_same_file(tmp_path: Path, size: tuple[int, int]) -> None:
    """In memory that is filled alike, as x264's rate control reads some that nobody has set."""
    code = """if True:
        import sys
        from pathlib import Path

        import numpy as np

        from vllm_cosmos3 import media

        height, width, file = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
        y, x = np.mgrid[0:height, 0:width]
        levels = [((x + 10 * t) % 256, (2 * y + 5 * t) % 256, (x * y // 50 + 20 * t) % 256) for t in range(9)]
        frames = np.stack([np.stack(each, -1) for each in levels]).astype(np.uint8)
        made = set()
        for _ in range(8):
            media.write_video(file, frames, fps=24)
            made.add(file.read_bytes())
        print(len(made))
    """
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, size), str(tmp_path / "v.mp4")],
        capture_output=True,
        text=True,
        env=os.environ | {"MALLOC_PERTURB_": "85"},
        check=True,
    )
    assert int(done.stdout) == 1


def test_a_clip_with_b_frames_is_joined_to_one_like_it(tmp_path: Path) -> None:
    """As earlier versions have made them."""
    for name, b_frames in (("old", True), ("like", True), ("new", False)):
        media.write_video(tmp_path / name, clip(9, 48, 64), fps=24, b_frames=b_frames)
        assert media.has_b_frames(tmp_path / name) == b_frames
    assert media.join_videos(tmp_path / "old", tmp_path / "like", tmp_path / "all", fps=24) == 18
    with pytest.raises(Unsupported):
        media.join_videos(tmp_path / "old", tmp_path / "new", tmp_path / "all", fps=24)


# Decoded bytes are asked for first.


def test_what_is_decoded_is_reserved_before_and_given_back(video: bytes, tmp_path: Path) -> None:
    large = encoded(Image.new("L", (4096, 4096)))
    budget = MediaBudget(per_request=2**20, total=2**21)
    for source in ([large], [tmp_path / "large.png"]):
        (tmp_path / "large.png").write_bytes(large)
        with pytest.raises(
            InvalidRequest, match=r"192 MiB when decoded.* at most 1 MiB"
        ) as refused:
            next(media.frames_of(source, limit=1, field="image", lease=budget.lease()))  # type: ignore[arg-type]
        assert (refused.value.field, refused.value.code) == ("image", "payload_too_large")
    with budget.lease() as lease:
        frames = media.frames_of(video, limit=3, lease=lease)
        next(frames)
        assert budget.used >= 48 * 64 * 3
        frames.close()  # type: ignore[attr-defined]
        assert budget.used == 0


def test_other_requests_may_hold_the_memory(video: bytes) -> None:
    budget = MediaBudget(per_request=2**20, total=2**20)
    with budget.lease() as other:
        other.reserve(2**20 - 1000, "video")
        with pytest.raises(Busy, match="send it again"):
            next(media.frames_of(video, limit=1, lease=budget.lease()))
    next(media.frames_of(video, limit=1, lease=budget.lease()))


def test_frames_that_were_looked_at_are_not_kept(tmp_path: Path) -> None:
    """PyAV's side data would keep each, until garbage is collected."""
    media.write_video(tmp_path / "v.mp4", clip(40, 48, 64), fps=24)

    def frames() -> int:
        return sum(type(thing) is av.VideoFrame for thing in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = frames()
        for _ in media.frames_of(tmp_path / "v.mp4", limit=99):
            pass
        kept = frames() - before
    finally:
        gc.enable()
    assert kept <= 2  # the last one and its conversion


def test_a_large_picture_takes_no_copies(tmp_path: Path) -> None:
    """At most 12 bytes for each pixel, of which Pillow has four and the array three."""
    Image.new("RGB", (6000, 6000), (1, 2, 3)).save(tmp_path / "a.png")
    code = """if True:
        import sys, torch
        from pathlib import Path
        from vllm_cosmos3 import media

        def peak():  # getrusage begins with that of the process by which this one was started
            status = Path("/proc/self/status").read_text()
            return 1024 * int(status.partition("VmHWM:")[2].split()[0])

        media.cover_crop(media.read_image(sys.argv[1])[None, :64, :64], height=32, width=32)
        before = peak()
        media.cover_crop(media.read_image(sys.argv[2])[None], height=192, width=320)
        print(peak() - before)
    """
    Image.new("RGB", (64, 64)).save(tmp_path / "small.png")
    command = [sys.executable, "-c", code, str(tmp_path / "small.png"), str(tmp_path / "a.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=HANG)
    assert 3 * 6000 * 6000 < int(done.stdout) < 12 * 6000 * 6000


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("source", [(513, 40), (700, 1023), (257, 300), (16, 300)])
@pytest.mark.parametrize("target", [(192, 320), (17, 33), (720, 720)])
def test_strips_are_resized_as_the_whole(
    source: tuple[int, int], target: tuple[int, int], mode: str
) -> None:
    frame = np.random.RandomState(0).randint(0, 256, (*source, 3), dtype=np.uint8)
    x = torch.from_numpy(frame).movedim(2, 0)[None].float()
    whole = torch.nn.functional.interpolate(x, size=target, mode=mode, antialias=True)
    ours = np.stack([*media._resized(frame, target, mode)], axis=2)
    assert np.array_equal(ours, whole[0].round().clamp(0, 255).movedim(0, 2).numpy())
