"""Streams of latents and their tokens.

A stream knows which of its values are generated (its denoise mask) and what the others are (its
clean latent). Everything that other systems call a mode is in these masks. Patches are the tokens of a
video latent; sound and action latents are tokens already.

Shapes: C channels, T latent frames, h x w latent pixels, S tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from vllm_cosmos3.checkpoint.latents import patch_grid


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stream:
    """One modality of one request between two steps.

    ``name`` is "vision", "sound" or "action" and decides how the stream is embedded; several vision
    streams may stand side by side. ``x`` and ``clean_latent`` are float32: vision [1, C, T, h, w],
    sound [C, T], action [T, C]. ``denoise_mask`` is bool, True where the value is generated, and has
    size 1 in all dimensions but time: vision [1, 1, T, 1, 1], sound [1, T]; action [T, C] also leaves
    the unused channels of an embodiment out.
    """

    name: str
    x: Tensor
    clean_latent: Tensor
    denoise_mask: Tensor

    def apply_clean(self, x: Tensor) -> Stream:
        """The stream at ``x``, with the given values put back."""
        return replace(self, x=torch.where(self.denoise_mask, x, self.clean_latent))


def start_stream(name: str, *, noise: Tensor, clean_latent: Tensor, denoise_mask: Tensor) -> Stream:
    """The stream before the first step: noise where it is generated."""
    stream = Stream(name=name, x=noise, clean_latent=clean_latent, denoise_mask=denoise_mask)
    return stream.apply_clean(noise)


def filled_up(pixels: Tensor, canvas: tuple[int, int] | None) -> Tensor:
    """Pixels [1, 3, T, H, W] at the top left of a canvas of this height and width.

    The rest mirrors them, or repeats their last row and column, as `media.fit_inside` does it.
    """
    if canvas is None:
        return pixels
    height, width = pixels.shape[3:]
    down, right = canvas[0] - height, canvas[1] - width
    mode = "replicate" if down >= height or right >= width else "reflect"
    return pad(pixels[0], (0, right, 0, down), mode).unsqueeze(0)


def patchify(latents: Tensor, patch: int) -> Tensor:
    """[1, C, T, h, w] to tokens [T * rows * columns, patch * patch * C], channels fastest.

    Odd sizes are filled with zeros at the bottom and on the right. The tokens of such a
    border take part in attention like all others.
    """
    frames, rows, columns = patch_grid(tuple(latents.shape), patch)
    _, channels, _, height, width = latents.shape
    padded = pad(latents[0], (0, columns * patch - width, 0, rows * patch - height))
    blocks = padded.view(channels, frames, rows, patch, columns, patch)
    return blocks.permute(1, 2, 4, 3, 5, 0).reshape(frames * rows * columns, -1)


def unpatchify(tokens: Tensor, shape: tuple[int, ...], patch: int) -> Tensor:
    """The inverse of ``patchify`` for a latent of ``shape``; the filling is cut off."""
    frames, rows, columns = patch_grid(shape, patch)
    blocks = tokens.view(frames, rows, columns, patch, patch, shape[1])
    padded = blocks.permute(5, 0, 1, 3, 2, 4).reshape(
        1, shape[1], frames, rows * patch, columns * patch
    )
    return padded[..., : shape[3], : shape[4]]
