"""JSON of a client, read strictly: every name once, and no text that UTF-8 cannot write."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from vllm_cosmos3.errors import cut

HALF = re.compile(r"\\u[dD][89a-fA-F]")  # perhaps of a pair, which is one character


class Misread(ValueError):
    """JSON that means nothing certain. ``code`` is a slug, ``path`` where it stands."""

    def __init__(self, code: str, path: str, problem: str) -> None:
        super().__init__(f"{path or 'the body'} {problem}")
        self.code, self.path = code, path


def read(text: str, path: str = "") -> Any:
    """The value of a JSON text that stands at ``path`` of a body.

    Raises:
        Misread: a name is given twice, or half a character stands alone.
        ValueError: it is not JSON (json.JSONDecodeError), or a number has thousands of digits.
        RecursionError: it is nested too deeply.
    """
    repeated: dict[int, str] = {}

    def made(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) < len(pairs):
            names = [name for name, _ in pairs]
            repeated[id(out)] = next(name for i, name in enumerate(names) if name in names[:i])
        return out

    value = json.loads(text, object_pairs_hook=made)
    if repeated or HALF.search(text):
        for place, item in _all(path, value):
            if isinstance(item, dict) and id(item) in repeated:
                name = shown(repeated[id(item)])
                raise Misread("conflict", _joined(place, name), "is given twice")
            if isinstance(item, str) and not _whole(item):
                raise Misread("invalid_value", place, "has half of a surrogate pair")
    return value


def shown(text: str) -> str:
    """How a message or a path repeats a name."""
    short = cut(text)
    return short if short.isprintable() else cut(ascii(short)[1:-1])


def _all(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """A value and all names and values inside of it, with their places."""
    stack = [(path, value)]
    while stack:
        place, item = stack.pop()
        yield place, item
        if isinstance(item, dict):
            for name, inner in item.items():
                yield _joined(place, shown(name)), name
                stack.append((_joined(place, shown(name)), inner))
        elif isinstance(item, list):
            stack += [(place, inner) for inner in item]


def _joined(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _whole(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
