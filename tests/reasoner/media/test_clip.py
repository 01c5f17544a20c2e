"""Frames decoded on demand are those that OpenCV reads from the start, in any order and number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from fractions import Fraction
from functools import cache
from io import BytesIO
from typing import Any

import av
import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from media_files import encoded, turned

import vllm_cosmos3.reasoner.media.clip as clip_module
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.reasoner.media.clip import Clip, ClipFrames, NotIndexable, RecentSamples

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


def pixels(clip: Clip, numbers: Sequence[int]) -> np.ndarray:
    return ClipFrames.of(clip, numbers).pixels()


@pytest.mark.parametrize("name", CLIPS)
def test_planes_are_the_same_pixels(name: str) -> None:
    frames, _ = read_by_opencv(name)
    planes = Clip(data(name)).planes(len(frames) - 1)
    assert np.array_equal(np.stack(planes, axis=-1), frames[-1])


@pytest.mark.parametrize("name", CLIPS)
def test_frames_size_and_rate_are_those_of_opencv(name: str) -> None:
    frames, fps = read_by_opencv(name)
    clip = Clip(data(name))
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
        patch.setattr(clip_module._readers, "threads", lambda: threads)
        clip = Clip(data(name))
    random = np.random.default_rng(seed)
    for _ in range(2):  # the second time on what the first has decoded
        numbers = random.integers(0, len(clip), count).tolist()
        assert np.array_equal(pixels(clip, numbers), frames[numbers])


@pytest.mark.parametrize("container", ["mpegts", "asf"])
@pytest.mark.parametrize("lost", [(31,), range(30, 62)], ids=["one frame", "a pause"])
def test_what_is_lost_leaves_the_duration(container: str, lost: Sequence[int]) -> None:
    """OpenCV takes the clock of such a file for its rate, or misses the pause."""
    clip = Clip(encoded(codec="mpeg4", container=container, frames=75, fps=25, without=lost))
    assert len(clip) == 75 - len(lost)
    assert len(clip) / clip.fps == pytest.approx(3, abs=0.1)


def test_a_group_that_nobody_wants_is_not_decoded() -> None:
    clip = Clip(data("a key frame every 7"))
    played: list[int] = []
    play = clip._play
    clip._play = lambda packets, wanted: played.append(len(packets)) or play(packets, wanted)  # type: ignore[assignment,method-assign,func-returns-value]
    clip.decode([0, 1, 40])
    assert len(played) == 2
    assert sum(played) <= 2 * 7


def test_damage_holds_the_frame_before_and_hurts_no_other_group() -> None:
    whole = data("a key frame every 7")
    frames, _ = read_by_opencv("a key frame every 7")
    clip = Clip(whole)
    packet = clip._groups[3][0]
    broken = bytearray(whole)
    start = whole.find(bytes(packet))
    broken[start + 5 : start + packet.size] = bytes(packet.size - 5)
    for numbers in (list(range(len(clip))), [20, 23, 47], [23]):
        shown = pixels(Clip(bytes(broken)), numbers)
        sound = [i for i, number in enumerate(numbers) if number < 18 or number > 32]
        assert shown.shape == (len(numbers), 64, 96, 3)
        assert np.array_equal(shown[sound], frames[[numbers[i] for i in sound]])


def test_damage_costs_no_more_than_its_surroundings() -> None:
    clip = Clip(data("a key frame every 7"))
    broken = av.Packet(b"\0\0\0\x01\x65" + bytes(50))
    broken.pts = clip._groups[1][0].pts
    clip._groups[1] = [broken]
    seen: list[int | None] = []
    play = clip._play

    def counted(packets: list[Any], wanted: Any) -> Iterator[av.VideoFrame]:
        for frame in play(packets, wanted):
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
    with suppress(NotIndexable, InvalidRequest):
        clip = Clip(bytes(broken), most_pixels=2**20)
        assert pixels(clip, [0, len(clip) - 1]).shape == (2, clip.height, clip.width, 3)


def test_a_title_may_be_in_any_encoding() -> None:
    plain = encoded(codec="mpeg4", container="avi", title="XXXXX")
    assert plain.count(b"XXXXX") == 1
    clip = Clip(plain.replace(b"XXXXX", "Étés!".encode("latin-1")))
    assert np.array_equal(pixels(clip, [3]), pixels(Clip(plain), [3]))


def test_a_clip_without_a_sound_frame_is_refused() -> None:
    clip = Clip(data("MJPEG"))
    clip._groups = [[] for _ in clip._groups]
    with pytest.raises(InvalidRequest, match="no frame can be decoded"):
        clip.decode([3])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no video",
        data("B-frames")[:2000],
        turned(data("B-frames"), 90),
        turned(data("B-frames"), 90, container="matroska"),
        encoded(pixels="yuv420p10le"),
        encoded(container="avi", bf="2"),
        encoded(container="matroska", without=(9,)),
        without_parameters(data("transport stream")),
    ],
    ids=[
        "empty",
        "text",
        "truncated",
        "turned",
        "turned Matroska",
        "10 bits",
        "shown in an unknown order",
        "a frame lost",
        "no parameters",
    ],
)
def test_what_needs_more_than_numbers_is_left_to_vllm(content: bytes) -> None:
    with pytest.raises(NotIndexable):
        Clip(content)


def test_large_frames_are_left_to_vllm_before_any_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Clip, "_play", lambda *_: pytest.fail("decoded"))
    with pytest.raises(NotIndexable, match="96x64"):
        Clip(data("B-frames"), most_pixels=96 * 64 - 1)


def test_an_unknown_codec_is_left_to_vllm() -> None:
    with pytest.raises(NotIndexable):
        Clip(data("MJPEG").replace(b"MJPG", b"QQQQ"))


def test_clip_frames_look_like_an_array_and_hold_nothing() -> None:
    frames, _ = read_by_opencv("B-frames")
    lazy = ClipFrames.of(Clip(data("B-frames")), range(0, 40, 2))
    assert isinstance(lazy, np.ndarray)
    assert (lazy.shape, lazy.dtype, lazy.strides) == ((20, 64, 96, 3), np.uint8, (0, 0, 0, 0))
    assert np.array_equal(lazy[3], frames[6])
    assert np.array_equal(lazy.pixels(), frames[:40:2])
    assert np.array_equal(lazy[np.array([1, 19])].pixels(), frames[[2, 38]])
    assert np.array_equal(lazy[2:5].pixels(), frames[4:10:2])
    assert np.array_equal(lazy[..., 0], frames[:40:2, ..., 0])
    assert repr(lazy) == "ClipFrames(20, 64, 96, 3)"
    assert lazy.tobytes() == data("B-frames")


def test_recent_samples_are_the_last_few_and_their_union() -> None:
    recent = RecentSamples(size=2)
    assert recent.numbers(10, 5.0) == []
    for step in (2, 3, 2, 5):
        recent.note(step, lambda total, fps, step=step: range(0, total, step))
    assert recent.numbers(10, 5.0) == sorted({*range(0, 10, 2), *range(0, 10, 5)})


def test_a_busy_process_gives_a_clip_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_module.os, "sched_getaffinity", lambda _: set(range(16)))
    readers = clip_module._Readers()
    threads = []
    with ExitStack() as stack:
        for _ in range(9):
            threads.append(readers.threads())
            stack.enter_context(readers)
    assert threads == [6, 3, 2, 1, 1, 1, 1, 1, 1]
    assert readers.threads() == 6
