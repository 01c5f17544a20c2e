"""Transfer: the control clips that a video follows, and the chunks that a long one is made in.

A control lies in the sequence before the video, at the same positions, as a clip that is known
throughout. Edges and blur are computed from the user's video; the other signals come as clips.

Shape suffixes: T frames, H height, W width, C channels (RGB).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from vllm_cosmos3 import media
from vllm_cosmos3.checkpoint.config import ModelConfig
from vllm_cosmos3.checkpoint.kinds import check_mode
from vllm_cosmos3.checkpoint.latents import latent_frames, round_frames, vision_shape
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.media import Pixels, VideoSource
from vllm_cosmos3.media_budget import Lease
from vllm_cosmos3.request.controls import CONTROL_GUIDANCE, PRESET_OF, Control
from vllm_cosmos3.request.plan import StreamPlan
from vllm_cosmos3.request.request import SPECS, GenerateRequest

FPS = 24.0
SLOWEST, FASTEST = SPECS["fps"].low, SPECS["fps"].high
TOLERANCE = 0.01  # of the fastest rate, which clips state inexactly
ROUNDING = 3  # frames at most, up to those that fill whole latent frames
WITHOUT_CONTROLS = 1  # the branch of guidance that sees none; 0 has all, 2 the negative prompt
EDGES = {  # thresholds of Canny's hysteresis
    "none": (20, 50),
    "very_low": (20, 50),
    "low": (50, 100),
    "medium": (100, 200),
    "high": (200, 300),
    "very_high": (300, 400),
}
BLURS = {  # how many times smaller the picture is while it is smoothed, and after that
    "none": (1, 1),
    "very_low": (1, 4),
    "low": (4, 4),
    "medium": (2, 10),
    "high": (1, 16),
    "very_high": (4, 16),
}
# Of the bilateral filter: diameter, spread of levels and of pixels, for a longer side of 720.
DIAMETER, LEVELS, PIXELS, SIDE = 30, 150.0, 100.0, 720


@dataclass(frozen=True, slots=True, kw_only=True)
class Default:
    """What the controls of a request were tuned with: frames at most, and of a chunk at most."""

    limit: int = 5000
    chunk: int = 93
    fps: float | None = None  # None: that of the clip
    guidance: float = 3.0


ANY, WSM = Default(), Default(limit=101, chunk=101, fps=10.0, guidance=1.0)


def default_of(controls: Iterable[str]) -> Default:
    """What a request with these controls takes for the fields that it leaves out."""
    return WSM if [*controls] == ["wsm"] else ANY


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunks:
    """How ``total`` frames are made: in chunks of ``frames``, the first ``overlap`` taken over."""

    total: int
    frames: int  # that fill whole latent frames
    overlap: int

    @property
    def count(self) -> int:
        if self.total <= self.frames:
            return 1
        return 1 + math.ceil((self.total - self.frames) / (self.frames - self.overlap))

    def window(self, index: int) -> slice:
        """The frames of the whole that chunk ``index`` shows; the last chunk shows fewer."""
        start = index * (self.frames - self.overlap)
        return slice(start, min(start + self.frames, self.total))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Transfer:
    """Controls and chunks of a transfer, resolved. ``clips`` are its controls in the order of ``controls``.

    ``start`` are the frames of the user's video that the first chunk takes over.
    """

    controls: dict[str, Control]
    clips: tuple[Pixels, ...]
    start: Pixels | None
    side_by_side: tuple[Pixels, ...]  # shown with the result
    width: int
    height: int
    fps: float
    chunks: Chunks
    guidance_scale: float
    control_guidance: float
    averaged: bool
    shared_times: bool
    emphasized: bool
    warnings: tuple[str, ...]

    def effective(self) -> dict[str, object]:
        """The fields of the request with their final values, as JSON values."""
        controls: dict[str, object] = {
            name: {"control_weight": control.weight}
            | ({PRESET_OF[name]: control.preset} if control.clip is None else {})
            for name, control in self.controls.items()
        }
        return {
            **controls,
            "control_attention": "averaged" if self.averaged else "full",
            "num_video_frames_per_chunk": self.chunks.frames,
            "num_conditional_frames": self.chunks.overlap,
            "num_first_chunk_conditional_frames": 0 if self.start is None else len(self.start),
            "share_vision_temporal_positions": self.shared_times,
            "emphasize_control_in_prompt": self.emphasized,
        }


Fit = Callable[[int, int], tuple[int, int]]  # the size of the output for that of the input


def resolve_transfer(
    request: GenerateRequest, model: ModelConfig, fit: Fit, lease: Lease
) -> Transfer | None:
    """The controls and chunks of a transfer, its clips read; None for other requests.

    Length, size and frame rate are those of the video, or of the first control. Where that is faster
    than a request may be, frames of all clips are left out and the duration stays. ``fit`` gives
    width and height of the output.

    Raises:
        InvalidRequest: the checkpoint follows no controls, a clip cannot be read, is too long or too
            slow, or the chunks do not fit the overlap.
    """
    if not request.controls:
        return None
    check_mode(model.kind, request.mode)
    first = next(iter(request.controls))
    default = default_of(request.controls)
    source, field = _source(request, None if request.video is not None else first)
    rate = request.fps or default.fps or media.rate_of(source, field=field) or FPS
    if rate < SLOWEST:
        possible = f"at least {SLOWEST:g}, or given with fps, at which all its frames are shown"
        raise InvalidRequest(field, f"{rate:.3g} frames a second", possible)
    every = max(1, math.ceil(rate / FASTEST - TOLERANCE))
    fps = min(rate / every, FASTEST)
    picture = next(media.frames_of(source, limit=1, field=field, lease=lease))
    width, height = fit(picture.shape[1], picture.shape[0])
    limit = _limit(request, fps) or default.limit
    longest = round_frames(request.num_video_frames_per_chunk or default.chunk, model.vae)
    read = _Reader(request, width, height, limit, every, longest, lease)
    clips = tuple(read.control(name) for name in request.controls)
    chunks = _chunks(request, model, len(clips[0]), default.chunk)
    start = _start(request, read, chunks, lease)
    shown = [("show_input", read.clip(None))] if request.show_input else []
    if request.show_control_condition:
        shown += [("show_control_condition", clip) for clip in clips]
    only = CONTROL_GUIDANCE[first] if len(clips) == 1 else 1.0
    scale, control = request.guidance_scale, request.control_guidance
    return Transfer(
        controls=request.controls,
        clips=clips,
        start=start,
        side_by_side=tuple(
            _picked(clip, padded(len(clip), chunks.total)[: chunks.total], name, lease)
            for name, clip in shown
        ),
        width=width,
        height=height,
        fps=fps,
        chunks=chunks,
        guidance_scale=default.guidance if scale is None else scale,
        control_guidance=only if control is None else control,
        averaged=len(clips) > 1 and request.control_attention != "full",
        shared_times=request.share_vision_temporal_positions is not False,
        emphasized=request.emphasize_control_in_prompt is not False,
        warnings=(*_thinned(field, rate, every), *_warnings(request, clips)),
    )


def chunk_streams(
    transfer: Transfer, model: ModelConfig, lease: Lease
) -> tuple[tuple[StreamPlan, ...], ...]:
    """The streams of each chunk: the controls, then the video that follows them.

    What a chunk takes over from the one before is known when that is made: its ``source`` is None.
    What the others show is reserved of ``lease``.
    """
    vae, chunks = model.vae, transfer.chunks
    shape = vision_shape(chunks.frames, transfer.height, transfer.width, vae)
    target = StreamPlan(name="vision", shape=shape, rate=transfer.fps)
    everything = tuple(range(target.length))
    weights = np.array([control.weight for control in transfer.controls.values()])
    shares = weights / weights.max()  # before the sum, which could be more than a number holds
    shares = shares / shares.sum()
    out = []
    for index in range(chunks.count):
        window = chunks.window(index)
        controls = [
            replace(
                target,
                known=everything,
                source=_window(clip, window, chunks, name, lease),
                hidden_in_branches=(WITHOUT_CONTROLS,),
                control_weight=float(share) if transfer.averaged else None,
                positions_after=place > 0 and not transfer.shared_times,
            )
            for place, (name, clip, share) in enumerate(
                zip(transfer.controls, transfer.clips, shares, strict=True)
            )
        ]
        start = transfer.start if index == 0 else None
        taken = chunks.overlap if index else len(() if start is None else start)
        known = everything[: latent_frames(taken, vae)] if taken else ()
        video = replace(
            target, known=known, source=start, positions_after=not transfer.shared_times
        )
        out.append((*controls, video))
    return tuple(out)


def padded(count: int, length: int) -> list[int]:
    """Which of ``count`` frames fill ``length``: forth and back again, as a mirror would show them.

    The turning frame counts twice, and a single frame stays.
    """
    order = list(range(count))
    while len(order) < length:
        order += order[::-1][: max(1, min(len(order) - 1, length - len(order)))]
    return order


def edges(frame: Pixels, preset: str) -> Pixels:
    """Canny's edges, white on black, [H, W, 3]."""
    import cv2

    found = cv2.Canny(np.ascontiguousarray(frame), *EDGES[preset])
    return np.repeat(found[..., None], 3, axis=2)


def blurred(frame: Pixels, preset: str) -> Pixels:
    """Smoothed between edges, then shrunk and enlarged again, [H, W, 3]."""
    import cv2

    if preset == "none":
        return frame
    smaller, coarser = BLURS[preset]
    full = frame.shape[1], frame.shape[0]
    small = cv2.resize(
        np.ascontiguousarray(frame), _shrunk(full, smaller), interpolation=cv2.INTER_AREA
    )
    scale = max(small.shape[:2]) / SIDE
    diameter = max(1, round(DIAMETER * scale)) | 1  # odd
    smooth = cv2.bilateralFilter(small, diameter, max(1, LEVELS * scale), max(1, PIXELS * scale))
    whole = cv2.resize(smooth, full, interpolation=cv2.INTER_LINEAR)
    coarse = cv2.resize(whole, _shrunk(full, coarser), interpolation=cv2.INTER_CUBIC)
    return np.asarray(cv2.resize(coarse, full, interpolation=cv2.INTER_CUBIC), np.uint8)


COMPUTE: dict[str, Callable[[Pixels, str], Pixels]] = {"edge": edges, "blur": blurred}


def _shrunk(size: tuple[int, int], factor: int) -> tuple[int, int]:
    return max(1, size[0] // factor), max(1, size[1] // factor)


def _source(request: GenerateRequest, name: str | None) -> tuple[VideoSource, str]:
    """The clip of a control and its field; of None, or where there is none, the user's video."""
    control = None if name is None else request.controls[name].clip
    if control is not None:
        return control, f"{name}.control"
    assert request.video is not None  # the request has seen to it
    return request.video, "video"


class _Reader:
    """Reads clips at the size of the output, each once: of its frames one of ``every`` so many."""

    def __init__(
        self,
        request: GenerateRequest,
        width: int,
        height: int,
        limit: int,
        every: int,
        chunk: int,
        lease: Lease,
    ) -> None:
        self._request, self._size = request, (width, height)
        self._limit, self._every, self._lease = limit, every, lease
        # A chunk that ends beyond the end of a clip sees a copy of its frames.
        room = lease.per_request // (width * height * 3 * len(request.controls))
        self._most = max(room - chunk, (room - ROUNDING) // 2)
        self._clips: dict[str | None, Pixels] = {}

    def control(self, name: str) -> Pixels:
        """The clip that shows a control."""
        control = self._request.controls[name]
        if control.clip is not None:
            return self.clip(name)
        clip = self.clip(None)
        self._lease.reserve(clip.nbytes, name)
        computed = np.empty_like(clip)
        for frame, out in zip(clip, computed, strict=True):
            out[:] = COMPUTE[name](frame, control.preset)
        return computed

    def clip(self, name: str | None) -> Pixels:
        """The clip of a control as it came; of None the user's video."""
        if name not in self._clips:
            source, field = _source(self._request, name)
            self._clips[name] = _joined(deque(self._frames(source, field)))
        return self._clips[name]

    def _frames(self, source: VideoSource, field: str) -> Iterator[Pixels]:
        width, height = self._size
        limit = self._limit * self._every
        stored = media.frames_of(source, limit=limit, field=field, lease=self._lease)
        for index, frame in enumerate(islice(stored, 0, None, self._every)):
            if index == self._most:
                possible = (
                    f"at most {self._most} frames long at {width}x{height}, or cut by max_frames"
                )
                raise InvalidRequest(field, "longer", possible, "too_large")
            self._lease.reserve(width * height * 3, field)
            yield media.cover_crop(frame[None], height=height, width=width)[0]


def _joined(frames: deque[Pixels]) -> Pixels:
    """Frames of one size as an array. Each is given up when it is in there: none is held twice."""
    clip = np.empty((len(frames), *frames[0].shape), np.uint8)
    for place in clip:
        place[:] = frames.popleft()
    return clip


def _limit(request: GenerateRequest, fps: float) -> int | None:
    """Frames that the request asks for at most; None if it does not say."""
    asked = request.num_frames
    if request.seconds is not None:
        if asked is not None:
            possible = f"left out, as num_frames={asked} is given"
            raise InvalidRequest("seconds", request.seconds, possible, "conflict")
        asked = max(2, round(request.seconds * fps))
    return min((most for most in (asked, request.max_frames) if most is not None), default=None)


def _chunks(request: GenerateRequest, model: ModelConfig, total: int, most: int) -> Chunks:
    if total == 1:
        first = next(iter(request.controls))
        field = "video" if request.controls[first].clip is None else f"{first}.control"
        raise InvalidRequest(field, "one frame", "a clip of at least two")
    per_chunk = request.num_video_frames_per_chunk or min(most, total)
    frames = round_frames(per_chunk, model.vae)
    overlap = 1 if request.num_conditional_frames is None else request.num_conditional_frames
    if overlap >= frames and total > frames:
        possible = f"below num_video_frames_per_chunk={frames}"
        raise InvalidRequest("num_conditional_frames", overlap, possible)
    return Chunks(total=total, frames=frames, overlap=overlap)


def _start(request: GenerateRequest, read: _Reader, chunks: Chunks, lease: Lease) -> Pixels | None:
    """The frames of the user's video that begin the first chunk: all of it, if others follow."""
    asked = request.num_first_chunk_conditional_frames or 0
    if not asked:
        return None
    clip = read.clip(None)
    places = range(min(asked, chunks.frames, len(clip)))
    start = _picked(clip, places, "num_first_chunk_conditional_frames", lease)
    if len(start) == chunks.frames and chunks.count == 1:
        possible = f"below {chunks.frames}, the frames of the only chunk: else nothing is made"
        raise InvalidRequest("num_first_chunk_conditional_frames", asked, possible)
    return start


def _window(clip: Pixels, window: slice, chunks: Chunks, field: str, lease: Lease) -> Pixels:
    """What one chunk sees of a control: mirrored at its end where that comes too soon."""
    order = padded(len(clip), chunks.total)[window]
    places = [order[place] for place in padded(len(order), chunks.frames)]
    return _picked(clip, places, field, lease)


def _picked(clip: Pixels, places: Sequence[int], field: str, lease: Lease) -> Pixels:
    """Frames of a clip: a part of it where they follow each other, else a copy that is reserved first."""
    first = places[0]
    if [*places] == [*range(first, first + len(places))]:
        return clip[first : first + len(places)]
    lease.reserve(len(places) * clip[0].nbytes, field)
    return clip[[*places]]


def _thinned(field: str, rate: float, every: int) -> list[str]:
    if every == 1:
        return []
    return [
        f"{field} has {rate:g} frames a second, more than {FASTEST:g}: one frame of {every} is used"
    ]


def _warnings(request: GenerateRequest, clips: tuple[Pixels, ...]) -> Iterator[str]:
    for name, clip in zip(request.controls, clips, strict=True):
        if len(clip) < len(clips[0]):
            yield (
                f"{name} has {len(clip)} frames and {next(iter(request.controls))} {len(clips[0])}: it is"
                " played back from its end"
            )
    computed = any(control.clip is None for control in request.controls.values())
    if (
        request.video is not None
        and not computed
        and not request.num_first_chunk_conditional_frames
    ):
        yield "of the video only size and frame rate are used: no control is computed from it"
