"""Command-line flags of fields and options, made from what these accept.

A text that is no number is left as it is: the field itself says what is wrong with it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from typing import Any

from vllm_cosmos3.engine_options import DEFAULTS, OPTIONS
from vllm_cosmos3.request.fields import Spec

METAVARS = {
    "text": "TEXT", "int": "N", "float": "X", "size": "WxH", "ints": "I,J,...", "pair": "LOW,HIGH",
    "numbers": "X,Y,...", "rows": "JSON", "image": "FILE", "video": "FILE", "arrays": "FILE.safetensors",
}  # fmt: skip


def add_engine_flags(group: argparse._ActionsContainer, names: Iterable[str]) -> None:
    """Flags of these engine options."""
    for name in names:
        option = OPTIONS[name]
        metavar = _last_word(name) if option.spec.kind == "text" else None
        add_flag(group, name, option.spec, DEFAULTS[name], also=option.flags, metavar=metavar)


def add_server_flag(
    group: argparse._ActionsContainer, name: str, spec: Spec, default: object
) -> None:
    """The flag of an option of the server."""
    metavar = _last_word(name) if spec.kind == "text" else None
    add_flag(group, name, spec, default, metavar=metavar)


def add_flag(
    group: argparse._ActionsContainer,
    name: str,
    spec: Spec,
    default: object,
    *,
    also: tuple[str, ...] = (),
    metavar: str | None = None,
) -> None:
    """The flag of a field, with other spellings; its value is None where it is not given.

    ``default`` is that of the field, for the help.
    """
    flags = (f"--{name.replace('_', '-')}", *also)
    text = f"{spec.help}{f' [{spec.unit}]' if spec.unit else ''}{_range(spec)}"
    if default is not None and default is not False and default != "":
        number = isinstance(default, int | float) and default is not True
        text += f" (default: {f'{default:,.15g}' if number else default})"
    text = text.replace("%", "%%")
    if spec.kind == "bool":
        action = argparse.BooleanOptionalAction
        group.add_argument(*flags, action=action, default=None, help=text)
    elif spec.kind == "control":
        metavar = "FILE|JSON"
        group.add_argument(*flags, nargs="?", const=True, type=_control, metavar=metavar, help=text)
    else:
        metavar = metavar or METAVARS.get(spec.kind) or f"{{{','.join(map(str, spec.choices))}}}"
        group.add_argument(*flags, type=PARSERS.get(spec.kind, str), metavar=metavar, help=text)


def given(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """The values of the flags of these names that were given."""
    return {name: value for name in names if (value := getattr(args, name, None)) is not None}


def _last_word(name: str) -> str:
    return name.rsplit("_", 1)[-1].upper()


def _range(spec: Spec) -> str:
    if spec.kind not in ("int", "float") or spec.high > 1e6:
        return ""
    low = f"above {spec.low:.10g}" if spec.above else f"{spec.low:.10g}"
    return f", {low} to {spec.high:.10g}"


def integer(text: str) -> int | str:
    """A number, or the text as it is."""
    try:
        return int(text)
    except ValueError:
        return text


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _integers(text: str) -> list[int | str]:
    return [integer(part) for part in text.split(",")]


def _rows(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # the latter for absurdly deep nesting
        return text


def _numbers(text: str) -> list[float | str]:
    return [_number(part) for part in text.split(",")]


def _control(text: str) -> Any:
    """A file, or an object that says more; the flag alone is true."""
    return _rows(text) if text.lstrip().startswith("{") else text


PARSERS: dict[str, Callable[[str], Any]] = {
    "int": integer,
    "float": _number,
    "ints": _integers,
    "pair": _numbers,
    "numbers": _numbers,
    "rows": _rows,
}
