"""Damaged pictures and clips, thousands of them, at every function that reads media. ``make soak`` runs it.

    python tests/soak_files.py [--files 4000] [--seed 0]

Files of many formats are cut, overwritten, lengthened and joined to each other. Each function must give
pixels or raise an error of this package, give back the memory that it has reserved, and not end its
process. What does otherwise is printed with the number that makes the file again. Status 1 then.
"""

from __future__ import annotations

import argparse
import gc
import io
import multiprocessing
import random
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import cache
from typing import Any

from media_files import animation, encoded, picture, turned
from PIL import Image

from vllm_cosmos3 import media
from vllm_cosmos3.errors import Cosmos3Error
from vllm_cosmos3.media_budget import media_budget

BATCH = 50  # files that one process reads
HEADS = 0.3  # share of the changes that are made at the beginning, where formats are described


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    wrong: list[str] = []
    for first in range(args.seed, args.seed + args.files, BATCH):
        wrong += _in_a_process(range(first, min(first + BATCH, args.seed + args.files)))
    for line in wrong[:50]:
        print(line)
    print(f"{args.files} files, {len(wrong)} problems")
    return int(bool(wrong))


def _in_a_process(numbers: range) -> list[str]:
    """Problems of some files; one that ends the process is looked for one by one."""
    spawned = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=spawned) as pool:
            return pool.submit(problems, numbers).result()
    except BrokenProcessPool:
        if len(numbers) == 1:
            return [f"{numbers[0]}: the process ended"]
        middle = numbers[len(numbers) // 2]
        halves = range(numbers[0], middle), range(middle, numbers[-1] + 1)
        return [line for half in halves for line in _in_a_process(half)]


def problems(numbers: range) -> list[str]:
    """What was raised or kept that should not have been, by the number of the file and the reader."""
    return [f"{number}: {line}" for number in numbers for line in _read(damaged(number))]


def _read(data: bytes) -> Iterator[str]:
    for name, read in readers().items():
        try:
            with suppress(Cosmos3Error):
                read(data)
        except Exception as error:  # noqa: BLE001 - that is what is looked for
            yield f"{name}: {type(error).__name__}: {error}"
        if media_budget().used:
            gc.collect()
        if media_budget().used:
            yield f"{name}: {media_budget().used} bytes were not given back"
            media_budget.cache_clear()


@cache
def readers() -> dict[str, Callable[[bytes], object]]:
    """The functions of both surfaces that files of users come to."""
    from vllm_cosmos3.reasoner.media.media_io import ClipIO, PictureIO, RequestMedia

    def picture_of_chat(data: bytes) -> Any:
        return PictureIO(RequestMedia()).load_bytes(data)

    def clip_of_chat(data: bytes, **options: Any) -> None:
        request = RequestMedia()
        frames, _ = ClipIO(PictureIO(request), request, **options).load_bytes(data).media
        frames[: len(frames) : max(1, len(frames) // 4)].pixels()

    return {
        "is_clip": lambda data: media.is_clip(data, field="f"),
        "read_image": media.read_image,
        "first frames": lambda data: media.read_video(data, frames=5),
        "last frames": lambda data: media.read_video(data, frames=3, keep="last"),
        "rate_of": media.rate_of,
        "picture of chat": picture_of_chat,
        "clip of chat": lambda data: clip_of_chat(data, num_frames=-1),
        "clip of chat at 2 fps": lambda data: clip_of_chat(data, fps=2),
    }


@cache
def whole() -> list[bytes]:
    """Undamaged files, small ones, of every kind that is read."""
    clips = [
        encoded(),
        turned(encoded(frames=9), 90),
        encoded(codec="libx264", container="matroska", frames=9, bf="2"),
        encoded(codec="libx265", container="mov", frames=9, **{"x265-params": "log-level=none"}),
        encoded(codec="libvpx-vp9", container="webm", frames=9),
        encoded(codec="libsvtav1", frames=9, **{"svtav1-params": "log-level=0"}, preset="12"),
        encoded(codec="mpeg4", container="avi", frames=9),
        encoded(codec="mjpeg", container="avi", frames=5, pixels="yuvj420p"),
        encoded(codec="mpeg2video", container="mpegts", frames=9),
        encoded(codec="libx264", container="h264", frames=9),
        animation([picture(48, 32, seed) for seed in range(4)]),
    ]
    one = picture(48, 32, 1)
    several = {"save_all": True}
    kinds: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (one, "PNG", {}), (one.convert("P"), "PNG", {"transparency": 0}), (one.convert("I;16"), "PNG", {}),
        (one, "PNG", several), (one, "JPEG", {"progressive": True}), (one.convert("CMYK"), "JPEG", {}),
        (one, "MPO", several), (one, "WEBP", {}), (one.convert("RGBA"), "WEBP", several), (one, "AVIF", {}),
        (one, "HEIF", {}), (picture(96, 64, 3), "HEIF", {"tile_size": 32}),
        (one, "GIF", {}), (one, "BMP", {}), (one, "TIFF", {"compression": "tiff_lzw"}), (one, "TIFF", several),
        (one.convert("LAB"), "TIFF", {"compression": "tiff_adobe_deflate"}),
    ]  # fmt: skip
    return clips + [_saved(image, kind, options) for image, kind, options in kinds]


def _saved(image: Image.Image, kind: str, options: dict[str, Any]) -> bytes:
    """A file with this picture, with ``save_all`` one with another behind it."""
    if "save_all" in options:
        options = {**options, "append_images": [picture(48, 32, 2)]}
    file = io.BytesIO()
    image.copy().save(file, kind, **options)  # a copy, as options of one format stay in a picture
    return file.getvalue()


def damaged(number: int) -> bytes:
    """The file of this number: the same one whenever it is made."""
    dice = random.Random(number)
    data = bytearray(dice.choice(whole()))
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        reach = min(len(data), 64) if dice.random() < HEADS else len(data)
        at = dice.randrange(max(1, reach))
        match dice.randrange(6):
            case 0:
                del data[max(1, at) :]
            case 1:
                for _ in range(dice.choice((1, 2, 8, 64))):
                    data[dice.randrange(reach)] = dice.randrange(256)
            case 2:
                data[at : at + 4] = dice.choice((b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff"))
            case 3:
                data[at:at] = dice.randbytes(dice.choice((1, 7, 500)))
            case 4:
                del data[at : at + dice.choice((1, 2, 40))]
            case 5:
                other = dice.choice(whole())
                data[at:] = other[dice.randrange(len(other)) :]
        if not data:
            break
    return bytes(data)


if __name__ == "__main__":
    sys.exit(main())
