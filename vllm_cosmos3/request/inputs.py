"""Input frames of a request: its picture or clip, frame by frame, each brought to the size of the output.

A frame in its own size lives no longer than it takes to resize it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np

from vllm_cosmos3 import media
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.media import Pixels
from vllm_cosmos3.media_budget import Lease
from vllm_cosmos3.request.request import GenerateRequest


def input_frames(request: GenerateRequest, *, limit: int, lease: Lease) -> Iterator[Pixels]:
    """The picture, or the first or last ``limit`` frames of the clip, uint8 [H, W, 3] of one size.

    Raises:
        InvalidRequest: they cannot be read.
    """
    if request.image is not None:
        yield from media.frames_of([request.image], limit=1, field="image", lease=lease)
        return
    assert request.video is not None  # so says the mode
    keep, shape = request.condition_video_keep, None
    for frame in media.frames_of(request.video, limit=limit, keep=keep, lease=lease):
        if shape not in (None, frame.shape):
            raise InvalidRequest("video", "frames of several sizes", "frames of one size")
        shape = frame.shape
        yield frame


def resized(
    frames: Iterator[Pixels],
    fit: Callable[[Pixels], Pixels],
    shape: tuple[int, int, int],
    lease: Lease,
) -> Pixels:
    """Frames after ``fit``, which makes [1, H, W, 3] of [1, h, w, 3]: uint8 ``shape`` [T, H, W], 3.

    Fewer if there are no more.
    """
    lease.reserve(3 * math.prod(shape), "size")
    pixels = np.empty((*shape, 3), np.uint8)
    made = 0
    for made, frame in enumerate(islice(frames, shape[0]), 1):
        pixels[made - 1] = fit(frame[None])[0]
    return pixels[:made]
