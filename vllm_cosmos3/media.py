"""Pictures and clips in and out: what users send becomes uint8 RGB arrays, and those become files.

Out: MP4 with H.264 and AAC, PNG, JPEG, WebP. In: everything that Pillow and FFmpeg read from the
formats listed below, upright, without transparency, with a limit on its size; anything else is an
InvalidRequest of the field it came from. Nothing here knows of tensors or models, and no file is
ever opened by name from inside another file.

Shape suffixes: T frames, H height, W width, C channels (RGB), 2 stereo channels, N samples.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import IO, Literal

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from vllm_cosmos3.compat import any_titles
from vllm_cosmos3.errors import InvalidRequest, Unsupported

Pixels = NDArray[np.uint8]  # [H, W, 3] or [T, H, W, 3]
ImageSource = str | Path | bytes | Image.Image | Pixels
VideoSource = str | Path | bytes | Pixels | Sequence[ImageSource]

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
# FFmpeg's names. A list, since some of its formats (playlists) open further files and URLs.
VIDEO_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpegts"
AN_IMAGE = "a complete PNG, JPEG, WebP, GIF, BMP or TIFF image"
A_VIDEO = "a complete MP4, MOV, WebM, MKV, AVI, GIF or MPEG-TS video"

MAX_PIXELS = 2**26  # of one picture. Larger ones are taken for decompression bombs
MAX_RATIO = (
    20  # of the longer to the shorter side: covering a canvas enlarges a thin line without end
)
MAX_FRAMES = 18_000  # that are decoded to find the last ones: ten minutes at 30 frames a second
WAITING_CHUNKS = 4  # of frames between the one who makes them and the encoder

# What decoders raise on damaged input. Warnings count where a process turns them into errors.
DAMAGED = (
    av.FFmpegError,
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    OverflowError,
    struct.error,
    zlib.error,
    EOFError,
    Warning,
)


def read_image(source: ImageSource, *, field: str = "image") -> Pixels:
    """One picture, uint8 [H, W, 3]: a path, encoded bytes, a Pillow image or a uint8 array.

    Upright by its EXIF orientation, transparency laid over white, 16 bits rounded to 8, the first
    picture of an animation. InvalidRequest of ``field`` if it is damaged, too large or too thin.
    """
    if isinstance(source, np.ndarray):
        return _checked_array(source, 3, field)
    with _decoding(source, field, AN_IMAGE):
        if isinstance(source, Image.Image):
            return _rgb(source, field)
        with _opened(source) as file, Image.open(file, formats=IMAGE_FORMATS) as image:
            return _rgb(image, field)


def read_video(
    source: VideoSource,
    *,
    frames: int,
    keep: Literal["first", "last"] = "first",
    field: str = "video",
) -> Pixels:
    """The first or last ``frames`` of a clip, or all of a shorter one: uint8 [T, H, W, 3].

    ``source`` is a path, encoded bytes, a uint8 array or a sequence of pictures.
    The stored frames, whatever their timing, upright by the display matrix.
    InvalidRequest of ``field`` if it is damaged, empty, too large or too long.
    """
    if isinstance(source, np.ndarray):
        clip = list(_checked_array(source, 4, field))
    elif isinstance(source, str | Path | bytes):
        clip = _decoded(source, frames, keep, field)
    else:
        clip = [read_image(image, field=field) for image in source]
    if not clip:
        raise InvalidRequest(field, _described(source), "a video with at least one frame")
    if len({frame.shape for frame in clip}) > 1:
        raise InvalidRequest(field, _described(source), "frames of one size")
    return np.stack(clip[:frames] if keep == "first" else clip[-frames:])


def frames_of(source: VideoSource, *, limit: int, field: str = "video") -> Iterator[Pixels]:
    """The first ``limit`` frames of a clip one after the other, so that a long one fits in memory.

    As `read_video`, but that frames may differ in size; errors come with the frame that has them.
    """
    empty = True
    for frame in islice(_each(source, field), limit):
        empty = False
        yield frame
    if empty:
        raise InvalidRequest(field, _described(source), "a video with at least one frame")


def _each(source: VideoSource, field: str) -> Iterator[Pixels]:
    if isinstance(source, np.ndarray):
        yield from _checked_array(source, 4, field)
    elif isinstance(source, str | Path | bytes):
        with _decoding(source, field, A_VIDEO), _stored_frames(source, field) as frames:
            for frame in frames:
                yield _upright(frame)
    else:
        for image in source:
            yield read_image(image, field=field)


def rate_of(source: VideoSource, *, field: str = "video") -> float | None:
    """Frames per second that an encoded clip states; None for arrays and pictures."""
    if not isinstance(source, str | Path | bytes):
        return None
    options = {"format_whitelist": VIDEO_FORMATS}
    with (
        _decoding(source, field, A_VIDEO),
        _opened(source) as file,
        av.open(file, options=options, **any_titles()) as container,
    ):
        rates = [stream.average_rate for stream in container.streams.video]
    return float(rates[0]) if rates and rates[0] else None


def cover_crop(frames: Pixels, *, height: int, width: int) -> Pixels:
    """Frames enlarged or reduced until they just cover ``height`` x ``width``, the middle cut out.

    Bilinear with antialiasing and rounded to whole levels, as the model's own pipelines prepare
    pictures.
    """
    import torch  # here, so that a request can be checked without it
    import torch.nn.functional as F

    scale = max(width / frames.shape[2], height / frames.shape[1])
    size = [math.ceil(scale * side) for side in frames.shape[1:3]]
    top, left = round((size[0] - height) / 2), round((size[1] - width) / 2)
    out = np.empty((len(frames), height, width, 3), np.uint8)
    for frame, target in zip(frames, out, strict=True):
        x = torch.from_numpy(np.ascontiguousarray(frame)).movedim(2, 0)[None].float()
        x = F.interpolate(x, size=size, mode="bilinear", antialias=True)
        x = x[0, :, top : top + height, left : left + width].round().clamp(0, 255)
        target[:] = x.movedim(0, 2).numpy()
    return out


def fit_inside(frames: Pixels, *, height: int, width: int) -> tuple[Pixels, tuple[int, int]]:
    """Frames at the top left of a canvas ``height`` x ``width``, and their own height and width there.

    They are reduced to fit, bicubically with antialiasing and rounded to whole levels, but never
    enlarged. The rest mirrors them, or repeats their last row and column where it is larger than
    they are.
    """
    import torch
    import torch.nn.functional as F

    scale = min(width / frames.shape[2], height / frames.shape[1], 1.0)
    rows, columns = (max(1, int(scale * side + 0.5)) for side in frames.shape[1:3])
    down, right = height - rows, width - columns
    mode: Literal["edge", "reflect"] = "edge" if down >= rows or right >= columns else "reflect"
    out = np.empty((len(frames), height, width, 3), np.uint8)
    for frame, target in zip(frames, out, strict=True):
        if (rows, columns) != frame.shape[:2]:
            x = torch.from_numpy(np.ascontiguousarray(frame)).movedim(2, 0)[None].float()
            x = F.interpolate(x, size=(rows, columns), mode="bicubic", antialias=True)
            frame = x[0].round().clamp(0, 255).movedim(0, 2).numpy().astype(np.uint8)  # noqa: PLW2901
        target[:] = np.pad(frame, ((0, down), (0, right), (0, 0)), mode)
    return out, (rows, columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """An MP4 to be written while its frames are still being made. ``crf`` as for `VideoWriter`."""

    path: Path
    crf: int = 18


class VideoWriter:
    """An MP4 that grows while its frames are still being made.

    ``with VideoWriter(path, fps=24) as video: video.write(frames)``. Encoding happens on a thread,
    so that `write` returns at once until a few chunks wait. H.264 in yuv420p with BT.709 colours,
    AAC at 256 kbit/s. Leaving with an exception deletes the file.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        fps: float,
        sound: NDArray[np.float32] | None = None,
        sample_rate: int = 48_000,
        crf: int = 18,
    ) -> None:
        """``sound`` [2, N] in [-1, 1] is needed from the beginning, since an MP4 is interleaved.

        ``crf`` is the quality of x264, 0 (lossless) to 51; ``fps`` may be fractional.
        """
        self._path, self._fps, self._crf = Path(path), frame_rate(fps), crf
        self._sound, self._sample_rate = sound, sample_rate
        self._frames = 0
        self._pending: deque[Future[None]] = deque()
        try:
            av.Codec("libx264", "w")
        except av.codec.codec.UnknownCodecError:
            raise Unsupported(
                "this PyAV was built without libx264 and cannot write H.264"
            ) from None
        self._container = av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"})
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mp4")

    def __enter__(self) -> VideoWriter:
        return self

    def write(self, frames: Pixels) -> None:
        """Append uint8 frames. They must not change afterwards. Odd sizes gain a row or column.

        That is a copy of the last one, as yuv420p has a colour for two by two pixels.
        """
        self._pending.append(self._thread.submit(self._encode, frames))
        while len(self._pending) > WAITING_CHUNKS:
            self._pending.popleft().result()

    def close(self) -> None:
        """Encode what waits and finish the file. Raises what the encoder raised."""
        try:
            while self._pending:
                self._pending.popleft().result()
            if self._frames:
                self._container.mux(self._video.encode(None))
        finally:
            self._thread.shutdown(cancel_futures=True)
            self._container.close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._pending.clear()
            self._thread.shutdown(cancel_futures=True)
        whole = False
        try:
            self.close()
            whole = kind is None
        finally:
            if not whole:
                self._path.unlink(missing_ok=True)

    def _encode(self, frames: Pixels) -> None:
        height, width = frames.shape[1:3]
        even = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), "edge")
        if not self._frames:
            self._start(*even.shape[1:3])
        for pixels in even:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
            frame.pts, frame.time_base = self._frames, 1 / self._fps
            self._container.mux(self._video.encode(frame))
            self._frames += 1

    def _start(self, height: int, width: int) -> None:
        """Declare both streams, then hand over all sound: the muxer puts it between the frames."""
        self._video = self._container.add_stream("libx264", rate=self._fps)
        self._video.height, self._video.width, self._video.pix_fmt = height, width, "yuv420p"
        self._video.options = {"crf": str(self._crf)}
        coder = self._video.codec_context
        coder.color_primaries = coder.color_trc = coder.colorspace = 1  # BT.709
        coder.color_range = 1  # 16 to 235
        if self._sound is None:
            return
        audio = self._container.add_stream("aac", rate=self._sample_rate, layout="stereo")
        audio.bit_rate = 256_000
        samples = np.ascontiguousarray(self._sound, np.float32)
        # One frame from time zero: the delay of the encoder goes into the edit list.
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="stereo")
        frame.sample_rate, frame.pts = self._sample_rate, 0
        frame.time_base = Fraction(1, self._sample_rate)
        self._container.mux(audio.encode(frame))
        self._container.mux(audio.encode(None))


def write_video(
    path: str | Path,
    frames: Pixels,
    *,
    fps: float,
    sound: NDArray[np.float32] | None = None,
    sample_rate: int = 48_000,
    crf: int = 18,
) -> None:
    """A whole clip at once; see `VideoWriter`."""
    with VideoWriter(path, fps=fps, sound=sound, sample_rate=sample_rate, crf=crf) as video:
        video.write(frames)


def join_videos(first: str | Path, second: str | Path, path: str | Path, *, fps: float) -> int:
    """One clip after the other in a new MP4, and how many frames it has. Nothing is encoded again.

    Both are of `VideoWriter`, with the same size, ``fps`` and quality. The sound is that of the first.

    Raises:
        Unsupported: they were encoded differently.
    """
    options = {"movflags": "+faststart"}
    with (
        av.open(str(first)) as before,
        av.open(str(second)) as after,
        av.open(str(path), "w", format="mp4", options=options) as joined,
    ):
        start, rest = before.streams.video[0], after.streams.video[0]
        if start.codec_context.extradata != rest.codec_context.extradata:
            raise Unsupported("the clips cannot be joined: they were encoded differently")
        places = {stream: joined.add_stream_from_template(stream) for stream in before.streams}
        frames = 0
        for packet in before.demux():
            if packet.dts is not None:  # else it is the end of a stream
                frames += packet.stream is start
                packet.stream = places[packet.stream]
                joined.mux(packet)
        offset = round(frames / frame_rate(fps) / rest.time_base)
        for packet in after.demux(rest):
            if packet.dts is not None:
                frames += 1
                packet.pts += offset
                packet.dts += offset
                packet.stream = places[start]
                joined.mux(packet)
    return frames


def frame_rate(fps: float) -> Fraction:
    """The rate that ``fps`` is written for: 23.976 means 24000/1001, and 29.97 30000/1001."""
    ntsc = Fraction(round(fps * 1.001) * 1000, 1001)
    if not float(fps).is_integer() and abs(ntsc - Fraction(fps)) < Fraction(1, 2000):
        return ntsc
    return Fraction(fps).limit_denominator(10_000)


def encode_image(
    image: Pixels, kind: Literal["png", "jpeg", "webp"], *, quality: int = 95
) -> bytes:
    """A picture as a file. ``quality`` 0 to 100 is for JPEG and WebP; PNG loses nothing."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, quality=quality)
    return file.getvalue()


def write_image(path: str | Path, image: Pixels, *, quality: int = 95) -> None:
    """A picture in the format that the name ends with: .png, .jpg, .jpeg or .webp."""
    kinds: dict[str, Literal["png", "jpeg", "webp"]] = {
        ".png": "png",
        ".jpg": "jpeg",
        ".jpeg": "jpeg",
        ".webp": "webp",
    }
    kind = kinds.get(Path(path).suffix.lower())
    if kind is None:
        raise InvalidRequest("path", str(path), f"a name that ends in {', '.join(kinds)}")
    Path(path).write_bytes(encode_image(image, kind, quality=quality))


def thumbnail(image: Pixels, *, side: int = 320) -> bytes:
    """A WebP whose longer side is at most ``side``."""
    small = Image.fromarray(image)
    small.thumbnail((side, side))
    return encode_image(np.array(small), "webp", quality=80)


def _rgb(image: Image.Image, field: str) -> Pixels:
    _check_size(image.width, image.height, field)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip at 255
        levels = np.asarray(image).astype(np.float64) / 257
        return np.repeat(levels.round().clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("no range is known for floating point levels")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return np.array(image.convert("RGB"))


def _decoded(source: str | Path | bytes, count: int, keep: str, field: str) -> list[Pixels]:
    """The first or last ``count`` frames of an encoded video, or all of a shorter one."""
    kept: deque[av.VideoFrame] = deque(maxlen=count)
    with _decoding(source, field, A_VIDEO), _stored_frames(source, field) as frames:
        for frame in frames:
            kept.append(frame)
            if keep == "first" and len(kept) == count:
                break
        return [_upright(frame) for frame in kept]


@contextmanager
def _stored_frames(source: str | Path | bytes, field: str) -> Iterator[Iterator[av.VideoFrame]]:
    """The frames of an encoded video, decoded as they are asked for."""
    options = {"format_whitelist": VIDEO_FORMATS}
    with _opened(source) as file, av.open(file, options=options, **any_titles()) as container:
        if not container.streams.video:
            possible = "a file with a video track"
            raise InvalidRequest(field, _described(source), possible, "invalid_media")
        yield _intact(container, field)


def _intact(container: av.container.InputContainer, field: str) -> Iterator[av.VideoFrame]:
    seen = 0
    for packet in container.demux(video=0):
        if packet.is_corrupt:
            raise ValueError("a packet is cut short")
        for frame in packet.decode():
            _check_size(frame.width, frame.height, field)
            seen += 1
            if seen > MAX_FRAMES:
                raise InvalidRequest(field, f"{seen} frames long", f"at most {MAX_FRAMES}")
            yield frame


def _upright(frame: av.VideoFrame) -> Pixels:
    """RGB, turned as the display matrix says: ``rotation`` is in degrees counterclockwise."""
    pixels: Pixels = frame.to_ndarray(format="rgb24")
    return np.rot90(pixels, round(frame.rotation / 90))


@contextmanager
def _decoding(source: object, field: str, possible: str) -> Iterator[None]:
    """Whatever a decoder says of damaged input, in one sentence."""
    try:
        yield
    except InvalidRequest:
        raise
    except FileNotFoundError:
        raise InvalidRequest(
            field, _described(source), "a file that exists", "invalid_media"
        ) from None
    except Image.DecompressionBombError:
        raise InvalidRequest(
            field, _described(source), f"at most {MAX_PIXELS} pixels", "payload_too_large"
        ) from None
    except DAMAGED as error:
        raise InvalidRequest(
            field, _described(source), f"{possible} ({_reason(error, source)})", "invalid_media"
        ) from error


def _reason(error: BaseException, source: object) -> str:
    """What a decoder says, without the name of the file: a server's is not for its users."""
    if isinstance(error, UnidentifiedImageError):
        return "it is of no such format"
    text = getattr(error, "strerror", None) or str(error)
    return text.replace(repr(str(source)), "it")


def _opened(source: object) -> IO[bytes]:
    """By us and never by a library, which might take the name for a URL."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if isinstance(source, str | Path):
        return open(source, "rb")
    raise TypeError(f"{type(source).__name__} is neither a path nor bytes")


def _check_size(width: int, height: int, field: str) -> None:
    if width * height > MAX_PIXELS:
        raise InvalidRequest(
            field, f"{width}x{height}", f"at most {MAX_PIXELS} pixels", "payload_too_large"
        )
    if max(width, height) > MAX_RATIO * min(width, height):
        raise InvalidRequest(
            field, f"{width}x{height}", f"at most {MAX_RATIO} times as long as wide"
        )


def _checked_array(array: Pixels, dims: int, field: str) -> Pixels:
    if array.dtype != np.uint8 or array.ndim != dims or array.shape[-1] != 3 or not array.size:
        shape = "[T, H, W, 3]" if dims == 4 else "[H, W, 3]"
        given = f"{array.dtype} {list(array.shape)}"
        raise InvalidRequest(field, given, f"a uint8 array {shape}")
    _check_size(array.shape[-2], array.shape[-3], field)
    return array


def _described(source: object) -> str:
    if isinstance(source, str | Path):
        return str(source)
    if isinstance(source, bytes):
        return f"{len(source)} bytes"
    return type(source).__name__
