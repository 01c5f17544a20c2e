"""Image edits: a picture made from another one and an instruction.

The given picture is a stream of its own before the made one, known throughout, at positions before
it; guidance sees it in both branches. Sizes are those of the Cosmos Framework.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from vllm_cosmos3 import media
from vllm_cosmos3.checkpoint.config import ModelConfig
from vllm_cosmos3.checkpoint.latents import vision_shape
from vllm_cosmos3.media import Pixels
from vllm_cosmos3.media_budget import Lease
from vllm_cosmos3.request.defaults import Parameters
from vllm_cosmos3.request.inputs import input_frames
from vllm_cosmos3.request.parameters import edit_parameters
from vllm_cosmos3.request.plan import StreamPlan
from vllm_cosmos3.request.request import GenerateRequest

LONGEST, MULTIPLE = 512, 32  # of a side, where the request names no size


def edit_streams(
    request: GenerateRequest, model: ModelConfig, lease: Lease
) -> tuple[Parameters, tuple[StreamPlan, StreamPlan]]:
    """The parameters of an edit, and its streams: the given picture and the one to make.

    Raises:
        InvalidRequest: as `edit_parameters`, and for a picture that cannot be read.
    """
    (picture,) = input_frames(request, limit=1, lease=lease)
    size = edit_size(picture.shape[1], picture.shape[0])
    parameters = edit_parameters(request, model, size)
    width, height = parameters.width, parameters.height
    lease.reserve(3 * width * height, "size")
    if (width, height) == size:  # nearly the shape of the picture, so that nothing is cut off
        pixels: Pixels = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))
    else:
        pixels = media.cover_crop(picture[None], height=height, width=width)[0]
    shape = vision_shape(1, height, width, model.vae)
    given = StreamPlan(
        name="vision", shape=shape, rate=parameters.fps, known=(0,), source=pixels[None]
    )
    made = StreamPlan(name="vision", shape=shape, rate=parameters.fps, positions_after=True)
    return parameters, (given, made)


def edit_size(width: int, height: int) -> tuple[int, int]:
    """Width and height of an edit of a picture of these: the longer side 512, both multiples of 32."""
    scale = LONGEST / max(width, height)
    sides = (int(side * scale) // MULTIPLE * MULTIPLE for side in (width, height))
    new_width, new_height = (max(side, MULTIPLE) for side in sides)
    return new_width, new_height
