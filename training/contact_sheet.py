"""Contact sheets: five frames of each clip in a row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def write_sheet(clips: Sequence[NDArray[np.uint8]], file: Path, frames: int = 5) -> None:
    """One row for each clip uint8 [T, H, W, 3], at half the size."""
    rows = []
    for clip in clips:
        places = np.linspace(0, len(clip) - 1, frames).round().astype(int)
        rows.append(np.concatenate(list(clip[places]), 1))
    image = Image.fromarray(np.concatenate(rows, 0))
    image = image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)
    image.save(file, optimize=True)
