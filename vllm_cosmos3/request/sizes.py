"""Sizes, lengths and frame rates that the models were trained with, and the nearest of them."""

from __future__ import annotations

import math
from collections.abc import Collection

ASPECT_RATIOS = ("1,1", "4,3", "3,4", "16,9", "9,16")
TRAINED_SIZES = {  # tier: (width, height) for each of ASPECT_RATIOS
    256: ((256, 256), (320, 256), (256, 320), (320, 192), (192, 320)),
    480: ((640, 640), (736, 544), (544, 736), (832, 480), (480, 832)),
    704: ((960, 960), (1088, 832), (832, 1088), (1280, 704), (704, 1280)),
    720: ((960, 960), (1104, 832), (832, 1104), (1280, 720), (720, 1280)),
    768: ((1024, 1024), (1184, 880), (880, 1184), (1360, 768), (768, 1360)),
}
MAX_AREA = max(width * height for sizes in TRAINED_SIZES.values() for width, height in sizes)
# Larger ones that OpenAI's API lists: its clients' users choose from these.
LISTED_SIZES = {(1024, 1536), (1536, 1024), (1024, 1792), (1792, 1024)}
MAX_TRAINED_FRAMES = {256: 400, 480: 300, 704: 200, 720: 200, 768: 200}
DOCUMENTED_FRAMES = 300  # that the model card gives for all tiers, beyond training for large ones
TRAINED_FPS = (10, 30)


def nearest_size(tier: int, width: int, height: int) -> tuple[int, int]:
    """The trained width and height of a tier whose shape is nearest to that of a picture."""
    return min(TRAINED_SIZES[tier], key=lambda size: abs(size[1] / size[0] - height / width))


def is_trained(width: int, height: int, tiers: Collection[int]) -> bool:
    """Whether a model of these tiers was trained with this size."""
    return any((width, height) in TRAINED_SIZES[tier] for tier in tiers)


def is_too_large(width: int, height: int) -> bool:
    """Whether a size is beyond what is made of an untrained one without being allowed to."""
    return width * height > MAX_AREA and (width, height) not in LISTED_SIZES


def nearest_trained(
    width: int, height: int, tiers: Collection[int] = tuple(TRAINED_SIZES)
) -> tuple[int, int]:
    """The trained width and height of about this area whose shape is nearest, of these tiers."""
    sizes = TRAINED_SIZES[min(tier_of(width, height), max(tiers))]
    return min(sizes, key=lambda size: abs(math.log(size[0] / size[1]) - math.log(width / height)))


def proposed_size(width: int, height: int, *, untrained: bool) -> tuple[int, int]:
    """The nearest width and height that a request may have; ``untrained`` allows larger ones."""
    near_width, near_height = (max(16, round(side / 16) * 16) for side in (width, height))
    if is_too_large(near_width, near_height) and not untrained:
        return nearest_trained(width, height)
    return near_width, near_height


def tier_of(width: int, height: int) -> int:
    """The smallest trained tier whose largest picture has at least this area, or the largest."""
    for tier, sizes in TRAINED_SIZES.items():
        if width * height <= max(w * h for w, h in sizes):
            return tier
    return max(TRAINED_SIZES)


def frame_limits(width: int, height: int) -> tuple[int, int]:
    """Frames that the models were trained with at this size, and that are made unless more are allowed."""
    trained = MAX_TRAINED_FRAMES[tier_of(width, height)]
    return trained, max(trained, DOCUMENTED_FRAMES)


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
