"""Video reader: the frames of a file in memory by number, of which only wanted ones are decoded.

A request says how it samples a clip after the clip was loaded. So the container is taken apart at
once, which is cheap, and packets are decoded when frames are wanted: from the last key frame before
a wanted one to the wanted one; the rest stays compressed. FFmpeg works without Python's lock.
"""

from __future__ import annotations

import os
import struct
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Container, Hashable, Iterator, Sequence
from contextlib import suppress
from io import BytesIO
from itertools import islice, pairwise
from typing import Any, NamedTuple

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from vllm_cosmos3.compat import any_titles
from vllm_cosmos3.errors import Busy, InvalidRequest
from vllm_cosmos3.media_budget import media_budget

FrameSampler = Callable[
    [int, float], Sequence[int]
]  # (frames of a clip, its rate) -> their numbers

FIELD = "video_url"
A_VIDEO = "a video, such as MP4, MOV, WebM, MKV, AVI, GIF or MPEG-TS"
HELD_BYTES = 2**27  # of decoded frames of one clip at once
SEVERAL = 64  # packets that show whether frames come out of the decoder in the order of their times
ROWS, COLUMNS = 0, 1
ELEMENTARY = {"h264", "hevc", "m4v", "mpegvideo", "vc1", "av1", "obu", "cavsvideo", "vvc", "evc"}
COUNTS = {"mov,mp4,m4a,3gp,3g2,mj2"}  # their rate is that of the frames there are
SLOTS = {"matroska,webm", "avi", "flv", "nut"}  # theirs is that of a clip without gaps; of others
# it may be that of the clock.
TIMED = COUNTS | {
    "matroska,webm",
    "flv",
    "nut",
    "mpegts",
    "asf",
}  # with the times to show frames at
# Formats that FFmpeg converts to planes of RGB as it does to RGB.
AS_PLANES = {f"{letters}{chroma}p" for letters in ("yuv", "yuvj") for chroma in (420, 422, 444)}
UPRIGHT = (0x10000, 0, 0, 0, 0x10000)  # the first numbers of a display matrix, in 16.16
# A playlist names more files and URLs, which this keeps FFmpeg from opening.
OF_ITSELF = {"protocol_whitelist": "none"}


class Orientation(NamedTuple):
    """How stored frames become upright: rows and columns are swapped, then axes reversed."""

    swapped: bool = False
    reversed: tuple[int, ...] = ()

    @classmethod
    def of(cls, matrix: Sequence[int]) -> Orientation:
        """Quarter turns and mirrorings of a display matrix (ISO 14496-12, 8.3.2)."""
        a, b, _, c, d = matrix[:5]
        swapped = abs(b) > abs(a)
        backwards = {ROWS: b < 0, COLUMNS: c < 0} if swapped else {ROWS: d < 0, COLUMNS: a < 0}
        return cls(swapped, tuple(axis for axis, back in backwards.items() if back))

    def upright(self, pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """A view of ``pixels`` [H, W, ...] as they are shown."""
        shown = pixels.swapaxes(ROWS, COLUMNS) if self.swapped else pixels
        return np.flip(shown, self.reversed) if self.reversed else shown


class VideoReader:
    """The first video stream of a file: ``len(reader)`` frames, ``width`` x ``height``, by number.

    They are the frames that FFmpeg shows, upright. ``fps`` is their average rate, pauses included.
    Its methods may be called from several threads.
    """

    def __init__(self, data: bytes, *, most_pixels: int = 0) -> None:
        """``most_pixels`` of a frame are accepted; 0: any number.

        Raises:
            InvalidRequest: FFmpeg finds no frames in it, or larger ones.
            Busy: other requests hold the memory that decoding takes.
        """
        self.data = data
        self._lock = threading.Lock()
        self._decoded: dict[int, av.VideoFrame] = {}  # as the decoder gives them, mostly YUV
        self._lease = media_budget().lease()
        self._reserved = False
        weakref.finalize(self, self._lease.release)
        try:
            self._open(data, most_pixels)
        except (av.error.FFmpegError, AttributeError, ValueError, LookupError) as error:
            if isinstance(error, InvalidRequest):
                raise
            raise unreadable(data, getattr(error, "strerror", None) or str(error)) from None

    def _open(self, data: bytes, most_pixels: int) -> None:
        with (
            BytesIO(data) as file,
            av.open(file, options=OF_ITSELF, **any_titles()) as container,
        ):
            if not container.streams.video:
                raise unreadable(data, "it has no video track")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise unreadable(data, "its codec is none that FFmpeg has")
            self._size = width, height = stream.width, stream.height
            self._largest = width * height
            if 0 < most_pixels < width * height:
                given = f"a video of {width}x{height}"
                raise InvalidRequest(FIELD, given, f"at most {most_pixels} pixels a frame")
            packets = [packet for packet in container.demux(stream) if packet.size]
            described = stream.codec_context
            if described.pix_fmt is None:
                raise unreadable(data, "its frames are of no known format")
            self.frame_bytes = width * height * described.format.padded_bits_per_pixel // 8
            threads = min(_readers.threads(), max(1, HELD_BYTES // (4 * self.frame_bytes)))
            self._codec = _decoder(described, threads)
            self._reorders = described.has_b_frames
            self._format = container.format.name
            self._groups = _groups_of_pictures(_decodable(packets, self._codec.name))
            shown = _shown_packets(self._packets(), self._codec.name)
            self.fps = _rate(container, stream, shown)
            matrix = _display_matrix(data, container, stream)
        first = next(self._play(self._packets()), None)
        if first is None or self.fps <= 0:
            raise unreadable(data, "it has no rate" if first else "no frame can be decoded")
        self._as_planes = first.format.name in AS_PLANES
        self._orientation = Orientation.of(matrix or _matrix_of(first) or UPRIGHT)
        self.width, self.height = (height, width) if self._orientation.swapped else (width, height)
        self._times = self._in_order([packet.pts for packet in shown])
        self._count = len(self._times) or sum(1 for _ in self._play(self._packets()))

    def __len__(self) -> int:
        return self._count

    def pixels(self, number: int) -> np.ndarray[Any, Any]:
        """One frame [height, width, 3] as uint8 RGB."""
        stored = self._as_format(number, "rgb24").to_ndarray()
        return np.ascontiguousarray(self._orientation.upright(stored))

    def planes(self, number: int) -> list[np.ndarray[Any, Any]]:
        """Red, green and blue of one frame, uint8 [height, width] each, rows apart as FFmpeg likes."""
        if not self._as_planes or self._orientation != Orientation():
            return list(np.moveaxis(self.pixels(number), -1, 0))
        frame = self._as_format(number, "gbrp")
        green, blue, red = (
            np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: self.height, : self.width]
            for plane in frame.planes
        )
        return [red, green, blue]

    def decode(self, numbers: Sequence[int]) -> None:
        """Have these frames ready: each is decoded once.

        A damaged frame is the one before it, as a player shows it.

        Raises:
            InvalidRequest: none can be decoded.
            Busy: other requests hold the memory that it takes.
        """
        with self._lock:
            missing = sorted(set(numbers) - self._decoded.keys())
            if missing:
                self._reserve()
                with _readers:
                    stream = self._shown(missing)
                    self._decoded |= self._next_frames(stream, missing)

    def decode_ahead(self, numbers: Sequence[int]) -> None:
        """`decode` what will probably be wanted, where that takes little memory."""
        frames = len(set(numbers)) + self._decoder_frames
        if frames * self.frame_bytes <= HELD_BYTES:
            with suppress(Busy):
                self.decode(numbers)

    def windows(self, numbers: Sequence[int]) -> Iterator[range]:
        """Consecutive places in ascending ``numbers`` whose frames are ready until the next window.

        So the frames of a long clip are never in memory all at once.
        """
        size = max(1, HELD_BYTES // self.frame_bytes)
        if len(numbers) <= size:
            self.decode(numbers)
            yield range(len(numbers))
            return
        self._reserve()
        stream = self._shown(sorted(set(numbers)))
        for start in range(0, len(numbers), size):
            places = range(start, min(start + size, len(numbers)))
            wanted = sorted({numbers[place] for place in places})
            with self._lock, _readers:
                ready = {n: frame for n, frame in self._decoded.items() if n in wanted}
                self._decoded = ready
                missing = [number for number in wanted if number not in ready]
                self._decoded |= self._next_frames(stream, missing)
            yield places

    @property
    def _decoder_frames(self) -> int:
        """How many frames a decoder keeps: one for each thread, and those that others refer to."""
        return int(self._codec.thread_count) + 4

    def _packets(self) -> list[Any]:
        return [packet for group in self._groups for packet in group]

    def _reserve(self) -> None:
        """The memory of a decoder, of what is held and of two frames as RGB, until the reader ends."""
        if not self._reserved:
            held = min(self._count * self.frame_bytes, HELD_BYTES)
            as_rgb = 6 * self.width * self.height
            size = held + self._decoder_frames * self.frame_bytes + as_rgb
            self._lease.reserve(size, FIELD)
            self._reserved = True

    def _next_frames(
        self, stream: Iterator[tuple[int, av.VideoFrame]], numbers: Sequence[int]
    ) -> dict[int, av.VideoFrame]:
        """Frames ``numbers``, ascending, out of a stream of frames with their numbers."""
        found: dict[int, av.VideoFrame] = {}
        for number, frame in stream if numbers else ():
            found[number] = self._fitted(frame)
            if number >= numbers[-1]:
                break
        damaged = [number for number in numbers if number not in found]
        if damaged:
            found |= self._held(damaged)
        if not found.keys() >= set(damaged):
            raise unreadable(self.data, "no frame can be decoded")
        return found

    def _shown(self, numbers: Sequence[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """Frames ``numbers``, ascending, with their number; damaged ones are left out."""
        if not self._times:
            wanted = set(numbers)
            frames = enumerate(self._play(self._packets()))
            yield from ((number, frame) for number, frame in frames if number in wanted)
            return
        number_at = {self._times[number]: number for number in numbers}
        for packets in _runs(self._groups, number_at.keys()):
            for frame in self._play(packets, number_at.keys()):
                if frame.pts in number_at:
                    yield number_at[frame.pts], frame

    def _held(self, numbers: list[int]) -> dict[int, av.VideoFrame]:
        """What a player shows at these frames: the newest one not after it, else the first of all."""
        held: dict[int, av.VideoFrame] = {}
        last = None
        waiting = deque(numbers)
        number_at = {time: number for number, time in enumerate(self._times)}
        codec = _decoder(self._codec, self._codec.thread_count)
        for index, frame in enumerate(self._play(self._packets(), codec=codec)):
            number = number_at.get(frame.pts) if self._times else index
            while waiting and number is not None and waiting[0] < number:
                held[waiting.popleft()] = self._fitted(last or frame)
            if not waiting:
                return held
            last = frame
        if last is not None:
            held |= dict.fromkeys(waiting, self._fitted(last))
        return held

    def _fitted(self, frame: av.VideoFrame) -> av.VideoFrame:
        """A frame in the size of the clip: a few kilobytes may have larger ones after the first.

        Raises:
            InvalidRequest: the decoder's own ones take more memory than a request may have.
            Busy: other requests hold that memory.
        """
        if (frame.width, frame.height) == self._size:
            return frame
        if (area := frame.width * frame.height) > self._largest:
            more = (area - self._largest) * frame.format.padded_bits_per_pixel // 8
            self._lease.reserve(more * self._decoder_frames, FIELD)
            self._largest = area
        return self._reformatted(frame, "rgb24")

    def _play(
        self, packets: list[Any], wanted: Container[int] | None = None, codec: Any = None
    ) -> Iterator[av.VideoFrame]:
        """The decoder's frames in the order they are shown; those of the times ``wanted``, or all."""
        codec = codec or self._codec
        # H.264 says of a picture whether others are built on it; those others do without are left out.
        droppable = wanted is not None and codec.name == "h264"
        codec.skip_frame = "DEFAULT"
        codec.flush_buffers()
        for packet in [*packets, None]:
            if droppable and packet is not None:
                codec.skip_frame = "DEFAULT" if packet.pts in (wanted or ()) else "NONREF"
            try:
                yield from codec.decode(packet)
            except av.error.FFmpegError:
                continue  # damaged: the frame before it stays on screen

    def _in_order(self, times: list[int | None]) -> list[int]:
        """The times at which frames are shown, none where the file does not tell.

        Some files have the times at which frames are decoded only, others give a time to two.
        """
        known = [time for time in times if time is not None]
        if self._format in ELEMENTARY or len(set(known)) < len(times):
            return []
        ordered = sorted(known)
        if self._reorders and (known == ordered or self._format not in TIMED):
            shown = [frame.pts for frame in self._play(self._packets()[:SEVERAL])]
            if any(later <= time for time, later in pairwise(shown)):
                return []
        return ordered

    def _as_format(self, number: int, name: str) -> av.VideoFrame:
        """A frame as it is stored, in a pixel format."""
        self.decode([number])
        return self._reformatted(self._decoded[number], name)

    def _reformatted(self, frame: av.VideoFrame, name: str) -> av.VideoFrame:
        width, height = self._size
        # The filter matters for chroma of odd sizes, and is OpenCV's.
        return _of_thread.reformatter.reformat(
            frame,
            width=width,
            height=height,
            format=name,
            interpolation="BICUBIC",
        )


def unreadable(data: bytes, reason: str) -> InvalidRequest:
    """The error of a file that is no video, or a broken one."""
    reason = " ".join(reason.split())[:200]
    return InvalidRequest(FIELD, f"a file of {len(data)} bytes", f"{A_VIDEO} ({reason})")


class _Readers:
    """How many clips are being decoded in this process, which says how many threads the next may have.

    Six threads decode a clip in less than half the time and do 70 % more work in sum, so that only a
    machine with cores to spare gives them.
    """

    MOST = 6
    TAKEN = 2  # cores, by the event loop and the engine

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0

    def __enter__(self) -> None:
        with self._lock:
            self._count += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._count -= 1

    def threads(self) -> int:
        """Half of this clip's share of the cores."""
        cores = len(os.sched_getaffinity(0)) - self.TAKEN
        return max(1, min(self.MOST, cores // (2 * (self._count + 1))))


class _OfThread(threading.local):
    """FFmpeg's converter: setting one up costs more than a frame, and threads cannot share one."""

    def __init__(self) -> None:
        self.reformatter = VideoReformatter()


_of_thread = _OfThread()
_readers = _Readers()


def _decoder(described: Any, threads: int) -> Any:
    """A decoder for what a container describes, that does not hang on the container.

    A container and its streams refer to each other. A decoder of theirs would keep its frames until
    Python looks for such circles, which servers let it do rarely.
    """
    decoder = av.CodecContext.create(described.codec.name, "r")
    decoder.extradata = described.extradata
    decoder.width, decoder.height = described.width, described.height
    decoder.pix_fmt = described.pix_fmt
    decoder.codec_tag = described.codec_tag
    decoder.bits_per_coded_sample = described.bits_per_coded_sample
    decoder.thread_type, decoder.thread_count = "FRAME", threads
    return decoder


class LazyFrames(np.ndarray[Any, Any]):
    """Looks like the frames [T, H, W, 3] of a clip and occupies no memory.

    ``frames[numbers]`` are fewer such frames, ``frames[number]`` is an ordinary array, and so are
    ``pixels()``. vLLM and transformers ask no more of a video than its shape and its frames by number;
    vLLM's cache key is made of ``tobytes``, here the file.
    """

    source: VideoReader
    numbers: list[int]

    @classmethod
    def of(cls, clip: VideoReader, numbers: Sequence[int]) -> LazyFrames:
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
        self._lock = threading.Lock()
        self._samples: OrderedDict[Hashable, FrameSampler] = OrderedDict()

    def note(self, key: Hashable, sample: FrameSampler) -> None:
        """A request sampled in this way; equal ways have equal keys."""
        with self._lock:
            self._samples[key] = sample
            self._samples.move_to_end(key)
            while len(self._samples) > self._size:
                self._samples.popitem(last=False)

    def numbers(self, total: int, fps: float) -> list[int]:
        """Frames that one of them would take of a clip of ``total`` frames."""
        with self._lock:
            samples = list(self._samples.values())
        return sorted({int(number) for sample in samples for number in sample(total, fps)})


RECENT_SAMPLES = RecentSamples()


def _rate(container: Any, stream: Any, packets: list[Any]) -> float:
    """Frames a second on average, gaps included; 0 if unknown."""
    name = container.format.name
    stated = stream.guessed_rate if name in ELEMENTARY else stream.average_rate
    rate = float(stated or stream.guessed_rate or 0)
    times = [packet.dts if packet.pts is None else packet.pts for packet in packets]
    if name in COUNTS | ELEMENTARY or None in times or len(times) < 2:
        return rate
    seconds = float((max(times) - min(times)) * stream.time_base)
    slots = round(seconds * rate) + 1
    if slots == len(times) or not seconds:
        return rate
    return rate * len(times) / slots if name in SLOTS else (len(times) - 1) / seconds


def _display_matrix(data: bytes, container: Any, stream: Any) -> Sequence[int] | None:
    """The display matrix of a track, None if it says nothing.

    A decoder says so, but only the one of the container, which is not made where nothing is said.
    """
    if "matroska" not in container.format.name and not _has_matrix(data):
        return None
    stream.codec_context.thread_count = 1
    with suppress(av.error.FFmpegError):
        container.seek(0)
        for frame in islice(container.decode(stream), 1):
            return _matrix_of(frame)
    return None


def _has_matrix(data: bytes) -> bool:
    """Whether an MP4 or MOV asks players to turn or mirror a track: ISO 14496-12, 8.3.2."""
    place = data.find(b"tkhd")
    while place >= 0:
        longer = 12 if data[place + 4 : place + 5] == b"\1" else 0  # times of 64 bits
        matrix = data[place + longer + 44 : place + longer + 64]
        if len(matrix) == 20 and struct.unpack(">5i", matrix) != UPRIGHT:
            return True
        place = data.find(b"tkhd", place + 1)
    return False


def _matrix_of(frame: av.VideoFrame) -> Sequence[int] | None:
    try:
        found = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # of other side data, of a kind that PyAV does not know
        return None
    return None if found is None else struct.unpack("<9i", bytes(found))


def _decodable(packets: list[Any], codec: str) -> list[Any]:
    """From the first key frame on, where nothing before it can be shown."""
    if codec not in ("h264", "hevc"):
        return packets
    first = next((i for i, packet in enumerate(packets) if packet.is_keyframe), 0)
    return packets[first:]


def _shown_packets(packets: list[Any], codec: str) -> list[Any]:
    """Those that become a frame: not cut off by an edit list, not a hidden reference of VP8."""
    shown = [packet for packet in packets if not packet.is_discard]
    if codec in ("vp8", "libvpx"):
        return [packet for packet in shown if bytes(packet)[0] & 0x10]
    return shown


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
        contiguous = following is not None and following[0] == index + 1
        if not (contiguous and count == len(groups[index])):
            yield run
            run = []
