"""Sizes, lengths and frame rates that the models were trained with, and the nearest of them."""

from __future__ import annotations

import math

ASPECT_RATIOS = ("1,1", "4,3", "3,4", "16,9", "9,16")
TRAINED_SIZES = {  # tier: (width, height) for each of ASPECT_RATIOS
    256: ((256, 256), (320, 256), (256, 320), (320, 192), (192, 320)),
    480: ((640, 640), (736, 544), (544, 736), (832, 480), (480, 832)),
    704: ((960, 960), (1088, 832), (832, 1088), (1280, 704), (704, 1280)),
    720: ((960, 960), (1104, 832), (832, 1104), (1280, 720), (720, 1280)),
    768: ((1024, 1024), (1184, 880), (880, 1184), (1360, 768), (768, 1360)),
}
MAX_AREA = max(width * height for sizes in TRAINED_SIZES.values() for width, height in sizes)
MIN_TRAINED_FRAMES = 24
MAX_TRAINED_FRAMES = {256: 400, 480: 300, 704: 200, 720: 200, 768: 200}
TRAINED_FPS = (10, 30)


def nearest_size(tier: int, width: int, height: int) -> tuple[int, int]:
    """The trained width and height of a tier whose shape is nearest to that of a picture."""
    return min(TRAINED_SIZES[tier], key=lambda size: abs(size[1] / size[0] - height / width))


def tier_of(width: int, height: int) -> int:
    """The smallest trained tier whose largest picture has at least this area, or the largest."""
    for tier, sizes in TRAINED_SIZES.items():
        if width * height <= max(w * h for w, h in sizes):
            return tier
    return max(TRAINED_SIZES)


def aspect_ratio(width: int, height: int) -> str | None:
    """The name of a trained size's shape in captions, such as "16,9"; None for other sizes."""
    for sizes in TRAINED_SIZES.values():
        if (width, height) in sizes:
            return ASPECT_RATIOS[sizes.index((width, height))]
    return None


def reduced_ratio(width: int, height: int) -> str:
    """The shape of any size in the same words, in lowest terms: "4,3" for 512x384."""
    common = math.gcd(width, height)
    return f"{width // common},{height // common}"
