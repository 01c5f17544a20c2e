"""Units of flags: sizes such as 100GiB and times such as 10m, read as the number that is meant.

A text that is neither is left to the field, which says what is possible.
"""

from __future__ import annotations

import re

UNITS = {"B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
UNITS |= {f"{letter}I": 1024**power for power, letter in enumerate("KMGT", 1)}
SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
SIZE = re.compile(r"([\d.]+)\s*([KMGT]?I?)B?", re.IGNORECASE)
TIME = re.compile(r"(?:([\d.]+)(ms|s|m|h|d))+")


def bytes_of(text: str) -> int | str:
    """Bytes: 512MiB, 100 GB, 1.5T, or a plain number."""
    found = SIZE.fullmatch(text)
    try:
        number = float(found[1]) if found else None
    except ValueError:
        number = None
    if found is None or number is None:
        return text
    return round(number * UNITS[found[2].upper() or "B"])


def gib_of(text: str) -> float | str:
    """GiB: 40, 40GiB, 500MiB."""
    size = text if text.replace(".", "", 1).isdigit() else bytes_of(text)
    try:
        return float(size) if size is text else float(size) / 2**30
    except ValueError:
        return text


def seconds_of(text: str) -> float | str:
    """Seconds: 600, 10m, 1h30m."""
    try:
        if TIME.fullmatch(text):
            parts = re.findall(r"([\d.]+)(ms|s|m|h|d)", text)
            return sum(float(number) * SECONDS[unit] for number, unit in parts)
        return float(text)
    except ValueError:
        return text


def shown_bytes(size: float) -> str:
    """A size in its largest whole unit."""
    for power, name in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if size >= 1024**power and size % 1024**power == 0:
            return f"{size / 1024**power:g}{name}"
    return f"{size:g}"


def shown_seconds(seconds: float) -> str:
    """A time in its largest whole unit."""
    for length, name in ((86_400, "d"), (3600, "h"), (60, "m")):
        if seconds >= length and seconds % length == 0:
            return f"{seconds / length:g}{name}"
    return f"{seconds:g}s" if seconds else "0"
