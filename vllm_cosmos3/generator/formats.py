"""Files of pixels: which formats there are for a clip and for a picture, and how each is written."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from vllm_cosmos3 import media
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.files import replacing
from vllm_cosmos3.media import Pixels

CLIP_SUFFIXES = (".mp4", ".webm")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
GIF, ARRAY = ".gif", ".npy"
FRAMES = "%05d.png"  # of a folder, by their numbers
CLIP_FORMATS = (*CLIP_SUFFIXES, GIF, ARRAY, FRAMES)
IMAGE_FORMATS = (*IMAGE_SUFFIXES, ARRAY)


def write_picture(path: Path, image: Pixels, *, quality: int) -> bool:
    """Write uint8 [H, W, 3] by the suffix of ``path``. False if that is none for pictures."""
    suffix = path.suffix.lower()
    if suffix == ARRAY:
        _write_array(path, image)
    elif suffix in IMAGE_SUFFIXES:
        media.write_image(path, image, quality=quality)
    else:
        return False
    return True


def write_clip(
    path: Path,
    video: Pixels,
    *,
    fps: float,
    sound: np.ndarray | None,
    sample_rate: int | None,
    crf: int,
    quality: int,
) -> list[Path]:
    """Write uint8 [T, H, W, 3] by the suffix of ``path``, and return the files.

    One file, or a picture for each frame where the name has a place for its number. None if the
    suffix is none for clips. WebM and MP4 alone have sound.
    """
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES and "%" in path.stem:
        return _write_frames(path, video, quality)
    if suffix in CLIP_SUFFIXES:
        rate = sample_rate or 48_000
        media.write_video(path, video, fps=fps, sound=sound, sample_rate=rate, crf=crf)
    elif suffix == GIF:
        _write_gif(path, video, fps)
    elif suffix == ARRAY:
        _write_array(path, video)
    else:
        return []
    return [path]


def _write_frames(path: Path, video: Pixels, quality: int) -> list[Path]:
    try:
        files = [path.with_name(path.name % index) for index in range(len(video))]
    except (TypeError, ValueError):
        raise InvalidRequest(
            "path", str(path), f"a name with one place for a number, {FRAMES}"
        ) from None
    for file, frame in zip(files, video, strict=True):
        media.write_image(file, frame, quality=quality)
    return files


def _write_gif(path: Path, video: Pixels, fps: float) -> None:
    """An animation without end. Its times are hundredths of a second, which sum up to the length."""
    ends = [round(100 * index / fps) for index in range(len(video) + 1)]
    first, *others = map(Image.fromarray, video)
    with replacing(path) as part:
        first.save(
            part,
            "GIF",
            save_all=True,
            append_images=others,
            duration=[10 * (end - start) for start, end in pairwise(ends)],
            loop=0,
        )


def _write_array(path: Path, pixels: Pixels) -> None:
    with replacing(path) as part, part.open("wb") as file:
        np.save(file, pixels)
