"""Batch files: JSON, JSONL and YAML of the Cosmos Framework, as records under our names.

Needs no checkpoint, opens no media and no network.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_cosmos3.batch.records import (
    Entry,
    Record,
    Refused,
    folder_of,
    make_record,
    parse_json,
    placed,
)
from vllm_cosmos3.errors import InvalidRequest

Parser = Callable[[Path, str], Iterator[tuple[str, str, Any]]]

# A prompt file may stand for its record; the caption of a picture implies one frame.
CAPTIONS: dict[str, dict[str, Any]] = {
    "temporal_caption": {},
    "comprehensive_t2i_caption": {"num_frames": 1},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The records of some files in their order, and the others with what is wrong with them."""

    records: tuple[Record, ...]
    refused: tuple[Refused, ...]

    @property
    def problems(self) -> tuple[InvalidRequest, ...]:
        """What is wrong with the others."""
        return tuple(refused.error for refused in self.refused)


def read_batch(
    patterns: Sequence[str], overrides: Mapping[str, Any], said: Mapping[str, Any] | None = None
) -> Batch:
    """The records of all files, with ``overrides`` (fields of a request) instead of their own, and
    with ``said`` (fields of a record).

    ``patterns`` are files or globs. Every mistake is found, not only the first: each names its
    file, its record and its field.
    """
    records: dict[str, Record] = {}
    refused: list[Refused] = []
    for item in _entries(patterns):
        if isinstance(item, Refused):
            refused.append(item)
            continue
        try:
            record = make_record(item, overrides, said or {})
            _check_names(record, records)
        except InvalidRequest as error:
            error = placed(item.where, error)
            refused.append(Refused(name=folder_of(item), values=item.values, error=error))
        else:
            records[record.name] = record
    return Batch(records=tuple(records.values()), refused=tuple(refused))


def _check_names(record: Record, before: Mapping[str, Record]) -> None:
    if record.name in before:
        possible = f"another one, as {before[record.name].where} has it"
        raise InvalidRequest("name", record.name, possible, "conflict")
    source = record.continue_from
    if source is not None and source not in before:
        raise InvalidRequest("continue_from", source, "the name of a record before this one")


def _entries(patterns: Sequence[str]) -> Iterator[Entry | Refused]:
    for file in _files(patterns):
        try:
            if isinstance(file, InvalidRequest):
                raise file
            parse, text = _opened(file)
        except InvalidRequest as error:
            yield Refused(name=None, values={}, error=error)
        else:
            for where, name, value in parse(file, text):
                yield _entry(file, where, name, value)


def _opened(file: Path) -> tuple[Parser, str]:
    """How to read a file, and its text."""
    parse = _PARSERS.get(file.suffix.lower())
    if parse is None:
        raise InvalidRequest("input", str(file), f"a file of type {', '.join(_PARSERS)}")
    try:
        return parse, file.read_text(encoding="utf-8-sig")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        possible = f"a file that can be read ({reason})"
    except UnicodeDecodeError as error:
        possible = f"UTF-8, which it is not at byte {error.start}"
    raise InvalidRequest("input", str(file), possible)


def _files(patterns: Sequence[str]) -> list[Path | InvalidRequest]:
    """Every file once, those of a glob in the order of their names."""
    found: dict[Path | InvalidRequest, None] = {}
    for pattern in map(os.path.expanduser, patterns):  # leaves users that nobody knows
        if not glob.has_magic(pattern) or Path(pattern).exists():
            found[Path(pattern)] = None
            continue
        matches = sorted(glob.glob(pattern, recursive=True))
        found |= dict.fromkeys(Path(match) for match in matches)
        if not matches:
            found[InvalidRequest("input", pattern, "a pattern that matches a file")] = None
    return list(found)


def _entry(file: Path, where: str, name: str, value: Any) -> Entry | Refused:
    if not isinstance(value, Mapping):
        possible = "an object with the fields of a record"
        error = InvalidRequest(where, value, possible, "invalid_type")
        named = Entry(where=where, folder=file.parent, name=name, values={})
        return Refused(name=folder_of(named), values={}, error=error)
    for caption, fields in CAPTIONS.items():
        if caption in value and not value.keys() & {"prompt", "prompt_path", "model_mode"}:
            value = {"prompt": value, **fields}
            break
    return Entry(where=where, folder=file.absolute().parent, name=name, values=value)


# What a file holds: where each value stands, what its record is called, and the value.


def _lines(file: Path, text: str) -> Iterator[tuple[str, str, Any]]:
    filled = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    for index, (number, line) in enumerate(filled):
        yield f"{file} line {number}", f"{file.stem}_{index}", parse_json(line)


def _json(file: Path, text: str) -> Iterator[tuple[str, str, Any]]:
    return _one_or_list(file, parse_json(text))


def _yaml(file: Path, text: str) -> Iterator[tuple[str, str, Any]]:
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        value = f"not YAML: {' '.join(str(error).split())}"
    except ValueError as error:  # of a date that is none, or a number with thousands of digits
        value = f"not YAML: {error}"
    except RecursionError:
        value = "not YAML: nested too deeply"
    return _one_or_list(file, value)


def _one_or_list(file: Path, value: Any) -> Iterator[tuple[str, str, Any]]:
    if not isinstance(value, list):
        yield str(file), file.stem, value
        return
    for index, item in enumerate(value):
        yield f"{file} record {index + 1}", f"{file.stem}_{index}", item


_PARSERS: dict[str, Parser] = {
    ".json": _json,
    ".jsonl": _lines,
    ".yaml": _yaml,
    ".yml": _yaml,
}
