"""Every container and codec that this FFmpeg writes: the frames that FFmpeg shows, at its times.

About a hundred small files. What is expected is FFmpeg's own: its demuxer, decoder and scaler, and its
filters for the display matrix.
"""

from __future__ import annotations

from io import BytesIO
from typing import Any

import av
import av.filter
import numpy as np
import pytest
from media_files import encoded, turned

from vllm_cosmos3.reasoner.media.video_reader import LazyFrames, VideoReader

QUIET = {"x265-params": "log-level=none"}
B_FRAMES = {"bf": "2", "g": "10"}
# container, codec, pixel format, and options of the encoder
FILES: dict[str, dict[str, Any]] = {}


def add(container: str, codec: str, pixels: str = "yuv420p", **options: Any) -> None:
    shown = " ".join(f"{name}={value}" for name, value in options.items() if name != "x265-params")
    FILES[" ".join(filter(None, (container, codec, pixels, shown)))] = {
        "container": container,
        "codec": codec,
        "pixels": pixels,
        **options,
    }


for container in (
    "mp4",
    "mov",
    "matroska",
    "mpegts",
    "avi",
    "flv",
    "nut",
    "asf",
    "3gp",
    "ismv",
    "f4v",
):
    add(container, "libx264", **B_FRAMES)
for container in ("mp4", "mov", "matroska", "mpegts", "nut", "flv"):
    add(container, "libx265", **QUIET)
for container in ("mp4", "mov", "matroska", "avi", "mpegts", "nut", "asf", "m4v"):
    add(container, "mpeg4", **B_FRAMES)
for container in ("webm", "mp4", "matroska", "ivf", "avi", "nut"):
    add(container, "libvpx-vp9")
for container in ("webm", "matroska", "ivf"):
    add(container, "libvpx", **{"auto-alt-ref": "1", "lag-in-frames": "16"})
for container in ("mp4", "webm", "ivf", "matroska", "obu"):
    add(container, "libsvtav1", **{"preset": "12", "svtav1-params": "log-level=0"})
    add(container, "libsvtav1", "yuv420p10le", preset="12")
for container in ("mpegts", "mpeg", "vob", "avi", "matroska", "mpeg2video"):
    add(container, "mpeg2video", **B_FRAMES)
for container in ("mpeg", "mpeg1video", "avi"):
    add(container, "mpeg1video", **B_FRAMES)
for codec, pixels in (
    ("libx264", "yuv422p"),
    ("libx264", "yuv444p"),
    ("libx264", "yuv420p10le"),
    ("libx264", "yuv422p10le"),
    ("libx264", "gray"),
    ("libx265", "yuv420p10le"),
    ("libx265", "yuv422p10le"),
    ("libx265", "yuv420p12le"),
    ("libx265", "gbrp"),
    ("libvpx-vp9", "yuv422p"),
    ("libvpx-vp9", "yuv444p"),
    ("libvpx-vp9", "gbrp"),
):
    add("matroska", codec, pixels, **(QUIET if codec == "libx265" else {}))
for codec, pixels in (
    ("mjpeg", "yuvj420p"),
    ("mjpeg", "yuvj422p"),
    ("ffv1", "yuv420p"),
    ("ffv1", "yuv444p10le"),
    ("ffv1", "gray16le"),
    ("ffv1", "bgr0"),
    ("ffvhuff", "yuv422p"),
    ("huffyuv", "rgb24"),
    ("utvideo", "yuv420p"),
    ("utvideo", "gbrp"),
    ("magicyuv", "yuv444p"),
    ("rawvideo", "yuv420p"),
    ("rawvideo", "bgr24"),
    ("rawvideo", "yuyv422"),
    ("msmpeg4", "yuv420p"),
    ("wmv2", "yuv420p"),
    ("flv", "yuv420p"),
    ("asv2", "yuv420p"),
    ("zmbv", "bgr0"),
    ("cinepak", "rgb24"),
    ("png", "rgb24"),
    ("snow", "yuv420p"),
):
    add("avi", codec, pixels)
for codec, pixels in (
    ("prores_ks", "yuv422p10le"),
    ("prores_ks", "yuva444p10le"),
    ("qtrle", "rgb24"),
    ("qtrle", "argb"),
    ("png", "rgba"),
    ("mjpeg", "yuvj444p"),
    ("svq1", "yuv410p"),
    ("jpeg2000", "rgb24"),
    ("v210", "yuv422p10le"),
    ("cfhd", "yuv422p10le"),
    ("tiff", "rgb24"),
    ("rawvideo", "uyvy422"),
    ("dnxhd", "yuv422p"),
):
    profile = {"profile": "dnxhr_sq", "width": 256, "height": 128} if codec == "dnxhd" else {}
    add("mov", codec, pixels, **profile)
add("gif", "gif", "rgb8", fps=10)
add("apng", "apng", "rgb24")
add("apng", "apng", "rgba")
add("flv", "flv")
add("asf", "wmv2")
add("asf", "wmv1")
add("h264", "libx264", **B_FRAMES)
add("hevc", "libx265", **QUIET)
add("mjpeg", "mjpeg", "yuvj420p")
add("swf", "flv")
add("rm", "rv10", width=176, height=144)
add("3gp", "h263", width=176, height=144)
add("yuv4mpegpipe", "rawvideo")
add("mxf", "mpeg2video", fps=25)
add("gxf", "mpeg2video", width=720, height=576, fps=25)
add("dv", "dvvideo", width=720, height=576, fps=25)
add("wtv", "mpeg2video")


def quarter_turns() -> dict[str, bytes]:
    """Clips with every display matrix of whole turns, and one in Matroska."""
    plain = encoded(frames=5)
    place = plain.find(b"tkhd") + 44
    one = 0x10000
    files = {}
    for a, b, c, d in (
        *((0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)),
        *((-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0)),
    ):
        numbers = (a * one, b * one, 0, c * one, d * one, 0, 0, 0, 0x40000000)
        matrix = b"".join(number.to_bytes(4, "big", signed=True) for number in numbers)
        files[f"matrix {a} {b} {c} {d}"] = plain[:place] + matrix + plain[place + 36 :]
    return files | {"turned Matroska": turned(plain, 90, container="matroska")}


def as_shown(data: bytes) -> tuple[np.ndarray, list[float], bool]:
    """FFmpeg's frames [T, H, W, 3], their seconds, and whether ours must be the same bytes.

    Libswscale's ways to 8 bits, and to chroma that lies elsewhere, differ in the last bits.
    """
    frames, times = [], []
    with av.open(BytesIO(data)) as container:
        stream = container.streams.video[0]
        graph = None
        for frame in container.decode(stream):
            graph = graph or upright_rgb(stream, frame)
            graph.push(frame)
            frames.append(graph.pull().to_ndarray())  # type: ignore[union-attr]
            times.append(frame.time)
            exact = frame.format.components[0].bits == 8 and stream.codec.name != "dvvideo"
    return np.stack(frames), times, exact


def upright_rgb(stream: Any, frame: av.VideoFrame) -> av.filter.Graph:
    """What ffmpeg puts before an encoder of RGB, for a frame with a display matrix."""
    matrix = frame.side_data.get("DISPLAYMATRIX") if stream.codec.name != "tiff" else None
    a, _b, _, c, d = np.frombuffer(bytes(matrix), "<i4")[:5] if matrix else (1, 0, 0, 0, 1)
    filters: list[tuple[str, str]] = []
    if round(frame.rotation) % 360 == 270:
        filters = [("transpose", "cclock_flip" if c > 0 else "clock")]
    elif round(frame.rotation) % 360 == 90:
        filters = [("transpose", "clock_flip" if c < 0 else "cclock")]
    elif round(frame.rotation) % 360 == 180:
        filters = [("hflip", "")] * bool(a < 0) + [("vflip", "")] * bool(d < 0)
    elif d < 0:
        filters = [("vflip", "")]
    graph = av.filter.Graph()
    nodes = [graph.add_buffer(template=stream)]
    nodes += [graph.add(*each) for each in (("format", "pix_fmts=rgb24"), *filters)]
    nodes.append(graph.add("buffersink"))
    graph.link_nodes(*nodes).configure()
    return graph


def check(data: bytes) -> None:
    expected, times, exact = as_shown(data)
    reader = VideoReader(data)
    assert (len(reader), reader.height, reader.width) == expected.shape[:3]
    shown = LazyFrames.of(reader, range(len(reader))).pixels()
    if exact:
        assert np.array_equal(shown, expected)
    else:
        assert np.abs(shown.astype(int) - expected).mean() < 1.5
    planes = np.stack(VideoReader(data).planes(len(reader) // 2), axis=-1)
    assert np.array_equal(planes, shown[len(reader) // 2])
    if None not in times:
        seconds = np.arange(len(reader)) / reader.fps
        assert np.abs(seconds - sorted(times) + min(times)).max() < 1.01 / reader.fps


@pytest.mark.parametrize("name", FILES)
def test_frames_are_those_that_ffmpeg_shows(name: str) -> None:
    check(encoded(**{"frames": 22, "fps": 24, **FILES[name]}))


@pytest.mark.parametrize("name", quarter_turns())
def test_clips_are_upright(name: str) -> None:
    check(quarter_turns()[name])


def test_the_corpus_is_large() -> None:
    assert len(FILES) + len(quarter_turns()) >= 100
