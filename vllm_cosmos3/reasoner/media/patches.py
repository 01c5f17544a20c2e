"""Pictures and frames to patches as bytes: the reference's result without its detours.

transformers' processors of Qwen3-VL keep what is not pixel work: options and their errors, sizes,
sampling. Theirs copies a clip into planes, stacks it, normalises it as float32 and permutes that;
here each pair of frames is resized by the same function and laid out once, as uint8, on several
threads. Normalising is left to the device.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from functools import cache, lru_cache, partial
from typing import Any, TypeAlias, TypedDict, TypeVar

import numpy as np
import torch
from transformers import (
    BatchFeature,
    Qwen2VLImageProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.image_utils import ChannelDimension, SizeDict, infer_channel_dimension_format
from transformers.video_utils import VideoMetadata

from vllm_cosmos3.reasoner.media.video_reader import RECENT_SAMPLES, LazyFrames

Frames: TypeAlias = torch.Tensor | LazyFrames  # [T, 3, H, W] in memory, or still in a file
Planes = tuple[torch.Tensor, ...]  # red, green and blue of a frame, [H, W] each
_LONG_NUMBERS = {2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}  # bytes
_COPYING, _RESIZING = 2, 4  # threads; more that copy wait for Python's lock, on 4 cores as on 16
_RESIZING_BYTES = 2**26  # of frames at their own size, in all threads
_Processor = TypeVar("_Processor")


class PatchingProcessor(Qwen3VLProcessor):
    """Qwen3-VL's, with the pixel work of the two classes below."""

    def __init__(
        self, image_processor: Any, tokenizer: Any, video_processor: Any, **kwargs: Any
    ) -> None:
        images = _of_class(PatchingImageProcessor, image_processor)
        videos = _of_class(PatchingVideoProcessor, video_processor)
        super().__init__(images, tokenizer, videos, **kwargs)

    def __call__(
        self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any
    ) -> BatchFeature:
        """As Qwen3-VL's, without the token ids of a clip: vLLM makes them and drops these."""
        if videos is None or images is not None:
            return super().__call__(images=images, text=text, videos=videos, **kwargs)
        merged = self._merge_kwargs(
            self.valid_processor_kwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs
        )
        features = self.video_processor(videos, **merged["videos_kwargs"])
        features.pop("video_metadata", None)
        return features


class _Layout(TypedDict):
    patch: int
    temporal: int
    merge: int


class OfOneClip(torch.Tensor):
    """A tensor that ``torch.cat`` of it alone does not copy; what is made of it is an ordinary one.

    vLLM joins the clips of every request in that way, and most requests have one.
    """

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if function is torch.cat and args and len(args[0]) == 1:
                return args[0][0].as_subclass(torch.Tensor)
            return function(*args, **(kwargs or {}))


class PatchingImageProcessor(Qwen2VLImageProcessor):
    """Pictures to patches [grid, 3 * temporal * patch * patch], uint8 where the pictures are."""

    def _preprocess(self, images: list[torch.Tensor], **options: Any) -> BatchFeature:
        """``images``: [3, H, W] each."""
        made = [self._patches(image[None], options) for image in images]
        return _features("pixel_values", "image_grid_thw", made)

    def _patches(
        self, image: torch.Tensor, options: dict[str, Any]
    ) -> tuple[torch.Tensor, list[int]]:
        if options["do_resize"]:
            size = size_after(
                self.resize,
                tuple(image.shape),
                size=options["size"],
                resample=options["resample"],
                factor=options["patch_size"] * options["merge_size"],
            )
            image = super(Qwen2VLImageProcessor, self).resize(image, size, options["resample"])
        planes = tuple(image[0])
        return frames_to_patches(1, lambda _: planes, **_layout(options))


class PatchingVideoProcessor(Qwen3VLVideoProcessor):
    """Clips to patches [grid, 3 * temporal * patch * patch], uint8 where the frames are."""

    def sample_frames(
        self,
        metadata: VideoMetadata,
        num_frames: int | None = None,
        fps: float | None = None,
        **kwargs: Any,
    ) -> np.ndarray[Any, Any]:
        """The reference's choice of frames, remembered for the clips that are being loaded."""
        choose = partial(super().sample_frames, num_frames=num_frames, fps=fps, **kwargs)
        numbers: np.ndarray[Any, Any] = choose(metadata)
        RECENT_SAMPLES.note(
            (num_frames, fps),
            lambda total, rate: choose(VideoMetadata(total_num_frames=total, fps=rate)),
        )
        return numbers

    def _prepare_input_videos(
        self,
        videos: Sequence[Any],
        do_convert_rgb: bool | None = None,  # noqa: FBT001  # transformers' interface
        input_data_format: Any = None,
        device: Any = None,
    ) -> list[Frames]:
        """Clips as views [T, 3, H, W] of what was decoded, or as they lie in their files."""
        prepared: list[Frames] = []
        for video in videos:
            if isinstance(video, LazyFrames) and device is None:
                prepared.append(video)
                continue
            pixels = video.pixels() if isinstance(video, LazyFrames) else video
            frames = torch.from_numpy(pixels) if isinstance(pixels, np.ndarray) else pixels
            layout = input_data_format or infer_channel_dimension_format(frames)
            if layout == ChannelDimension.LAST:
                frames = frames.permute(0, 3, 1, 2)
            if do_convert_rgb and frames.shape[1] != 3:
                frames = self.convert_to_rgb(frames)
            prepared.append(frames if device is None else frames.to(device))
        return prepared

    def _preprocess(self, videos: list[Frames], **options: Any) -> BatchFeature:
        """``videos``: [T, 3, H, W] each, or frames of a file."""
        made = [self._patches(frames, options) for frames in videos]
        features = _features("pixel_values_videos", "video_grid_thw", made)
        features["pixel_values_videos"] = features["pixel_values_videos"].as_subclass(OfOneClip)
        return features

    def _patches(self, frames: Frames, options: dict[str, Any]) -> tuple[torch.Tensor, list[int]]:
        count, height, width = _shape(frames)
        size = SizeDict(height=height, width=width)
        if options["do_resize"]:
            size = size_after(
                self.resize,
                (1, count, 3, height, width),
                size=options["size"],
                resample=options["resample"],
                factor=options["patch_size"] * options["merge_size"],
                temporal_factor=options["temporal_patch_size"],
                cap_pixels_per_frame=options.get("cap_pixels_per_frame"),
            )
        windows = _windows(frames)
        if (size.height, size.width) == (height, width):
            planes = partial(_planes, frames)
            return frames_to_patches(count, planes, windows=windows, **_layout(options))
        resize = super(Qwen3VLVideoProcessor, self).resize

        def resized(place: int) -> Planes:
            return tuple(resize(_picture(frames, place)[None], size, options["resample"])[0])

        threads = max(1, min(_RESIZING, _RESIZING_BYTES // (3 * height * width)))
        return frames_to_patches(
            count, resized, windows=windows, threads=threads, **_layout(options)
        )


def frames_to_patches(
    count: int,
    planes: Callable[[int], Planes],
    *,
    patch: int,
    temporal: int,
    merge: int,
    windows: Iterable[range] | None = None,
    threads: int = _COPYING,
) -> tuple[torch.Tensor, list[int]]:
    """Patches of ``count`` frames and their grid of times, rows and columns.

    ``planes`` gives a frame by its place, as colours [H, W]; ``threads`` threads call it, for the
    places of one window after the other. A patch is ``temporal`` frames of ``patch`` x ``patch`` pixels in one row, [3, temporal, patch, patch]; the
    ``merge`` x ``merge`` patches that become one token follow each other. The last frame is repeated
    to fill the last patch.
    """
    stretches = iter(windows or [range(count)])
    window: range | None = next(stretches)
    first = planes(0)
    height, width = first[0].shape
    times, rows, columns = -(-count // temporal), height // patch, width // patch
    shape = (rows // merge, columns // merge, merge, merge, len(first), temporal, patch, patch)
    out = torch.empty((times, *shape), dtype=first[0].dtype, device=first[0].device)
    cut = (rows // merge, merge, patch, columns // merge, merge, -1)

    def lay_out(place: int) -> None:
        frame = first if place == 0 else planes(min(place, count - 1))
        for colour, plane in enumerate(frame):
            rows_apart = plane if plane.stride(1) == 1 else plane.contiguous()
            there = out[place // temporal][..., colour, place % temporal, :, :]
            here = rows_apart.unflatten(1, (columns // merge, merge, patch)).unflatten(0, cut[:3])
            _copy_rows(there, here.permute(0, 3, 1, 4, 2, 5))

    def lay_out_each(places: range) -> None:
        for place in places:
            lay_out(place)

    while window is not None:
        stop = times * temporal if window.stop == count else window.stop
        shares = _shares(range(window.start, stop), threads)
        list(_threads(os.getpid()).map(lay_out_each, shares))
        window = next(stretches, None)
    return out.view(times * rows * columns, -1), [times, rows, columns]


@cache
def _threads(_process: int) -> ThreadPoolExecutor:
    """Threads of this process: a forked one has none of its parent's and would wait for ever."""
    return ThreadPoolExecutor(_RESIZING, thread_name_prefix="patches")


def _shares(places: range, parts: int) -> list[range]:
    """So many parts of ``places``: a task for each frame costs more than it gains."""
    size = -(-len(places) // parts)
    return [places[start : start + size] for start in range(0, len(places), size)]


def _copy_rows(there: torch.Tensor, here: torch.Tensor) -> None:
    """Copy, with each row of a patch, the last dimension, as one number where a number is so long.

    A copy that permutes moves one number at a time.
    """
    row = here.shape[-1]
    number = _LONG_NUMBERS.get(row * here.element_size())
    steps = (*here.stride()[:-1], here.storage_offset())
    if number is not None and here.stride(-1) == 1 and not any(step % row for step in steps):
        there, here = there.view(number), here.view(number)
    there.copy_(here)


def _shape(frames: Frames) -> tuple[int, int, int]:
    """Number of frames, height, width."""
    count, *size = frames.shape
    height, width = size[:2] if isinstance(frames, LazyFrames) else size[1:]
    return count, height, width


def _windows(frames: Frames) -> Iterable[range] | None:
    """The places of frames that are decoded together, ascending."""
    if isinstance(frames, LazyFrames) and frames.numbers == sorted(frames.numbers):
        return frames.source.windows(frames.numbers)
    return None


def _planes(frames: Frames, place: int) -> Planes:
    if not isinstance(frames, LazyFrames):
        return tuple(frames[place])
    planes = frames.source.planes(frames.numbers[place])
    return tuple(torch.from_numpy(plane) for plane in planes)


def _picture(frames: Frames, place: int) -> torch.Tensor:
    """A frame [3, H, W] for resizing, which is fastest with colours innermost in memory."""
    if isinstance(frames, LazyFrames):
        return torch.from_numpy(frames[place]).permute(2, 0, 1)
    return frames[place]


def _features(
    pixels: str, grid: str, made: Sequence[tuple[torch.Tensor, list[int]]]
) -> BatchFeature:
    patches = [found for found, _ in made]
    joined = patches[0] if len(patches) == 1 else torch.cat(patches)
    return BatchFeature({pixels: joined, grid: torch.tensor([size for _, size in made])})


@lru_cache(maxsize=1024)
def size_after(rule: Callable[..., Any], shape: tuple[int, ...], **options: Any) -> SizeDict:
    """The size that ``rule``, the reference's resize, gives a tensor of this shape.

    The arithmetic lies within that function, so it is asked, with a tensor that has no pixels.
    """
    *_, height, width = rule(torch.empty(shape, dtype=torch.uint8, device="meta"), **options).shape
    return SizeDict(height=height, width=width)


def _layout(options: dict[str, Any]) -> _Layout:
    return {
        "patch": options["patch_size"],
        "temporal": options["temporal_patch_size"],
        "merge": options["merge_size"],
    }


def _of_class(subclass: type[_Processor], processor: Any) -> _Processor:
    """A copy of a processor, its settings included, that is of this subclass."""
    changed: _Processor = copy(processor)
    changed.__class__ = subclass
    return changed
