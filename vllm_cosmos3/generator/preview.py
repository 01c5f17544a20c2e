"""Previews: one frame of a video in the making, small enough to cost next to nothing.

The frame goes through the decoder alone, as a first frame does, on a plane of at most SIDE positions a side: a
fraction of one step, whatever the size of the video. The ranks divide it like any other plane.
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from vllm_cosmos3 import media
from vllm_cosmos3.generator.models.vae import VideoVAE, to_frames
from vllm_cosmos3.parallel.axis import Axis

SIDE = 16  # latent positions, of 16 pixels each
QUALITY = 75  # of the JPEG


def reduced(latents: Tensor) -> Tensor:
    """The middle frame of latents [1, C, T, h, w], averaged down to at most SIDE a side."""
    frame = latents[:, :, latents.shape[2] // 2]
    factor = math.ceil(max(frame.shape[2:]) / SIDE)
    size = [max(1, round(extent / factor)) for extent in frame.shape[2:]]
    return interpolate(frame, size=size, mode="area").unsqueeze(2)


def seconds_and_jpeg(vae: VideoVAE, latents: Tensor, world: Axis) -> tuple[float, bytes] | None:
    """What decoding one latent frame took, and the picture; None on all ranks but the first."""
    if latents.device.type != "cpu":
        torch.accelerator.synchronize(latents.device)  # what was queued before is not ours
    start = time.monotonic()
    (pixels,) = vae.decode(latents)
    if world.rank:
        return None
    jpeg = media.encode_image(to_frames(pixels)[0].cpu().numpy(), "jpeg", quality=QUALITY)
    return time.monotonic() - start, jpeg
