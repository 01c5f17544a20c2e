"""Pictures and clips in and out: what users send becomes uint8 RGB arrays, and those become files.

Sound comes in as the track of a file and goes out as that of a clip.

Out: MP4 with H.264 and AAC, WebM with VP9 and Opus, PNG, JPEG, WebP, under a temporary name until
they are whole. In: everything that Pillow and FFmpeg read from the formats listed below, upright,
without transparency, with a limit on its size; anything else is an InvalidRequest of the field it came
from. Whoever reads reserves the decoded bytes of a `Lease` first. Nothing here knows of models, and no
file is ever opened by name from inside another file.

Shape suffixes: T frames, H height, W width, C channels (RGB), 2 stereo channels, N samples.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Protocol, cast

import av
import numpy as np
import pillow_heif
from av.sidedata.sidedata import Type as SideData
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from vllm_cosmos3.compat import any_titles
from vllm_cosmos3.errors import InvalidRequest, Unsupported
from vllm_cosmos3.files import replacing
from vllm_cosmos3.media_budget import Lease, media_budget


class Tensor(Protocol):
    """A tensor of torch, which is not imported here."""

    def detach(self) -> Any: ...
    def __len__(self) -> int: ...


Pixels = NDArray[np.uint8]  # [H, W, 3] or [T, H, W, 3]
# Arrays and tensors are uint8, or floats from 0 to 1, with their three channels last or before H, W.
Levels = NDArray[np.uint8] | NDArray[np.floating[Any]] | Tensor
Encoded = str | Path | bytes | Image.Image
ImageSource = Encoded | Levels
VideoSource = str | Path | bytes | Levels | Sequence[ImageSource]
SoundSource = str | Path | bytes

pillow_heif.register_heif_opener()  # FFmpeg reads no more of a phone's HEIC than its tiles
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "HEIF", "GIF", "BMP", "TIFF")
# FFmpeg's names. A list, since some of its formats (playlists) open further files and URLs.
VIDEO_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpegts"
AN_IMAGE = "a complete PNG, JPEG, WebP, AVIF, HEIC, GIF, BMP or TIFF image"
A_VIDEO = "a complete MP4, MOV, WebM, MKV, AVI, GIF or MPEG-TS video"
SOUND_FORMATS = f"{VIDEO_FORMATS},wav,mp3,flac,ogg,aac"
A_SOUND = "a complete WAV, MP3, FLAC, OGG, AAC or M4A file, or a video with sound"

HEIF_BRANDS = tuple(b"heic heix heim heis hevc hevx mif1 msf1 avif avis".split())
HEIF = "it begins as a HEIC or AVIF picture, and cannot be read"
MAX_PIXELS = 2**26  # of one picture. Larger ones are taken for decompression bombs
# Of the longer to the shorter side: covering a canvas enlarges a thin line without end.
MAX_RATIO = 20
MAX_FRAMES = 18_000  # that are decoded to find the last ones: ten minutes at 30 frames a second
WAITING_CHUNKS = 4  # of frames between the one who makes them and the encoder
STRIP = 256  # rows of a picture that are converted at once
# Bytes for each pixel while it is decoded and resized. Of a picture: four in Pillow, four while it is
# turned, three in the array. Of a clip: up to 16 pictures that a decoder refers to, each of 1.5
# bytes, one in RGB, the array.
PICTURE_BYTES, CLIP_BYTES = 12, 32

# What decoders raise on damaged input. Warnings count where a process turns them into errors.
DAMAGED = (
    av.FFmpegError,
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    RuntimeError,
    OverflowError,
    struct.error,
    zlib.error,
    EOFError,
    Warning,
)


def is_clip(source: str | Path | bytes, *, field: str) -> bool:
    """Whether an encoded file is a clip: what FFmpeg reads, and of pictures only a GIF that moves.

    Others with several pictures are read as their first one: previews of cameras (MPO), animated
    WebP and PNG, pages of TIFF.

    Raises:
        InvalidRequest: it is neither a picture nor a clip.
    """
    try:
        with _opened(source) as file, Image.open(file, formats=IMAGE_FORMATS) as image:
            return image.format == "GIF" and _moves(image)
    except Image.DecompressionBombError:
        return False  # which `read_image` refuses with the limit
    except DAMAGED as error:
        try:
            next(frames_of(source, limit=1, field=field))
        except InvalidRequest as refused:
            if refused.code != "invalid_media" or _is_heif(source):
                raise
            unknown = isinstance(error, UnidentifiedImageError)
            reason = "it is of no such format, or damaged" if unknown else _reason(error, source)
            possible = f"{AN_IMAGE} or {A_VIDEO} ({reason})"
            raise InvalidRequest(field, refused.value, possible, refused.code) from None
        return True


def _moves(image: Image.Image) -> bool:
    """Whether there is a second frame. Counting all takes as long as there are many."""
    try:
        image.seek(1)
    except EOFError:
        return False
    return True


def read_image(source: ImageSource, *, field: str = "image") -> Pixels:
    """One picture, uint8 [H, W, 3]: a path, encoded bytes, a Pillow image, an array or a tensor.

    Upright by its EXIF orientation, transparency laid over white, 16 bits rounded to 8, the first
    picture of an animation. InvalidRequest of ``field`` if it is damaged, too large or too thin.
    """
    return next(frames_of([source], limit=1, field=field))


def read_video(
    source: VideoSource,
    *,
    frames: int,
    keep: Literal["first", "last"] = "first",
    field: str = "video",
) -> Pixels:
    """The first or last ``frames`` of a clip, or all of a shorter one: uint8 [T, H, W, 3].

    As `frames_of`, whose frames have one size here.
    """
    with media_budget().lease() as lease:
        clip: list[Pixels] = []
        for frame in frames_of(source, limit=frames, keep=keep, field=field, lease=lease):
            lease.reserve(2 * frame.nbytes, field)  # here and in the array
            clip.append(frame)
        if len({frame.shape for frame in clip}) > 1:
            raise InvalidRequest(field, _described(source), "frames of one size")
        return np.stack(clip)


def frames_of(
    source: VideoSource,
    *,
    limit: int,
    keep: Literal["first", "last"] = "first",
    field: str = "video",
    lease: Lease | None = None,
) -> Iterator[Pixels]:
    """The first or last ``limit`` frames of a clip one after the other, uint8 [H, W, 3].

    ``source`` is a path, encoded bytes, an array, a tensor or a sequence of pictures. The stored frames,
    whatever their timing, upright by the display matrix; they may differ in size. What a frame takes
    while it is decoded and resized is reserved of ``lease`` until the next one is asked for.

    Raises:
        InvalidRequest: of ``field``, with the frame that is damaged, too large or too thin, or as
            the clip is empty or too long.
        Busy: other requests hold the memory that it needs.
    """
    with media_budget().lease() if lease is None else nullcontext(lease) as held:
        skipped = max(0, _length(source, field, held) - limit) if keep == "last" else 0
        empty = True
        for frame in islice(_each(source, field, held, skipped), limit):
            empty = False
            yield frame
        if empty:
            raise InvalidRequest(field, _described(source), "a video with at least one frame")


def _length(source: VideoSource, field: str, lease: Lease) -> int:
    """Frames of a clip, of which none is kept."""
    if not isinstance(source, str | Path | bytes):
        return len(source)
    with _decoding(source, field, A_VIDEO), _stored_frames(source, field, lease) as frames:
        return sum(1 for _ in frames)


def _each(source: VideoSource, field: str, lease: Lease, skipped: int) -> Iterator[Pixels]:
    """The frames of a clip after the first ``skipped``."""
    if isinstance(source, str | Path | bytes):
        with _decoding(source, field, A_VIDEO), _stored_frames(source, field, lease) as frames:
            matrix = None
            for frame in islice(frames, skipped, None):
                matrix = matrix or _display_matrix(frame)
                yield _upright(frame, matrix)
    elif (array := _as_array(source)) is not None:
        yield from map(_as_uint8, _checked_array(array, 4, field)[skipped:])
    else:
        for image in cast("Sequence[ImageSource]", source)[skipped:]:
            with _picture(image, field, lease) as pixels:
                yield pixels


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


def read_sound(
    source: SoundSource, *, samples: int, rate: int, field: str, lease: Lease
) -> NDArray[np.float32]:
    """The sound of a file, float32 [2, samples] in [-1, 1] at ``rate``: of a sound file or a clip.

    One channel is heard on both sides, more than two are mixed down; the end is cut off or filled up
    with silence. In a clip it begins where the frames do.

    Raises:
        InvalidRequest: of ``field``, as the file is damaged or has no sound.
        Busy: other requests hold the memory that it needs.
    """
    lease.reserve(2 * 4 * samples, field)
    sound = np.zeros((2, samples), np.float32)
    options = {"format_whitelist": SOUND_FORMATS}
    with (
        _decoding(source, field, A_SOUND),
        _opened(source) as file,
        av.open(file, options=options, **any_titles()) as container,
    ):
        if not container.streams.audio or container.streams.audio[0].codec_context is None:
            possible = "a file with a sound track that can be decoded"
            raise InvalidRequest(field, _described(source), possible, "invalid_media")
        at = _delay(container, rate)
        for part in _resampled(container, rate):
            begin, end = max(at, 0), min(at + part.shape[1], samples)
            if begin < end:
                sound[:, begin:end] = part[:, begin - at : end - at]
            at += part.shape[1]
            if at >= samples:
                break
    return np.nan_to_num(sound, copy=False).clip(-1, 1, out=sound)


def _delay(container: av.container.InputContainer, rate: int) -> int:
    """Samples by which the sound begins after the frames, less than 0 where it begins before them."""
    streams = (container.streams.audio[0], *container.streams.video[:1])
    starts = [(each.start_time or 0) * (each.time_base or 0) for each in streams]
    return round((starts[0] - starts[1]) * rate) if len(starts) > 1 else 0


def _resampled(
    container: av.container.InputContainer, rate: int
) -> Iterator[NDArray[np.floating[Any]]]:
    """The sound track, float [1 or 2, N] at ``rate``, frame by frame."""
    channels = container.streams.audio[0].codec_context.channels
    layout = "mono" if channels == 1 else "stereo"
    resampler = av.AudioResampler(format="fltp", layout=layout, rate=rate)
    for frame in chain(container.decode(audio=0), [None]):  # which empties it
        for part in resampler.resample(frame):
            yield part.to_ndarray()


def cover_crop(frames: Pixels, *, height: int, width: int) -> Pixels:
    """Frames enlarged or reduced until they just cover ``height`` x ``width``, the middle cut out.

    Bilinear with antialiasing and rounded to whole levels, as the model's own pipelines prepare
    pictures.
    """
    scale = max(width / frames.shape[2], height / frames.shape[1])
    size = [math.ceil(scale * side) for side in frames.shape[1:3]]
    top, left = round((size[0] - height) / 2), round((size[1] - width) / 2)
    if tuple(size) == frames.shape[1:3]:  # no level would change
        return frames[:, top : top + height, left : left + width].copy()
    out = np.empty((len(frames), height, width, 3), np.uint8)
    for frame, target in zip(frames, out, strict=True):
        for channel, resized in enumerate(_resized(frame, size, "bilinear")):
            target[..., channel] = resized[top : top + height, left : left + width]
    return out


def fit_inside(frames: Pixels, *, height: int, width: int) -> tuple[Pixels, tuple[int, int]]:
    """Frames at the top left of a canvas ``height`` x ``width``, and their own height and width there.

    They are reduced to fit, bicubically with antialiasing and rounded to whole levels, but never
    enlarged. The rest mirrors them, or repeats their last row and column where it is larger than
    they are.
    """
    scale = min(width / frames.shape[2], height / frames.shape[1], 1.0)
    rows, columns = (max(1, int(scale * side + 0.5)) for side in frames.shape[1:3])
    down, right = height - rows, width - columns
    mode: Literal["edge", "reflect"] = "edge" if down >= rows or right >= columns else "reflect"
    out = np.empty((len(frames), height, width, 3), np.uint8)
    for frame, target in zip(frames, out, strict=True):
        if (rows, columns) != frame.shape[:2]:
            frame = np.stack([*_resized(frame, (rows, columns), "bicubic")], axis=2)  # noqa: PLW2901
        target[:] = np.pad(frame, ((0, down), (0, right), (0, 0)), mode)
    return out, (rows, columns)


def _resized(frame: Pixels, size: Sequence[int], mode: str) -> Iterator[Pixels]:
    """The three channels of a frame at another height and width, uint8, one after the other.

    With antialiasing, in float32, which would take twelve bytes for each pixel of a whole frame: rows
    are resized in strips, then columns. Torch takes the axes in this order too, so no bit differs.
    """
    import torch  # here, so that a request can be checked without it
    import torch.nn.functional as F

    def resize(x: torch.Tensor, height: int) -> torch.Tensor:
        return F.interpolate(x, size=(height, size[1]), mode=mode, antialias=True)

    for channel in range(3):
        strips = []
        for top in range(0, len(frame), STRIP):
            strip = np.ascontiguousarray(frame[top : top + STRIP, :, channel])
            strips.append(resize(torch.from_numpy(strip)[None, None].float(), len(strip)))
        x = resize(torch.cat(strips, dim=2), size[0])[0, 0]
        yield x.round_().clamp_(0, 255).numpy().astype(np.uint8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """An MP4 or WebM to be written while its frames are still being made. ``crf`` as for `VideoWriter`."""

    path: Path
    crf: int = 18


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """A kind of file, the encoders of its two tracks, and what the first of them is told."""

    format: str
    video: str
    audio: str
    options: Mapping[str, str]
    muxer: Mapping[str, str]


MP4 = Container(
    format="mp4", video="libx264", audio="aac", options={}, muxer={"movflags": "+faststart"}
)
# No bit rate: the quality alone counts. Slower settings gain little at these sizes.
WEBM = Container(
    format="webm", video="libvpx-vp9", audio="libopus",
    options={"b": "0", "row-mt": "1", "cpu-used": "4"}, muxer={},
)  # fmt: skip


class VideoWriter:
    """An MP4, or a WebM by its name, that grows while its frames are still being made.

    ``with VideoWriter(path, fps=24) as video: video.write(frames)``. Encoding happens on a thread,
    so that `write` returns at once until a few chunks wait. H.264 or VP9 in yuv420p with BT.709
    colours, AAC or Opus at 256 kbit/s. The file has a temporary name beside ``path`` until it is whole;
    leaving with an exception deletes it, and what was there before stays.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        fps: float,
        sound: NDArray[np.float32] | None = None,
        sample_rate: int = 48_000,
        crf: int = 18,
        b_frames: bool = False,
    ) -> None:
        """``sound`` [2, N] in [-1, 1] is needed from the beginning, since an MP4 is interleaved.

        ``crf`` is the quality of the encoder, 0 (lossless in H.264) to 51; ``fps`` may be
        fractional. ``b_frames`` are for clips that are joined to one that has them: with them x264
        makes other files of equal frames more often. It reads memory that it has not set.
        """
        self._fps = frame_rate(fps)
        self._kind = WEBM if Path(path).suffix.lower() == ".webm" else MP4
        plain = {} if b_frames or self._kind is WEBM else {"bf": "0"}
        self._options = {"crf": str(crf), **plain, **self._kind.options}
        self._sound, self._sample_rate = sound, sample_rate
        self._frames = 0
        self._pending: deque[Future[None]] = deque()
        try:
            av.Codec(self._kind.video, "w")
        except av.codec.codec.UnknownCodecError:
            raise Unsupported(
                f"this PyAV was built without {self._kind.video} and cannot write {self._kind.format}"
            ) from None
        with ExitStack() as stack:
            part = stack.enter_context(replacing(path))
            self._container = _new_file(part, self._kind)
            self._file = stack.pop_all()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encoder")

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
        with self._file:
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
        if kind is None:
            self.close()
            return
        self._thread.shutdown(cancel_futures=True)
        with suppress(av.FFmpegError, OSError):
            self._container.close()
        self._file.__exit__(kind, error, trace)

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
        self._video = self._container.add_stream(self._kind.video, rate=self._fps)
        self._video.height, self._video.width, self._video.pix_fmt = height, width, "yuv420p"
        self._video.options = self._options
        coder = self._video.codec_context
        coder.color_primaries = coder.color_trc = coder.colorspace = 1  # BT.709
        coder.color_range = 1  # 16 to 235
        if self._sound is None:
            return
        audio = self._container.add_stream(
            self._kind.audio, rate=self._sample_rate, layout="stereo"
        )
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
    b_frames: bool = False,
) -> None:
    """A whole clip at once; see `VideoWriter`."""
    with VideoWriter(
        path, fps=fps, sound=sound, sample_rate=sample_rate, crf=crf, b_frames=b_frames
    ) as video:
        video.write(frames)


def has_b_frames(path: str | Path) -> bool:
    """Whether frames of a clip refer to later ones, as in those of earlier versions."""
    with av.open(f"file:{path}") as container:
        return bool(container.streams.video[0].codec_context.has_b_frames)


def join_videos(first: str | Path, second: str | Path, path: str | Path, *, fps: float) -> int:
    """One clip after the other in a new MP4, and how many frames it has. Nothing is encoded again.

    Both are of `VideoWriter`, with the same size, ``fps`` and quality. The sound is that of the first.

    Raises:
        Unsupported: they were encoded differently.
    """
    with (
        replacing(path) as part,
        av.open(f"file:{first}") as before,
        av.open(f"file:{second}") as after,
        _new_file(part, MP4) as joined,
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


def _new_file(path: Path, kind: Container) -> av.container.OutputContainer:
    """An empty file. FFmpeg would take a name with a colon for a URL."""
    return av.open(f"file:{path}", "w", format=kind.format, options=dict(kind.muxer))


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
    with replacing(path) as part:
        part.write_bytes(encode_image(image, kind, quality=quality))


def thumbnail(image: Pixels, *, side: int = 320) -> bytes:
    """A WebP whose longer side is at most ``side``."""
    small = Image.fromarray(image)
    small.thumbnail((side, side))
    return encode_image(np.array(small), "webp", quality=80)


@contextmanager
def _picture(source: ImageSource, field: str, lease: Lease) -> Iterator[Pixels]:
    """One picture, whose bytes stay reserved for as long as it is looked at."""
    if (array := _as_array(source)) is not None:
        yield _as_uint8(_checked_array(array, 3, field))
        return
    with ExitStack() as reserved:
        with _decoding(source, field, AN_IMAGE), _image(cast("Encoded", source)) as image:
            _check_size(image.width, image.height, field)
            size = image.width * image.height * PICTURE_BYTES
            reserved.enter_context(lease.during(size, field))
            described = image.size
            image.load()
            if image.size != described:  # as HEIC has it, whose picture has a size of its own
                raise ValueError(f"it is {image.width}x{image.height} and says otherwise")
            pixels = _rgb(image)
        yield pixels


@contextmanager
def _image(source: Encoded) -> Iterator[Image.Image]:
    if isinstance(source, Image.Image):
        yield source
        return
    with _opened(source) as file, Image.open(file, formats=IMAGE_FORMATS) as image:
        yield image


def _rgb(image: Image.Image) -> Pixels:
    """A picture as an array, strip by strip: Pillow's copies take four bytes for each pixel."""
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, STRIP):
        strip = image.crop((0, top, image.width, min(top + STRIP, image.height)))
        pixels[top : top + STRIP] = _levels(strip)
    return pixels


def _levels(image: Image.Image) -> NDArray[np.uint8]:
    """Levels [H, W, 3] or [H, W, 1] of an upright picture."""
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip at 255
        levels = np.asarray(image).astype(np.float64) / 257
        return levels.round().clip(0, 255).astype(np.uint8)[..., None]
    if image.mode == "F":
        raise ValueError("no range is known for floating point levels")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return np.asarray(image.convert("RGB"))


@contextmanager
def _stored_frames(
    source: str | Path | bytes, field: str, lease: Lease
) -> Iterator[Iterator[av.VideoFrame]]:
    """The frames of an encoded video, decoded as they are asked for."""
    if _is_heif(source):  # FFmpeg would read its tiles
        raise InvalidRequest(field, _described(source), f"{AN_IMAGE} ({HEIF})", "invalid_media")
    options = {"format_whitelist": VIDEO_FORMATS}
    with _opened(source) as file, av.open(file, options=options, **any_titles()) as container:
        # A track whose codec FFmpeg does not know has no decoder.
        if not container.streams.video or container.streams.video[0].codec_context is None:
            possible = "a file with a video track that can be decoded"
            raise InvalidRequest(field, _described(source), possible, "invalid_media")
        yield _intact(container, field, lease)


def _intact(
    container: av.container.InputContainer, field: str, lease: Lease
) -> Iterator[av.VideoFrame]:
    coder = container.streams.video[0].codec_context
    seen, declared = 0, coder.width * coder.height
    with ExitStack() as reserved:
        if declared:
            _check_size(coder.width, coder.height, field)
            reserved.enter_context(lease.during(declared * CLIP_BYTES, field))
        for packet in container.demux(video=0):
            if packet.is_corrupt:
                raise ValueError("a packet is cut short")
            for frame in packet.decode():
                _check_size(frame.width, frame.height, field)
                if frame.width * frame.height > declared:
                    more = frame.width * frame.height - declared
                    reserved.enter_context(lease.during(more * CLIP_BYTES, field))
                    declared += more
                seen += 1
                if seen > MAX_FRAMES:
                    raise InvalidRequest(field, f"{seen} frames long", f"at most {MAX_FRAMES}")
                yield frame


def _display_matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """Numbers a, b, c, d of a display matrix: a pixel x, y is shown at a x + c y, b x + d y.

    Of one frame of a clip alone: PyAV's side data would keep each frame until garbage is collected.
    """
    try:
        matrix = frame.side_data.get(SideData.DISPLAYMATRIX)
    except ValueError:  # of other side data, of a kind that PyAV does not know
        matrix = None
    a, b, _, c, d = (
        (1, 0, 0, 0, 1) if matrix is None else map(int, np.frombuffer(matrix, "=i4")[:5])
    )
    return a, b, c, d


def _upright(frame: av.VideoFrame, matrix: tuple[int, int, int, int]) -> Pixels:
    """RGB, turned and mirrored as its display matrix says, to the nearest right angle."""
    pixels: Pixels = frame.to_ndarray(format="rgb24")
    a, b, c, d = matrix
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


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
        return HEIF if _is_heif(source) else "it is of no such format"
    text = getattr(error, "strerror", None) or str(error)
    return text.replace(repr(str(source)), "it")


def _is_heif(source: object) -> bool:
    """Whether it begins as pictures of phones do, in a box format that MP4 shares."""
    with _opened(source) as file:
        head = file.read(12)
    return head[4:8] == b"ftyp" and head[8:12] in HEIF_BRANDS


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


def _as_array(source: object) -> NDArray[Any] | None:
    """An array, or a tensor as one on the host; None for anything else."""
    if isinstance(source, np.ndarray):
        return source
    if not hasattr(source, "detach"):
        return None
    tensor = source.detach().cpu()
    array: NDArray[Any] = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    return array


def _checked_array(array: NDArray[Any], dims: int, field: str) -> NDArray[Any]:
    """The array with its channels last; InvalidRequest if it holds no pictures."""
    if array.ndim == dims and array.shape[-1] != 3 == array.shape[-3]:
        array = np.moveaxis(array, -3, -1)
    floats = np.issubdtype(array.dtype, np.floating)
    levels = array.dtype == np.uint8 or floats
    if not levels or array.ndim != dims or array.shape[-1] != 3 or not array.size:
        shape = "[T, H, W, 3]" if dims == 4 else "[H, W, 3]"
        given = f"{array.dtype} {list(array.shape)}"
        possible = f"an array {shape}, uint8 or floats from 0 to 1"
        raise InvalidRequest(field, given, possible, "invalid_type")
    _check_size(array.shape[-2], array.shape[-3], field)
    if floats and not (array.min() >= 0 and array.max() <= 1):  # also of nan
        given = f"floats from {array.min():g} to {array.max():g}"
        raise InvalidRequest(field, given, "floats from 0 to 1, or uint8")
    return array


def _as_uint8(frame: NDArray[Any]) -> Pixels:
    """Levels of 0 to 255, to which floats from 0 to 1 are rounded."""
    return frame if frame.dtype == np.uint8 else np.rint(frame * 255).astype(np.uint8)


def _described(source: object) -> str:
    if isinstance(source, str | Path):
        return str(source)
    if isinstance(source, bytes):
        return f"{len(source)} bytes"
    return type(source).__name__
