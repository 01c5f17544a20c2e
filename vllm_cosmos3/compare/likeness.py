"""PSNR, SSIM and LPIPS of a clip against the exact one, by torchmetrics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import torch

from vllm_cosmos3.errors import Unsupported


@dataclass(frozen=True, slots=True, kw_only=True)
class Likeness:
    """How alike two clips are.

    ``psnr`` in dB, infinite where all pixels are equal; ``ssim`` up to 1; ``lpips`` from 0 (alike),
    None where the weights of its network are not installed.
    """

    psnr: float
    ssim: float
    lpips: float | None


def likeness() -> Callable[[np.ndarray, np.ndarray], Likeness]:
    """The measure of two clips, uint8 [T, H, W, 3].

    Raises:
        Unsupported: torchmetrics is not installed.
    """
    try:
        from torchmetrics.functional.image import (
            peak_signal_noise_ratio,
            structural_similarity_index_measure,
        )
    except ImportError:
        raise Unsupported(
            "comparing pixels needs torchmetrics: pip install 'vllm-cosmos3[compare]'"
        ) from None
    distance = _lpips() if lpips_weights().is_file() else None

    def measure(pixels: np.ndarray, exact: np.ndarray) -> Likeness:
        a, b = (torch.from_numpy(x).permute(0, 3, 1, 2).float() for x in (pixels, exact))
        if torch.equal(a, b):
            return Likeness(psnr=float("inf"), ssim=1.0, lpips=None if distance is None else 0.0)
        frames = list(zip(a.split(1), b.split(1), strict=True))  # one by one: both are large
        each = [structural_similarity_index_measure(x, y, data_range=255.0) for x, y in frames]
        return Likeness(
            psnr=float(peak_signal_noise_ratio(a, b, data_range=255.0)),
            ssim=float(torch.stack(each).mean()),
            lpips=None if distance is None else float(np.mean([distance(*f) for f in frames])),
        )

    return measure


def lpips_weights() -> Path:
    """The file of AlexNet's weights, where torchvision keeps it when it has downloaded it."""
    from torchvision.models import AlexNet_Weights

    name = Path(urlsplit(AlexNet_Weights.DEFAULT.url).path).name
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def _lpips() -> Callable[[torch.Tensor, torch.Tensor], float]:
    from torchmetrics.image import LearnedPerceptualImagePatchSimilarity

    network = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)

    def distance(frame: torch.Tensor, exact: torch.Tensor) -> float:
        with torch.inference_mode():
            return float(network(frame / 255, exact / 255))

    return distance
