"""Frames decoded on demand are those that OpenCV reads from the start, in any order and number."""

from __future__ import annotations

import gc
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from fractions import Fraction
from functools import cache
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from media_files import encoded

import vllm_cosmos3.reasoner.media.video_reader as module
from vllm_cosmos3.errors import Busy, InvalidRequest
from vllm_cosmos3.media_budget import MediaBudget
from vllm_cosmos3.reasoner.media.video_reader import LazyFrames, RecentSamples, VideoReader

OPEN_GROUPS = {"x264-params": "open-gop=1:keyint=10:bframes=3:b-pyramid=normal"}
CLIPS: dict[str, dict[str, Any]] = {
    "B-frames": {"frames": 41},
    "a key frame every 7": {"frames": 50, "fps": Fraction(30000, 1001), "g": "7"},
    "open groups": {"frames": 53, **OPEN_GROUPS},
    "one frame": {"frames": 1},
    "a frame every two seconds": {"frames": 7, "fps": Fraction(1, 2)},
    "odd size": {"width": 97, "height": 63, "pixels": "yuv444p"},
    "full range": {"color_range": "pc"},
    "BT.709": {"colorspace": "bt709", "color_primaries": "bt709", "color_trc": "bt709"},
    "Matroska": {"container": "matroska"},
    "transport stream": {"container": "mpegts"},
    "HEVC": {"codec": "libx265", "frames": 33, "x265-params": "log-level=none"},
    "VP9, odd size": {"codec": "libvpx-vp9", "container": "webm", "width": 97, "height": 63},
    "VP8": {"codec": "libvpx", "container": "webm"},
    "MPEG-4 in AVI": {"codec": "mpeg4", "container": "avi", "bf": "2"},
    "MJPEG": {"codec": "mjpeg", "container": "avi", "pixels": "yuvj420p"},
    "GIF": {"codec": "gif", "container": "gif", "pixels": "rgb8", "fps": 10},
}


@cache
def data(name: str) -> bytes:
    return encoded(**CLIPS[name])


@cache
def read_by_opencv(name: str) -> tuple[np.ndarray, float]:
    capture = cv2.VideoCapture(BytesIO(data(name)), cv2.CAP_FFMPEG, [])
    frames = []
    while (read := capture.read())[0]:
        frames.append(cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB))
    return np.stack(frames), capture.get(cv2.CAP_PROP_FPS)


def without_parameters(clip: bytes) -> bytes:
    """A transport stream of H.264 that was joined too late to know what its pictures are like."""
    return clip.replace(b"\0\0\0\x01\x67", b"\0\0\0\x01\x0c")


def sound() -> bytes:
    """An audio-only MP4."""
    buffer = BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        stream = file.add_stream("aac", rate=48_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), "fltp", "mono")
        frame.sample_rate = 48_000
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return buffer.getvalue()


def pixels(clip: VideoReader, numbers: Sequence[int]) -> np.ndarray:
    return LazyFrames.of(clip, numbers).pixels()


@pytest.mark.parametrize("name", CLIPS)
def test_planes_are_the_same_pixels(name: str) -> None:
    frames, _ = read_by_opencv(name)
    planes = VideoReader(data(name)).planes(len(frames) - 1)
    assert np.array_equal(np.stack(planes, axis=-1), frames[-1])


@pytest.mark.parametrize("name", CLIPS)
def test_frames_size_and_rate_are_those_of_opencv(name: str) -> None:
    frames, fps = read_by_opencv(name)
    clip = VideoReader(data(name))
    assert (len(clip), clip.fps) == (len(frames), pytest.approx(fps))
    assert np.array_equal(pixels(clip, range(len(clip))), frames)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(CLIPS)),
    seed=st.integers(0, 999),
    count=st.integers(1, 9),
    threads=st.integers(1, 4),
)
def test_any_frames_in_any_order_are_the_same(
    name: str, seed: int, count: int, threads: int
) -> None:
    frames, _ = read_by_opencv(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module._readers, "threads", lambda: threads)
        clip = VideoReader(data(name))
    random = np.random.default_rng(seed)
    for _ in range(2):  # the second time on what the first has decoded
        numbers = random.integers(0, len(clip), count).tolist()
        assert np.array_equal(pixels(clip, numbers), frames[numbers])


@pytest.mark.parametrize("container", ["mpegts", "asf"])
@pytest.mark.parametrize("lost", [(31,), range(30, 62)], ids=["one frame", "a pause"])
def test_what_is_lost_leaves_the_duration(container: str, lost: Sequence[int]) -> None:
    """OpenCV takes the clock of such a file for its rate, or misses the pause."""
    clip = VideoReader(encoded(codec="mpeg4", container=container, frames=75, fps=25, without=lost))
    assert len(clip) == 75 - len(lost)
    assert len(clip) / clip.fps == pytest.approx(3, abs=0.1)


def test_a_group_that_nobody_wants_is_not_decoded() -> None:
    clip = VideoReader(data("a key frame every 7"))
    played: list[int] = []
    play = clip._play
    clip._play = lambda packets, wanted: played.append(len(packets)) or play(packets, wanted)  # type: ignore[assignment,method-assign,func-returns-value]
    clip.decode([0, 1, 40])
    assert len(played) == 2
    assert sum(played) <= 2 * 7


def test_damage_holds_the_frame_before_and_hurts_no_other_group() -> None:
    whole = data("a key frame every 7")
    frames, _ = read_by_opencv("a key frame every 7")
    clip = VideoReader(whole)
    packet = clip._groups[3][0]
    broken = bytearray(whole)
    start = whole.find(bytes(packet))
    broken[start + 5 : start + packet.size] = bytes(packet.size - 5)
    for numbers in (list(range(len(clip))), [20, 23, 47], [23]):
        shown = pixels(VideoReader(bytes(broken)), numbers)
        sound = [i for i, number in enumerate(numbers) if number < 18 or number > 32]
        assert shown.shape == (len(numbers), 64, 96, 3)
        assert np.array_equal(shown[sound], frames[[numbers[i] for i in sound]])


def test_damage_costs_no_more_than_its_surroundings() -> None:
    clip = VideoReader(data("a key frame every 7"))
    broken = av.Packet(b"\0\0\0\x01\x65" + bytes(50))
    broken.pts = clip._groups[1][0].pts
    clip._groups[1] = [broken]
    seen: list[int | None] = []
    play = clip._play

    def counted(*args: Any, **kwargs: Any) -> Iterator[av.VideoFrame]:
        for frame in play(*args, **kwargs):
            seen.append(frame.pts)
            yield frame

    clip._play = counted  # type: ignore[method-assign]
    clip.decode([7])
    assert len(seen) < 20  # of 50


@pytest.mark.parametrize("name", ["B-frames", "GIF", "MJPEG", "VP8", "transport stream"])
@settings(max_examples=40)
@given(
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=30)
)
def test_a_damaged_file_is_read_or_refused(name: str, flips: list[tuple[float, int]]) -> None:
    broken = bytearray(data(name))
    for place, value in flips:
        broken[int(place * len(broken))] = value
    with suppress(InvalidRequest, InvalidRequest):
        clip = VideoReader(bytes(broken), most_pixels=2**20)
        assert pixels(clip, [0, len(clip) - 1]).shape == (2, clip.height, clip.width, 3)


def test_a_title_may_be_in_any_encoding() -> None:
    plain = encoded(codec="mpeg4", container="avi", title="XXXXX")
    assert plain.count(b"XXXXX") == 1
    clip = VideoReader(plain.replace(b"XXXXX", "Étés!".encode("latin-1")))
    assert np.array_equal(pixels(clip, [3]), pixels(VideoReader(plain), [3]))


def test_a_clip_without_a_sound_frame_is_refused() -> None:
    clip = VideoReader(data("MJPEG"))
    clip._groups = [[] for _ in clip._groups]
    with pytest.raises(InvalidRequest, match="no frame can be decoded"):
        clip.decode([3])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "End of file|Invalid data"),
        (b"no video", "Invalid data"),
        (data("B-frames")[:2000], "Invalid data"),
        (without_parameters(data("transport stream")), "of no known format"),
        (data("MJPEG").replace(b"MJPG", b"QQQQ"), "its codec is none that"),
        (sound(), "it has no video track"),
    ],
    ids=["empty", "text", "truncated", "no parameters", "an unknown codec", "sound"],
)
def test_what_is_no_video_is_said(content: bytes, reason: str) -> None:
    says = rf"^video_url is 'a file of {len(content)} bytes', must be a video, such as .* \(.*({reason})"
    with pytest.raises(InvalidRequest, match=says):
        VideoReader(content)


def test_large_frames_are_refused_before_any_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VideoReader, "_play", lambda *_: pytest.fail("decoded"))
    with pytest.raises(InvalidRequest, match="'a video of 96x64', must be at most 6143 pixels"):
        VideoReader(data("B-frames"), most_pixels=96 * 64 - 1)


def playlists(url: str) -> dict[str, bytes]:
    """Small files that make FFmpeg open others."""
    segment = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{url}\n#EXT-X-ENDLIST\n"
    return {
        "HLS": segment.encode(),
        "concat": f"ffconcat version 1.0\nfile {url}\n".encode(),
        "SDP": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n"
        b"a=rtpmap:96 H264/90000\n",
    }


@pytest.mark.parametrize("name", playlists(""))
def test_a_playlist_opens_nothing(name: str, tmp_path: Path) -> None:
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)  # whoever has connected waits already
        port = server.getsockname()[1]
        (tmp_path / "a.mp4").write_bytes(data("B-frames"))
        for url in (
            f"http://127.0.0.1:{port}/a.ts",
            (tmp_path / "a.mp4").as_uri(),
            str(tmp_path / "a.mp4"),
        ):
            with pytest.raises(InvalidRequest):
                VideoReader(playlists(url)[name])
        with suppress(TimeoutError):
            asked.append(server.accept()[0].recv(100))
    assert not asked


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_frames_are_in_order_without_the_times_to_show_them_at(codec: str) -> None:
    """As ``ffmpeg -c copy`` writes them from a bare stream, or an old AVI has them."""
    right = encoded(codec=codec, frames=40, bf="2", g="12")
    expected = pixels(VideoReader(right), range(40))
    for container in ("mp4", "matroska" if codec == "libx264" else "avi"):
        reader = VideoReader(with_decoding_times_only(right, container))
        assert len(reader) == 40
        assert np.array_equal(pixels(reader, range(40)), expected)
        assert np.array_equal(pixels(reader, [31, 7]), expected[[31, 7]])


def with_decoding_times_only(clip: bytes, container: str) -> bytes:
    """The packets of a clip with the times at which they are decoded as those at which they are shown."""
    buffer = BytesIO()
    with av.open(BytesIO(clip)) as source, av.open(buffer, "w", format=container) as file:
        stream = file.add_stream_from_template(source.streams.video[0])
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = stream
                packet.pts = packet.dts = packet.dts + 3 * packet.duration  # none below 0
                file.mux(packet)
    return buffer.getvalue()


@pytest.mark.parametrize("count", [1, 7, 60])
def test_windows_of_a_long_clip_have_every_frame(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    expected, _ = read_by_opencv("open groups")
    reader = VideoReader(data("open groups"))
    monkeypatch.setattr(module, "HELD_BYTES", count * reader.frame_bytes)
    numbers = [*range(0, 53, 2), 52, 52]
    seen: list[int] = []
    for places in reader.windows(numbers):
        assert len(reader._decoded) <= count + 1
        for place in places:
            assert np.array_equal(reader.pixels(numbers[place]), expected[numbers[place]])
        seen += places
    assert seen == [*range(len(numbers))]


def test_windows_hold_the_frame_before_a_damaged_one(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = data("a key frame every 7")
    expected, _ = read_by_opencv("a key frame every 7")
    packet = VideoReader(whole)._groups[3][0]
    broken = bytearray(whole)
    start = whole.find(bytes(packet))
    broken[start + 5 : start + packet.size] = bytes(packet.size - 5)
    reader = VideoReader(bytes(broken))
    monkeypatch.setattr(module, "HELD_BYTES", 4 * reader.frame_bytes)
    shown = np.stack([reader.pixels(n) for places in reader.windows(range(50)) for n in places])
    sound = [number for number in range(50) if number < 18 or number > 32]
    assert shown.shape == expected.shape
    assert np.array_equal(shown[sound], expected[sound])


def test_memory_is_asked_for_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    clip = data("B-frames")
    budget = MediaBudget(per_request=2**20, total=2**20)
    monkeypatch.setattr(module, "media_budget", lambda: budget)
    readers = [VideoReader(clip) for _ in range(2)]
    monkeypatch.setattr(module, "HELD_BYTES", readers[0].frame_bytes)
    readers[0].decode([3])
    budget.total = budget.used + 1
    with pytest.raises(Busy, match="send it again later"):
        readers[1].decode([3])
    readers[1].decode_ahead([3])  # a guess is not worth an error
    readers.clear()
    gc.collect()
    assert budget.used == 0
    budget.per_request = 2**10
    with pytest.raises(
        InvalidRequest, match="at most 1 MiB of decoded pixels in a request"
    ) as error:
        VideoReader(clip).decode([3])
    assert error.value.code == "payload_too_large"


def test_a_clip_that_grows_holds_no_more_and_looks_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its container tells the size of the first frames, which lie further apart than FFmpeg looks."""
    size = {"container": "mpegts", "width": 64, "height": 64}
    large = {"container": "mpegts", "width": 512, "height": 384, "frames": 20}
    clip = encoded(**size, frames=250) + encoded(**large)
    reader = VideoReader(clip)
    assert (reader.width, reader.height, len(reader)) == (64, 64, 270)
    grown = range(255, 265)
    (places,) = reader.windows(grown)
    held = sum(plane.buffer_size for frame in reader._decoded.values() for plane in frame.planes)
    assert len(places) == 10
    assert held <= 10 * 3 * 64 * 64
    expected = [
        frame.reformat(64, 64, "rgb24", interpolation="BICUBIC").to_ndarray()
        for frame in islice(av.open(BytesIO(encoded(**large))).decode(video=0), 5, 15)
    ]
    assert np.array_equal(np.stack([reader.pixels(number) for number in grown]), expected)
    planes = [np.stack(reader.planes(number), axis=-1) for number in grown]
    assert np.array_equal(planes, expected)
    budget = MediaBudget(per_request=2**20, total=2**30)
    monkeypatch.setattr(module, "media_budget", lambda: budget)
    with pytest.raises(InvalidRequest, match="MiB when decoded"):
        VideoReader(clip).decode(grown)


def test_clip_frames_look_like_an_array_and_hold_nothing() -> None:
    frames, _ = read_by_opencv("B-frames")
    lazy = LazyFrames.of(VideoReader(data("B-frames")), range(0, 40, 2))
    assert isinstance(lazy, np.ndarray)
    assert (lazy.shape, lazy.dtype, lazy.strides) == ((20, 64, 96, 3), np.uint8, (0, 0, 0, 0))
    assert np.array_equal(lazy[3], frames[6])
    assert np.array_equal(lazy.pixels(), frames[:40:2])
    assert np.array_equal(lazy[np.array([1, 19])].pixels(), frames[[2, 38]])
    assert np.array_equal(lazy[2:5].pixels(), frames[4:10:2])
    assert np.array_equal(lazy[..., 0], frames[:40:2, ..., 0])
    assert repr(lazy) == "LazyFrames(20, 64, 96, 3)"
    assert lazy.tobytes() == data("B-frames")


def test_recent_samples_are_the_last_few_and_their_union() -> None:
    recent = RecentSamples(size=2)
    assert recent.numbers(10, 5.0) == []
    for step in (2, 3, 2, 5):
        recent.note(step, lambda total, fps, step=step: range(0, total, step))
    assert recent.numbers(10, 5.0) == sorted({*range(0, 10, 2), *range(0, 10, 5)})


def test_a_busy_process_gives_a_clip_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: set(range(16)))
    readers = module._Readers()
    threads = []
    with ExitStack() as stack:
        for _ in range(9):
            threads.append(readers.threads())
            stack.enter_context(readers)
    assert threads == [6, 3, 2, 1, 1, 1, 1, 1, 1]
    assert readers.threads() == 6
