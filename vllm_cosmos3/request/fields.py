"""What one field of a request accepts, as data, and the normal form of its values.

Command-line flags, the HTTP schema and the options of the server are made from it too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import cleandoc
from numbers import Integral, Real
from os import PathLike, fspath
from os.path import abspath, expanduser
from typing import Any

from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.request.controls import control_of

FRAMEWORK_NAMES = {  # of the Cosmos Framework, for our fields
    "num_steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "shift": "flow_shift",
    "enable_sound": "generate_sound",
    "prompt_upsampling": "upsample_prompt",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What one field accepts, as data: its kind, range and unit, and a sentence for the help.

    ``kind`` is text, int, float, bool, choice, size, ints, pair, numbers, rows, control, image, video,
    sound, arrays or adapters. ``low`` and ``high`` are inclusive, except that ``above`` makes ``low`` exclusive.
    """

    kind: str
    help: str
    unit: str = ""
    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    choices: tuple[str | int, ...] = ()

    @property
    def possible(self) -> str:
        """What the field accepts, as the end of the sentence "... must be"."""
        if self.choices:
            return f"one of {', '.join(map(str, self.choices))}"
        return _POSSIBLE[self.kind] + self._range()

    def _range(self) -> str:
        if self.kind == "text" and self.high < math.inf:
            return f" of at most {self.high:,.0f} characters"
        if self.high == math.inf:
            return ""
        bounds = f"above {self.low:g} up to" if self.above else f"from {_plain(self.low)} to"
        return f" {bounds} {_plain(self.high)}{f' {self.unit}' if self.unit else ''}"

    def sentence(self, default: object = None) -> str:
        """The help as a sentence, with the unit, the range and the default."""
        facts = []
        if self.kind in ("int", "float") and self.high <= 1e6 and not self.choices:
            low = f"above {_plain(self.low)}" if self.above else _plain(self.low)
            facts.append(" ".join(f"{low} to {_plain(self.high)} {self.unit}".split()))
        elif self.unit:
            facts.append(f"in {self.unit}")
        if default is not None and default is not False:
            facts.append(f"default {default}")
        more = f" ({'; '.join(facts)})" if facts else ""
        return f"{self.help[0].upper()}{self.help[1:]}{more}."

    def checked(self, name: str, value: Any) -> Any:
        """``value`` in its normal form; InvalidRequest if the field cannot have it."""
        if self.kind == "rows":
            return _rows(name, value)
        if self.kind == "control":
            return control_of(name, value)
        normal = _NORMAL[self.kind](value)
        if normal is None:
            raise InvalidRequest(name, value, self.possible, "invalid_type")
        if self.choices and normal not in self.choices:
            raise InvalidRequest(name, value, self.possible)
        if self.kind == "text" and len(normal) > self.high:
            raise InvalidRequest(name, value, self.possible, "field_too_large")
        if self.kind in ("int", "float", "ints", "pair"):
            numbers = (normal,) if self.kind in ("int", "float") else normal
            if not numbers or not all(self._within(number) for number in numbers):
                raise InvalidRequest(name, value, self.possible)
        return normal

    def _within(self, number: float) -> bool:
        low = self.low < number if self.above else self.low <= number
        return low and number <= self.high  # false for nan


def with_arguments(
    docstring: str | None, specs: Mapping[str, Spec], defaults: Mapping[str, Any]
) -> str:
    """A docstring that goes on with a line for each argument, for `help`."""
    lines = [f"    {name}: {spec.sentence(defaults[name])}" for name, spec in specs.items()]
    return "\n".join([cleandoc(docstring or ""), "", "Args:", *lines, ""])


# The normal form of one value of each kind; None where the value is of another kind.


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _integer(value: Any) -> int | None:
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None


def _number(value: Any) -> float | None:
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:  # beyond every range
        return -math.inf if value < 0 else math.inf


def _boolean(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _size(value: Any) -> str | None:
    if not isinstance(value, str):
        return None
    parts = value.lower().split("x")
    digits = len(parts) == 2 and all(p.isascii() and p.isdigit() and len(p) < 9 for p in parts)
    return value.lower() if digits else None


def _integers(value: Any) -> tuple[int, ...] | None:
    values = [value] if isinstance(value, Integral) else value
    if isinstance(values, (str, bytes)) or not hasattr(values, "__iter__"):
        return None
    items = [_integer(item) for item in values]
    return None if None in items else tuple(item for item in items if item is not None)


def _numbers(value: Any) -> tuple[float, ...] | None:
    values = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence) or not values:
        return None
    items = [_number(item) for item in values]
    finite = all(item is not None and math.isfinite(item) for item in items)
    return tuple(item for item in items if item is not None) if finite else None


def _rows(name: str, value: Any) -> tuple[tuple[float, ...], ...]:
    """Rows of finite numbers, all of one length; the error names the first other row."""
    possible = _POSSIBLE["rows"]
    values = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence) or not values:
        raise InvalidRequest(name, value, possible, "invalid_type")
    rows: list[tuple[float, ...]] = []
    for index, item in enumerate(values):
        row = _numbers(item)
        if row is None:
            raise InvalidRequest(name, value, f"{possible}, not as row {index}", "invalid_type")
        if rows and len(row) != len(rows[0]):
            odd = f"{possible}: row {index} has {len(row)}, the first one {len(rows[0])}"
            raise InvalidRequest(name, value, odd)
        rows.append(row)
    return tuple(rows)


def _pair(value: Any) -> tuple[float, float] | None:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or len(value) != 2:
        return None
    low, high = map(_number, value)
    return None if low is None or high is None else (low, high)


def _media(value: Any) -> Any:
    """Files, bytes and pictures are opened later, by `media`; numbers and mappings never are."""
    return None if isinstance(value, (bool, Real, Mapping)) else value


def _arrays(value: Any) -> Any:
    return value if isinstance(value, Mapping) and value else None


def _adapters(value: Any) -> tuple[tuple[str, float], ...] | None:
    """Paths with scales, of one PATH or PATH:SCALE, or of a list of those or of pairs."""
    items = [value] if isinstance(value, (str, PathLike)) else value
    if not isinstance(items, Sequence):
        return None
    pairs = [_adapter(item) for item in items]
    return None if None in pairs else tuple(pair for pair in pairs if pair is not None)


def _adapter(value: Any) -> tuple[str, float] | None:
    if isinstance(value, (str, PathLike)):
        path, scale = fspath(value), 1.0
        if isinstance(path, str) and (found := _SCALED.fullmatch(path)):
            path, scale = found["path"], float(found["scale"])
    else:
        pair = isinstance(value, Sequence) and len(value) == 2
        if not pair or not isinstance(value[0], (str, PathLike)):
            return None
        path, number = fspath(value[0]), _number(value[1])
        if number is None or not math.isfinite(number):
            return None
        scale = number
    if not isinstance(path, str) or not path:
        return None
    return abspath(expanduser(path)), scale


_SCALED = re.compile(r"(?P<path>.+):(?P<scale>[-+]?(?:\d+\.?\d*|\.\d+))")
_NORMAL = {
    "text": _text,
    "int": _integer,
    "float": _number,
    "bool": _boolean,
    "choice": _text,
    "size": _size,
    "ints": _integers,
    "pair": _pair,
    "numbers": _numbers,
    "image": _media,
    "video": _media,
    "sound": _media,
    "arrays": _arrays,
    "adapters": _adapters,
}
_POSSIBLE = {
    "text": "text",
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "size": "WIDTHxHEIGHT in pixels, for example 1280x720",
    "ints": "a list of integers",
    "pair": "two numbers",
    "numbers": "a list of finite numbers",
    "rows": "a list of rows of finite numbers, all of one length",
    "control": "true, a video, or an object",
    "image": "a file, bytes, a PIL image, or an array or tensor [H,W,3] (uint8, or floats from 0 to 1)",
    "video": "a file, bytes, a list of PIL images, or an array or tensor [T,H,W,3] (uint8, or floats from 0 to 1)",
    "sound": "a sound file, or a video with sound: its path or its bytes",
    "arrays": "a mapping of stream names to arrays",
    "adapters": "PATH or PATH:SCALE, or a list of those",
}


def _plain(number: float) -> str:
    return str(int(number)) if number == int(number) else f"{number:g}"
