"""Batch files: JSON, JSONL and YAML of the Cosmos Framework, as records under our names.

Records are streamed: a JSONL file is read line by line, and what a batch consists of is known from
one pass over it, without the records. Needs no checkpoint and opens no media.
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vllm_cosmos3.batch.locations import (
    HTTP,
    fetch,
    file_system,
    is_url,
    parent_of,
    reaching,
    scheme_of,
    shown,
)
from vllm_cosmos3.batch.records import (
    REASONER,
    Entry,
    Record,
    Refused,
    folder_of,
    make_record,
    placed,
    read_json,
)
from vllm_cosmos3.errors import InvalidRequest

INPUT = "--input"  # which names the files, for errors: the command line alone reads them
# A prompt file may stand for its record; the caption of a picture implies one frame.
CAPTIONS: dict[str, dict[str, Any]] = {
    "temporal_caption": {},
    "comprehensive_t2i_caption": {"num_frames": 1},
}


Unit = tuple[Record, ...]  # a record, or those that continue one another, in their order


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFile:
    """A batch file: where it can be read, what it is called, and the folder its paths start from."""

    path: Path
    called: str
    folder: Path | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreadable:
    """A text that is not in the format of its file, and why."""

    text: str
    format: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What a batch consists of, without its records.

    ``chains`` has the records that continue one another, each with the name of the first of its
    chain. ``asks`` says whether the reasoner has something to do before the generator, ``captions``
    whether it has after it.
    """

    names: frozenset[str]
    refused: tuple[Refused, ...]
    chains: Mapping[str, str]
    units: int
    asks: bool
    captions: bool


class Source:
    """The records of some files, read anew by each pass.

    ``overrides`` are fields of a request and ``said`` fields of a record that hold for all of them.
    """

    def __init__(
        self,
        files: Sequence[InputFile | InvalidRequest],
        overrides: Mapping[str, Any],
        said: Mapping[str, Any] | None = None,
    ) -> None:
        self._files, self.overrides, self.said = tuple(files), overrides, said or {}

    def items(self) -> Iterator[Record | Refused]:
        """The records in their order, and in place of others what is wrong with them."""
        places: dict[str, tuple[str, str]] = {}
        for item in self._entries():
            if isinstance(item, Refused):
                yield item
                continue
            try:
                record = make_record(item, self.overrides, self.said)
                _check_names(record, places)
            except InvalidRequest as error:
                error = placed(item.where, error)
                yield Refused(name=folder_of(item), values=item.values, error=error)
            else:
                places[record.name] = record.where, record.kind
                yield record

    def contents(self) -> Contents:
        """One pass over all records."""
        names: set[str] = set()
        refused: list[Refused] = []
        chains: dict[str, str] = {}
        asks = captions = False
        for item in self.items():
            if isinstance(item, Refused):
                refused.append(item)
                continue
            names.add(item.name)
            if item.continue_from is not None:
                root = chains.setdefault(item.continue_from, item.continue_from)
                chains[item.name] = root
            asks |= item.kind == REASONER or item.upsample is not None
            captions |= item.caption
        roots = len(set(chains.values()))
        return Contents(
            names=frozenset(names),
            refused=tuple(refused),
            chains=chains,
            units=len(names) - len(chains) + roots,
            asks=asks,
            captions=captions,
        )

    def units(self, chains: Mapping[str, str]) -> Iterator[Unit]:
        """Each record, but those of a chain together, at the place of its last one."""
        lengths = Counter(chains.values())
        begun: dict[str, list[Record]] = {}
        for item in self.items():
            if isinstance(item, Refused):
                continue
            root = chains.get(item.name)
            if root is None:
                yield (item,)
                continue
            begun.setdefault(root, []).append(item)
            if len(begun[root]) == lengths[root]:
                yield tuple(begun.pop(root))

    def _entries(self) -> Iterator[Entry | Refused]:
        for file in self._files:
            try:
                if isinstance(file, InvalidRequest):
                    raise file
                for where, name, value in _parser_of(file)(file):
                    yield _entry(file, where, name, value)
            except InvalidRequest as error:
                yield Refused(name=None, values={}, error=error)


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
    """All records of all files at once, with ``overrides`` (fields of a request) instead of their
    own, and with ``said`` (fields of a record).

    ``patterns`` are files or globs. Every mistake is found, not only the first: each names its
    file, its record and its field.
    """
    with TemporaryDirectory(prefix="cosmos3-input-") as folder:
        items = list(Source(input_files(patterns, Path(folder)), overrides, said).items())
    records = tuple(item for item in items if isinstance(item, Record))
    return Batch(records=records, refused=tuple(x for x in items if isinstance(x, Refused)))


def input_files(patterns: Sequence[str], cache: Path) -> list[InputFile | InvalidRequest]:
    """Every file once, those of a glob in the order of their names; URLs are fetched to ``cache``."""
    found: dict[str | InvalidRequest, None] = {}
    for pattern in map(os.path.expanduser, patterns):  # leaves users that nobody knows
        try:
            matches = _matches(pattern)
        except InvalidRequest as error:
            found[error] = None
            continue
        found |= dict.fromkeys(matches)
        if not matches:
            found[InvalidRequest(INPUT, shown(pattern), "a pattern that matches a file")] = None
    return [
        x if isinstance(x, InvalidRequest) else _local(x, cache, n) for n, x in enumerate(found)
    ]


def _matches(pattern: str) -> list[str]:
    """The files of a pattern, in the order of their names; a name without a pattern as it is."""
    if not glob.has_magic(pattern):
        return [pattern]
    if not is_url(pattern):
        exists = Path(pattern).exists()
        return [pattern] if exists else sorted(glob.glob(pattern, recursive=True))
    if scheme_of(pattern) in HTTP:  # whose questions begin with a mark of patterns
        return [pattern]
    with reaching(INPUT, pattern, "a pattern of files that can be read"):
        system, place = file_system(pattern)
        return sorted(system.unstrip_protocol(match) for match in system.glob(place))


def _local(location: str, cache: Path, number: int) -> InputFile | InvalidRequest:
    """A batch file, fetched if it is a URL."""
    if not is_url(location):
        path = Path(location)
        return InputFile(path=path, called=location, folder=parent_of(path))
    name = Path(shown(location)).name
    path = cache / str(number) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        fetch(INPUT, location, path)
    except InvalidRequest as error:
        return error
    return InputFile(path=path, called=shown(location), folder=parent_of(location))


def _check_names(record: Record, places: Mapping[str, tuple[str, str]]) -> None:
    """Refuse a name that another record has, and a wrong one to continue; ``places`` has where the
    records before are, and who serves them."""
    if record.name in places:
        possible = f"another one, as {places[record.name][0]} has it"
        raise InvalidRequest("name", record.name, possible, "conflict")
    source = record.continue_from
    if source is not None and (source not in places or places[source][1] == REASONER):
        raise InvalidRequest("continue_from", source, "the name of a record before this one")


def _entry(file: InputFile, where: str, name: str, value: Any) -> Entry | Refused:
    if not isinstance(value, Mapping):
        possible = "an object with the fields of a record"
        if isinstance(value, Unreadable):
            value, possible = value.text, f"a {value.format} object ({value.reason})"
        error = InvalidRequest(where, value, possible, "invalid_type")
        named = Entry(where=where, folder=file.folder, name=name, values={})
        return Refused(name=folder_of(named), values={}, error=error)
    for caption, fields in CAPTIONS.items():
        if caption in value and not value.keys() & {"prompt", "prompt_path", "model_mode"}:
            value = {"prompt": value, **fields}
            break
    return Entry(where=where, folder=file.folder, name=name, values=value)


# What a file holds: where each value stands, what its record is called, and the value.


def _lines(file: InputFile) -> Iterator[tuple[str, str, Any]]:
    index = offset = 0
    with _reading(file):
        opened = file.path.open("rb")
    with opened:
        for number, line in enumerate(opened, 1):
            text = _decoded(file, line, offset)
            offset += len(line)
            if text.strip():
                yield f"{file.called} line {number}", f"{file.path.stem}_{index}", _json_of(text)
                index += 1


def _json(file: InputFile) -> Iterator[tuple[str, str, Any]]:
    return _one_or_list(file, _json_of(_text(file)))


def _json_of(text: str) -> Any:
    try:
        return read_json(text.rstrip())
    except ValueError as error:
        return Unreadable(text=text.strip(), format="JSON", reason=str(error))


def _yaml(file: InputFile) -> Iterator[tuple[str, str, Any]]:
    import yaml

    text = _text(file)
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # of a date that is none, or thousands of digits
        reason = " ".join(str(error).split())
        value = Unreadable(text=text.strip(), format="YAML", reason=reason)
    except RecursionError:
        value = Unreadable(text=text.strip(), format="YAML", reason="nested too deeply")
    return _one_or_list(file, value)


def _one_or_list(file: InputFile, value: Any) -> Iterator[tuple[str, str, Any]]:
    if not isinstance(value, list):
        yield file.called, file.path.stem, value
        return
    for index, item in enumerate(value):
        yield f"{file.called} record {index + 1}", f"{file.path.stem}_{index}", item


def _text(file: InputFile) -> str:
    with _reading(file):
        data = file.path.read_bytes()
    return _decoded(file, data, 0)


@contextmanager
def _reading(file: InputFile) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InvalidRequest(INPUT, file.called, f"a file that can be read ({reason})") from None


def _decoded(file: InputFile, data: bytes, offset: int) -> str:
    """The text of a part of a file that begins at ``offset``, where there may be a mark of UTF-8."""
    try:
        return data.decode("utf-8" if offset else "utf-8-sig")
    except UnicodeDecodeError as error:
        possible = f"UTF-8, which it is not at byte {offset + error.start}"
        raise InvalidRequest(INPUT, file.called, possible) from None


Parser = Callable[[InputFile], Iterator[tuple[str, str, Any]]]
_PARSERS: dict[str, Parser] = {
    ".json": _json,
    ".jsonl": _lines,
    ".yaml": _yaml,
    ".yml": _yaml,
}


def _parser_of(file: InputFile) -> Parser:
    parse = _PARSERS.get(file.path.suffix.lower())
    if parse is None:
        raise InvalidRequest(INPUT, file.called, f"a file of type {', '.join(_PARSERS)}")
    return parse
