"""A video in memory, of which only the frames that somebody asks for are decoded.

A request says how it samples a clip after the clip was loaded. So the container is taken apart at
once, which is cheap, and packets are decoded when frames are wanted: from the last key frame before
a wanted one to the wanted one; the rest stays compressed. FFmpeg works without Python's lock.
"""

from __future__ import annotations

import os
import struct
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Container, Hashable, Iterator, Sequence
from io import BytesIO
from itertools import islice
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from vllm_cosmos3.compat import any_titles
from vllm_cosmos3.errors import InvalidRequest

Sample = Callable[[int, float], Sequence[int]]  # (frames of a clip, its rate) -> their numbers


class NotIndexable(Exception):
    """Frames of this file cannot be taken by their number here; vLLM's loader reads it as a whole."""


class Clip:
    """The first video stream of a file: ``len(clip)`` frames, ``width`` x ``height``, by number.

    ``fps`` is their average rate, pauses included. Its methods may be called from several threads.
    """

    def __init__(self, data: bytes, *, most_pixels: int = 0) -> None:
        """NotIndexable if frames cannot be told apart before they are decoded, and other oddities.

        So are frames of more than ``most_pixels``, where that is not 0; none of them is decoded.
        """
        self.data = data
        self._turn = threading.Lock()
        self._decoded: dict[int, av.VideoFrame] = {}  # as the decoder gives them, mostly YUV
        try:
            with BytesIO(data) as file, av.open(file, **any_titles()) as container:
                stream = container.streams.video[0]
                self.width, self.height = stream.width, stream.height
                if 0 < most_pixels < self.width * self.height:
                    raise NotIndexable(f"frames of {self.width}x{self.height}")
                packets = [packet for packet in container.demux(stream) if packet.size]
                times = [packet.pts for packet in packets if not packet.is_discard]
                self.fps = _rate(container, stream, len(times))
                if stream.codec_context.pix_fmt is None:
                    raise NotIndexable("pictures of a format that FFmpeg does not find out")
                self._codec = _decoder(stream.codec_context)
                turned = _is_turned(data) or _matroska_turns(container, stream)
        except (av.error.FFmpegError, IndexError, AttributeError) as error:
            # no container, no video in it, or a codec that this FFmpeg lacks
            raise NotIndexable(str(error)) from None
        if self.fps <= 0 or not times or None in times or len(set(times)) < len(times):
            raise NotIndexable("no rate, no frames, or frames without a time of their own")
        self._times: list[int] = sorted(times)
        self._groups = _groups_of_pictures(packets)
        first = next(self._play(self._groups[0], self._times[:1]), None)
        if first is None or first.format.components[0].bits > 8 or turned:
            raise NotIndexable("pictures that must be turned, or that have more than 8 bits")

    def __len__(self) -> int:
        return len(self._times)

    def pixels(self, number: int) -> np.ndarray[Any, Any]:
        """One frame [height, width, 3] as uint8 RGB."""
        found: np.ndarray[Any, Any] = self._as_format(number, "rgb24").to_ndarray()
        return found

    def planes(self, number: int) -> list[np.ndarray[Any, Any]]:
        """Red, green and blue of one frame, uint8 [height, width] each, rows apart as FFmpeg likes."""
        frame = self._as_format(number, "gbrp")
        green, blue, red = (
            np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: self.height, : self.width]
            for plane in frame.planes
        )
        return [red, green, blue]

    def decode(self, numbers: Sequence[int]) -> None:
        """Have these frames ready: each is decoded once.

        A damaged frame is the one before it, as a player shows it. InvalidRequest if none decodes.
        """
        with self._turn:
            missing = sorted(set(numbers) - self._decoded.keys())
            if missing:
                with _readers:
                    self._decode(missing)

    def _decode(self, numbers: list[int]) -> None:
        """Decode these frames, ascending, into ``_decoded``."""
        number_at = {self._times[number]: number for number in numbers}
        for packets in _runs(self._groups, number_at.keys()):
            for frame in self._play(packets, number_at.keys()):
                if frame.pts in number_at:
                    self._decoded[number_at[frame.pts]] = frame
        damaged = [number for number in numbers if number not in self._decoded]
        if damaged:
            self._decoded |= self._held(damaged)
        if not self._decoded.keys() >= set(damaged):
            raise InvalidRequest("video_url", "a video in which no frame can be decoded", "a video")

    def _held(self, numbers: list[int]) -> dict[int, av.VideoFrame]:
        """What a player shows at these frames: the newest one not after it, else the first of all."""
        packets = [packet for group in self._groups for packet in group]
        held: dict[int, av.VideoFrame] = {}
        last = None
        waiting = deque(numbers)
        for frame in self._play(packets, set(self._times)):
            while waiting and frame.pts is not None and self._times[waiting[0]] < frame.pts:
                held[waiting.popleft()] = last or frame
            if not waiting:
                return held
            last = frame
        if last is not None:
            held |= dict.fromkeys(waiting, last)
        return held

    def _play(self, packets: list[Any], wanted: Container[int]) -> Iterator[av.VideoFrame]:
        """The decoder's frames in the order they are shown, from key frame to last wanted one."""
        # H.264 says of a picture whether others are built on it; those others do without are left out.
        droppable = self._codec.name == "h264"
        self._codec.flush_buffers()
        for packet in [*packets, None]:
            if droppable and packet is not None:
                self._codec.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
            try:
                yield from self._codec.decode(packet)
            except av.error.FFmpegError:
                continue  # damaged: the frame before it stays on screen

    def _as_format(self, number: int, name: str) -> av.VideoFrame:
        self.decode([number])
        # The filter matters for chroma of odd sizes, and is OpenCV's.
        return _of_thread.reformatter.reformat(
            self._decoded[number],
            width=self.width,
            height=self.height,
            format=name,
            interpolation="BICUBIC",
        )


class _Readers:
    """How many clips are being decoded in this process, which says how many threads the next may have.

    Six threads decode a clip in less than half the time and do 70 % more work in sum, so that only a
    machine with cores to spare gives them.
    """

    MOST = 6
    TAKEN = 2  # cores, by the event loop and the engine

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._count = 0

    def __enter__(self) -> None:
        with self._turn:
            self._count += 1

    def __exit__(self, *_: object) -> None:
        with self._turn:
            self._count -= 1

    def threads(self) -> int:
        """Half of this clip's share of the cores."""
        cores = len(os.sched_getaffinity(0)) - self.TAKEN
        return max(1, min(self.MOST, cores // (2 * (self._count + 1))))


class _OfThread(threading.local):
    """FFmpeg's converter: setting one up costs more than a frame, and threads cannot share one."""

    def __init__(self) -> None:
        self.reformatter = VideoReformatter()


_SLOTS = (
    "matroska,webm",
    "avi",
    "flv",
    "nut",
)  # a rate and a duration, of which the number of frames follows
_CLOCKS = ("mpegts", "asf")  # their rate may be that of the clock
_UPRIGHT = (0x10000, 0, 0, 0, 0x10000)  # the first numbers of the identity, in 16.16

_of_thread = _OfThread()
_readers = _Readers()


def _decoder(described: Any) -> Any:
    """A decoder for what a container describes, that does not hang on the container.

    A container and its streams refer to each other. A decoder of theirs would keep its frames until
    Python looks for such circles, which servers let it do rarely.
    """
    decoder = av.CodecContext.create(described.codec.name, "r")
    decoder.extradata = described.extradata
    decoder.width, decoder.height = described.width, described.height
    decoder.pix_fmt = described.pix_fmt
    decoder.codec_tag = described.codec_tag
    decoder.thread_type, decoder.thread_count = "FRAME", _readers.threads()
    return decoder


class ClipFrames(np.ndarray[Any, Any]):
    """Looks like the frames [T, H, W, 3] of a clip and occupies no memory.

    ``frames[numbers]`` are fewer such frames, ``frames[number]`` is an ordinary array, and so are
    ``pixels()``. vLLM and transformers ask no more of a video than its shape and its frames by number;
    vLLM's cache key is made of ``tobytes``, here the file.
    """

    source: Clip
    numbers: list[int]

    @classmethod
    def of(cls, clip: Clip, numbers: Sequence[int]) -> ClipFrames:
        """Frames ``numbers`` of ``clip``."""
        shape = (len(numbers), clip.height, clip.width, 3)
        frames = np.broadcast_to(np.zeros((), np.uint8), shape).view(cls)
        frames.source, frames.numbers = clip, list(numbers)
        return frames

    def pixels(self) -> np.ndarray[Any, Any]:
        """The frames as an ordinary array."""
        self.source.decode(self.numbers)
        return np.stack([self.source.pixels(number) for number in self.numbers])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, tuple):
            return self.pixels()[index]
        chosen = np.asarray(self.numbers)[index]
        if chosen.ndim == 0:
            return self.source.pixels(int(chosen))
        return self.of(self.source, chosen.tolist())

    def __repr__(self) -> str:
        return f"{type(self).__name__}{self.shape}"

    def tobytes(self, order: Any = "C") -> bytes:
        return self.source.data


class RecentSamples:
    """How the last few requests sampled their clips: a good guess at what the next one wants.

    The guess costs or saves time and never changes a result.
    """

    def __init__(self, size: int = 4) -> None:
        self._size = size
        self._turn = threading.Lock()
        self._samples: OrderedDict[Hashable, Sample] = OrderedDict()

    def note(self, key: Hashable, sample: Sample) -> None:
        """A request sampled in this way; equal ways have equal keys."""
        with self._turn:
            self._samples[key] = sample
            self._samples.move_to_end(key)
            while len(self._samples) > self._size:
                self._samples.popitem(last=False)

    def numbers(self, total: int, fps: float) -> list[int]:
        """Frames that one of them would take of a clip of ``total`` frames."""
        with self._turn:
            samples = list(self._samples.values())
        return sorted({int(number) for sample in samples for number in sample(total, fps)})


RECENT_SAMPLES = RecentSamples()


def _rate(container: Any, stream: Any, count: int) -> float:
    """Frames a second of a stream of ``count`` frames, 0 if unknown.

    NotIndexable where vLLM's loader goes by how many frames the clip would have without its pauses,
    which depends on how far OpenCV gets, and where nothing says in which order frames are shown.
    """
    kind, codec = container.format.name, stream.codec_context
    if kind == "avi" and codec.name in ("h264", "hevc") and codec.has_b_frames:
        raise NotIndexable(
            "frames that are stored in another order than shown, without their times"
        )
    rate = float(stream.average_rate or stream.guessed_rate or 0)
    if kind in _SLOTS:
        seconds = (container.duration or 0) / av.time_base
        slots = stream.frames or int(seconds * rate + 0.5)  # OpenCV's count
        if slots not in (0, count):
            raise NotIndexable(f"{count} frames where {slots} have their time")
    elif kind in _CLOCKS and stream.duration:
        seconds = float(stream.duration * stream.time_base)
        if int(seconds * rate + 0.5) != count:
            return count / seconds
    return rate


def _is_turned(data: bytes) -> bool:
    """Whether an MP4 or MOV asks players to turn or mirror a track: ISO 14496-12, 8.3.2.

    The decoder would say so too, if it were the container's.
    """
    place = data.find(b"tkhd")
    while place >= 0:
        longer = 12 if data[place + 4 : place + 5] == b"\1" else 0  # times of 64 bits
        matrix = data[place + longer + 44 : place + longer + 64]
        if len(matrix) == 20 and struct.unpack(">5i", matrix) != _UPRIGHT:
            return True
        place = data.find(b"tkhd", place + 1)
    return False


def _matroska_turns(container: Any, stream: Any) -> bool:
    """Whether a Matroska file asks players to turn a track, which only its own decoder says."""
    if "matroska" not in container.format.name:
        return False
    stream.codec_context.thread_count = 1
    container.seek(0)
    return any(frame.rotation for frame in islice(container.decode(stream), 1))


def _groups_of_pictures(packets: list[Any]) -> list[list[Any]]:
    """Packets in the order of the file, cut before each key frame."""
    groups: list[list[Any]] = []
    for packet in packets:
        if packet.is_keyframe or not groups:
            groups.append([])
        groups[-1].append(packet)
    return groups


def _runs(groups: list[list[Any]], wanted: Container[int]) -> Iterator[list[Any]]:
    """The shortest stretches of packets that decode to the wanted times.

    A picture shown before the key frame of its group may be built on the group before it as well.
    """
    needed: list[tuple[int, int]] = []  # group, and how many of its packets
    for index, group in enumerate(groups):
        last = max((i for i, p in enumerate(group) if p.pts in wanted), default=None)
        if last is None:
            continue
        leads = any(p.pts in wanted and p.pts < (group[0].pts or 0) for p in group)
        if leads and index:
            if needed and needed[-1][0] == index - 1:
                needed.pop()
            needed.append((index - 1, len(groups[index - 1])))
        needed.append((index, last + 1))
    run: list[Any] = []
    for place, (index, count) in enumerate(needed):
        run += groups[index][:count]
        following = needed[place + 1] if place + 1 < len(needed) else None
        goes_on = following is not None and following[0] == index + 1
        if not (goes_on and count == len(groups[index])):
            yield run
            run = []
