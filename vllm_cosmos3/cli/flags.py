"""Command-line flags of fields and options, made from what these accept.

A text that is no number is left as it is: the field itself says what is wrong with it.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Callable, Iterable
from typing import Any

from vllm_cosmos3.cli.units import bytes_of, gib_of, seconds_of, shown_bytes, shown_seconds
from vllm_cosmos3.engine_options import DEFAULTS, OPTIONS
from vllm_cosmos3.errors import Cosmos3Error, InvalidRequest, did_you_mean
from vllm_cosmos3.request.fields import Spec

WIDTH = 100  # columns of the help, and no more on wider terminals
METAVARS = {
    "text": "TEXT", "int": "N", "float": "X", "size": "WxH", "ints": "I,J,...", "pair": "LOW,HIGH",
    "numbers": "X,Y,...", "rows": "JSON", "image": "FILE", "video": "FILE",
    "sound": "FILE", "arrays": "FILE.safetensors",
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """A parser that refuses a choice as every field refuses one: InvalidRequest, without the usage."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            possible = f"one of {', '.join(map(str, action.choices))}"
            raise InvalidRequest(action.dest, value, possible)


class Help(argparse.HelpFormatter):
    """Help within 100 columns, with the texts of flags near their names, and epilogs as written."""

    def __init__(self, prog: str, **keywords: Any) -> None:
        width = min(WIDTH, shutil.get_terminal_size().columns - 2)
        super().__init__(prog, max_help_position=40, width=width)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(f"{indent}{line}" for line in text.splitlines())

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            yes, no = action.option_strings[0], action.option_strings[-1]
            return ", ".join([*(o for o in action.option_strings if not o.startswith("--no-")), no.replace(yes[2:], "...")])  # fmt: skip
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, action.metavar or action.dest.upper())  # type: ignore[arg-type]
        return f"{', '.join(action.option_strings)} {value}"


class UnknownFlag(Cosmos3Error):
    """A flag, or a word, that a command does not have, with the nearest one that it has."""

    def __init__(self, word: str, flags: Iterable[str]) -> None:
        flag = word.partition("=")[0]
        if not flag.startswith("-"):
            super().__init__(f"unexpected argument {word!r}")
            return
        field = did_you_mean(flag.lstrip("-").replace("-", "_"), _fields(flags))
        near = re.sub(r"mean (\w+)", lambda found: f"mean --{found[1].replace('_', '-')}", field)
        super().__init__(f"unknown flag {flag}; {near or '--help lists all'}")


def _fields(flags: Iterable[str]) -> list[str]:
    return [flag[2:].replace("-", "_") for flag in flags if flag.startswith("--")]


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
    text = spec.help + _range(spec)
    if default not in (None, False, "", ()):
        text += f" (default: {_shown(default, spec)})"
    text = text.replace("%", "%%")
    if spec.kind == "bool":
        action = argparse.BooleanOptionalAction
        group.add_argument(*flags, action=action, default=None, help=text)
    elif spec.kind == "control":
        metavar = "FILE|JSON"
        group.add_argument(*flags, nargs="?", const=True, type=_control, metavar=metavar, help=text)
    elif spec.kind == "adapters":
        group.add_argument(*flags, action="append", metavar="PATH[:SCALE]", help=text)
    else:
        metavar = UNITS.get(spec.unit, metavar or METAVARS.get(spec.kind))
        metavar = metavar or f"{{{','.join(str(each) for each in spec.choices if each != '')}}}"
        parse = UNIT_PARSERS.get(spec.unit) or PARSERS.get(spec.kind, str)
        group.add_argument(*flags, type=parse, metavar=metavar, help=text)


def given(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """The values of the flags of these names that were given."""
    return {name: value for name in names if (value := getattr(args, name, None)) is not None}


def _last_word(name: str) -> str:
    return name.rsplit("_", 1)[-1].upper()


def _range(spec: Spec) -> str:
    if spec.kind not in ("int", "float") or spec.high > 200 or spec.choices:
        return ""
    low = f"above {spec.low:.10g}" if spec.above else f"{spec.low:.10g}"
    return f", {low} to {spec.high:.10g}"


def _shown(default: object, spec: Spec) -> object:
    """A default as a person would write it."""
    if isinstance(default, bool):
        return "yes"
    if not isinstance(default, int | float):
        return default
    if spec.unit == "bytes":
        return shown_bytes(default)
    return shown_seconds(default) if spec.unit == "seconds" else f"{default:,.15g}"


def integer(text: str) -> int | str:
    """A number, or the text as it is."""
    try:
        return int(text)
    except ValueError:
        return text


def number(text: str) -> float | str:
    """The same with a fraction."""
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
    return [number(part) for part in text.split(",")]


def _control(text: str) -> Any:
    """A file, or an object that says more; the flag alone is true."""
    return _rows(text) if text.lstrip().startswith("{") else text


PARSERS: dict[str, Callable[[str], Any]] = {
    "int": integer,
    "float": number,
    "ints": _integers,
    "pair": _numbers,
    "numbers": _numbers,
    "rows": _rows,
}
UNITS = {"bytes": "SIZE", "GiB": "GIB", "seconds": "TIME"}
UNIT_PARSERS: dict[str, Callable[[str], Any]] = {
    "bytes": bytes_of,
    "GiB": gib_of,
    "seconds": seconds_of,
}
UNIT_EXAMPLES: dict[object, str] = {  # what the texts are that these read, for errors
    bytes_of: "a size such as 512MiB or 100GiB",
    gib_of: "a size such as 512MiB or 40GiB",
    seconds_of: "a time such as 90s, 10m or 2d",
}
