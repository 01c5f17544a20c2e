"""Pictures and frames to patches as bytes: the reference's result without its detours.

transformers' processors of Qwen3-VL keep what is not pixel work: options and their errors, sizes,
sampling. Theirs copies a clip into planes, stacks it, normalises it as float32 and permutes that;
here each pair of frames is resized by the same function and laid out once, as uint8, on several
threads. Normalising is left to the device.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from functools import lru_cache, partial
from typing import Any, TypeVar

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

from vllm_cosmos3.models.clip import RECENT_SAMPLES

Resize = Callable[[torch.Tensor], torch.Tensor]  # [T, 3, H, W] to [T, 3, h, w]
_Processor = TypeVar("_Processor")
_THREADS = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="patches")


class PatchingProcessor(Qwen3VLProcessor):
    """Qwen3-VL's, with the pixel work of the two classes below."""

    def __init__(
        self, image_processor: Any, tokenizer: Any, video_processor: Any, **kwargs: Any
    ) -> None:
        images = _of_class(PatchingImageProcessor, image_processor)
        videos = _of_class(PatchingVideoProcessor, video_processor)
        super().__init__(images, tokenizer, videos, **kwargs)


class PatchingImageProcessor(Qwen2VLImageProcessor):
    """Pictures to patches [grid, 3 * temporal * patch * patch], uint8 where the pictures are."""

    def _preprocess(self, images: list[torch.Tensor], **options: Any) -> BatchFeature:
        """``images``: [3, H, W] each."""
        made = [self._patches(image[None], options) for image in images]
        patches, grids = zip(*made, strict=True)
        data = {"pixel_values": torch.cat(patches), "image_grid_thw": torch.tensor(grids)}
        return BatchFeature(data, tensor_type=options["return_tensors"])

    def _patches(
        self, image: torch.Tensor, options: dict[str, Any]
    ) -> tuple[torch.Tensor, list[int]]:
        resize: Resize = _unchanged
        if options["do_resize"]:
            size = size_after(
                self.resize,
                tuple(image.shape),
                size=options["size"],
                resample=options["resample"],
                factor=options["patch_size"] * options["merge_size"],
            )
            plain = super(Qwen2VLImageProcessor, self).resize
            resize = partial(plain, size=size, resample=options["resample"])
        return patchify(image, resize, **_layout(options))


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
    ) -> list[torch.Tensor]:
        """Clips as views [T, 3, H, W] of what was decoded; they are copied only to be converted."""
        prepared = []
        for video in videos:
            frames = torch.from_numpy(video[:]) if isinstance(video, np.ndarray) else video
            layout = input_data_format or infer_channel_dimension_format(frames)
            if layout == ChannelDimension.LAST:
                frames = frames.permute(0, 3, 1, 2)
            if do_convert_rgb and frames.shape[1] != 3:
                frames = self.convert_to_rgb(frames)
            prepared.append(frames if device is None else frames.to(device))
        return prepared

    def _preprocess(self, videos: list[torch.Tensor], **options: Any) -> BatchFeature:
        """``videos``: [T, 3, H, W] each."""
        made = [self._patches(frames, options) for frames in videos]
        patches, grids = zip(*made, strict=True)
        data = {"pixel_values_videos": torch.cat(patches), "video_grid_thw": torch.tensor(grids)}
        return BatchFeature(data, tensor_type=options["return_tensors"])

    def _patches(
        self, frames: torch.Tensor, options: dict[str, Any]
    ) -> tuple[torch.Tensor, list[int]]:
        resize: Resize = _unchanged
        if options["do_resize"]:
            size = size_after(
                self.resize,
                (1, *frames.shape),
                size=options["size"],
                resample=options["resample"],
                factor=options["patch_size"] * options["merge_size"],
                temporal_factor=options["temporal_patch_size"],
                cap_pixels_per_frame=options.get("cap_pixels_per_frame"),
            )
            plain = super(Qwen3VLVideoProcessor, self).resize
            resize = partial(plain, size=size, resample=options["resample"])
        return patchify(frames, resize, **_layout(options))


def patchify(
    frames: torch.Tensor, resize: Resize, *, patch: int, temporal: int, merge: int
) -> tuple[torch.Tensor, list[int]]:
    """Patches of frames [T, 3, H, W] after ``resize``, and their grid of times, rows and columns.

    A patch is ``temporal`` frames of ``patch`` x ``patch`` pixels in one row, [3, temporal, patch,
    patch]; the ``merge`` x ``merge`` patches that become one token follow each other. The last frame
    is repeated to fill the last patch.
    """
    starts = range(0, len(frames), temporal)
    first = resize(frames[:temporal])
    channels, height, width = first.shape[1:]
    times, rows, columns = len(starts), height // patch, width // patch
    shape = (rows // merge, columns // merge, merge, merge, channels, temporal, patch, patch)
    out = torch.empty((times, *shape), dtype=first.dtype, device=first.device)

    def lay_out(place: int) -> None:
        chunk = first if place == 0 else resize(frames[starts[place] :][:temporal])
        if missing := temporal - len(chunk):
            chunk = torch.cat([chunk, chunk[-1:].expand(missing, -1, -1, -1)])
        cut = chunk.reshape(
            temporal, channels, rows // merge, merge, patch, columns // merge, merge, patch
        )
        out[place].copy_(cut.permute(2, 5, 3, 6, 1, 0, 4, 7))

    list(_THREADS.map(lay_out, range(times)))
    return out.view(times * rows * columns, -1), [times, rows, columns]


def _unchanged(frames: torch.Tensor) -> torch.Tensor:
    return frames


@lru_cache(maxsize=1024)
def size_after(rule: Callable[..., Any], shape: tuple[int, ...], **options: Any) -> SizeDict:
    """The size that ``rule``, the reference's resize, gives a tensor of this shape.

    The arithmetic lies within that function, so it is asked, with a tensor that has no pixels.
    """
    *_, height, width = rule(torch.empty(shape, dtype=torch.uint8, device="meta"), **options).shape
    return SizeDict(height=height, width=width)


def _layout(options: dict[str, Any]) -> dict[str, int]:
    return {
        "patch": options["patch_size"],
        "temporal": options["temporal_patch_size"],
        "merge": options["merge_size"],
    }


def _of_class(kind: type[_Processor], processor: Any) -> _Processor:
    """A copy of a processor, its settings included, that is of this subclass."""
    changed: _Processor = copy(processor)
    changed.__class__ = kind
    return changed
