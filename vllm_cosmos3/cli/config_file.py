"""``--config FILE.yaml``: flags of a command in a file, which those on the command line win over."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from vllm_cosmos3.errors import InvalidRequest

FLAG = "--config"
MODEL = "model"  # the positional argument, in the file


def add_flag(parser: argparse.ArgumentParser) -> None:
    """The flag, for the help; `expanded` takes it out."""
    text = "YAML file of flags; those on the command line win"
    parser.add_argument(FLAG, metavar="FILE.yaml", help=text)


def expanded(argv: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """The arguments after a subcommand, with the flags of ``--config`` in its place.

    Raises:
        InvalidRequest: the file is missing, or not a mapping of flags to values.
    """
    argv = [part for word in argv for part in _parted(word)]
    if FLAG not in argv:
        return argv
    at = argv.index(FLAG)
    if at + 1 == len(argv):
        raise InvalidRequest(FLAG, None, "a YAML file of flags", "missing_required")
    path, rest = argv[at + 1], argv[:at] + argv[at + 2 :]
    typed = {_plain(word.partition("=")[0]) for word in rest if word.startswith("-")}
    known = {option: action for action in parser._actions for option in action.option_strings}
    for action in parser._actions:
        if typed & {_plain(option) for option in action.option_strings}:
            typed |= {_plain(option) for option in action.option_strings}
    words: list[str] = []
    for name, value in _read(path).items():
        if name == MODEL:
            if not rest or rest[0].startswith("-"):
                words.insert(0, str(value))
        elif not {_plain(f"--{name}"), _plain(f"--no-{name}")} & typed:
            flag = f"--{name.replace('_', '-')}"
            words += _words(flag, value, known.get(flag))
    if words and not words[0].startswith("-"):  # the model comes first
        return words + rest
    return [*rest[:1], *words, *rest[1:]] if rest and not rest[0].startswith("-") else words + rest


def _parted(word: str) -> Iterator[str]:
    flag, equals, value = word.partition("=")
    yield from (flag, value) if flag == FLAG and equals else (word,)


def _plain(flag: str) -> str:
    return flag.replace("_", "-")


def _read(path: str) -> Mapping[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text"
        raise InvalidRequest(FLAG, path, f"a YAML file that can be read ({reason})") from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise InvalidRequest(FLAG, path, f"a YAML file ({reason})") from None
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise InvalidRequest(FLAG, path, "a YAML file of flags and their values, such as port: 80")
    return values


def _words(flag: str, value: Any, action: argparse.Action | None) -> list[str]:
    """A flag and its value as they would be typed."""
    if value is None or value is False:
        negation = f"--no-{flag[2:]}"
        negated = action is None or negation in action.option_strings
        return [negation] if value is False and negated else []
    if value is True:
        return [flag]
    if isinstance(value, list) and not any(isinstance(item, list | dict) for item in value):
        if isinstance(action, argparse._AppendAction):
            return [word for item in value for word in (flag, str(item))]
        several = action is None or action.nargs in ("+", "*")
        return [flag, *map(str, value)] if several else [flag, ",".join(map(str, value))]
    text = json.dumps(value) if isinstance(value, list | dict) else str(value)
    return [f"{flag}={text}"] if text.startswith("-") else [flag, text]
