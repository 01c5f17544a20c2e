"""Pixels arrive at the vision encoder as bytes and are normalised there, on its device.

Newer vLLM does this itself. Where it does not, or the operator switched that off, the same arithmetic
stands in front of the patch embedding. Bytes survive the cast to the encoder's bfloat16 unharmed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoImageProcessor


def normalise_pixels(patch_embed: nn.Module, checkpoint: str, revision: str | None) -> None:
    """Make ``patch_embed`` take pixels from 0 to 255, by the settings of the checkpoint's pictures."""
    settings = AutoImageProcessor.from_pretrained(checkpoint, revision=revision)
    scale, shift = affine(settings)
    device = next(patch_embed.parameters()).device
    scale, shift = scale.to(device), shift.to(device)

    def normalise(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        (patches,) = inputs
        pixels = patches.view(len(patches), len(scale), -1).float()
        normalised = torch.addcmul(shift, pixels, scale)
        return normalised.view(patches.shape).to(patches.dtype)

    patch_embed.register_forward_pre_hook(normalise)


def affine(settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift [3, 1] that stand for rescaling and normalising in float32."""
    factor = settings.rescale_factor if settings.do_rescale else 1.0
    mean = settings.image_mean if settings.do_normalize else [0.0] * 3
    std = torch.tensor(settings.image_std if settings.do_normalize else [1.0] * 3)
    return (factor / std)[:, None], (-torch.tensor(mean) / std)[:, None]
