"""Index of a batch: ``index.jsonl`` in the output, one line for each record with what became of it."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from vllm_cosmos3.batch.claims import Claims
from vllm_cosmos3.batch.store import Store

SECONDS = 300.0  # after which the file is brought up to date


def line_of(
    name: str, outputs: Mapping[str, Any], *, shard: str | None = None, attempts: int = 1
) -> dict[str, Any]:
    """The line of a record, from its ``sample_outputs.json``. Files are seen from the output."""
    made = outputs.get("outputs", [])
    failed = outputs.get("status") != "success"
    return {
        "name": name,
        "status": "error" if failed else "success",
        "files": [f"{name}/{file}" for output in made for file in output["files"]],
        "shard": shard,
        "seeds": [x["content"]["seed"] for x in made if "seed" in x["content"]],
        "timings": outputs.get("timings", {}),
        "captions": [x["content"]["caption"] for x in made if "caption" in x["content"]],
        "error": outputs.get("message", "") if failed else None,
        "warnings": outputs.get("warnings", []),
        "attempts": attempts,
    }


class Index:
    """The lines of one run, on the local disk until they are written to the output.

    ``names`` are the records of the run. Lines of others stay in the file: of records of earlier runs,
    and of those that another run makes meanwhile.
    """

    def __init__(self, folder: Path, names: Collection[str], file: str = "index.jsonl") -> None:
        self._path, self._names, self._file = folder / file, set(names), file
        self._spool = self._path.open("w+b")
        self._places: dict[str, int] = {}  # of the last line of each record
        self._failed: set[str] = set()

    def add(self, line: Mapping[str, Any]) -> None:
        """The line of a record, in place of an earlier one."""
        name = str(line["name"])
        self._names.add(name)
        self._places[name] = self._spool.seek(0, 2)
        self._spool.write(json.dumps(line).encode() + b"\n")
        (self._failed.add if line["status"] == "error" else self._failed.discard)(name)

    def leave(self, name: str) -> None:
        """Another run has a record, and writes its line."""
        self._names.discard(name)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    @property
    def done(self) -> int:
        """How many records have their results."""
        return len(self._places) - len(self._failed)

    @property
    def failed(self) -> int:
        """How many have none."""
        return len(self._failed)

    def write(self, store: Store, claims: Claims) -> None:
        """Bring the file in the output up to date, while no other run does."""
        claim = f".{self._file}"
        written = False
        while not written:  # again if another run has taken this one for dead meanwhile
            with claims.alone(claim):
                part = self._merged(store.read(self._file) or b"")
                if written := claims.holds(claim):
                    store.put(part, self._file)

    def _merged(self, before: bytes) -> Path:
        """A local file with the lines of this run, and of those ``before`` the ones of others."""
        part = self._path.with_suffix(".part")
        with part.open("wb") as file:
            for line in before.splitlines(keepends=True):
                if _name_of(line) not in self._names:
                    file.write(line)
            file.writelines(self._lines())
        return part

    def _lines(self) -> Iterator[bytes]:
        self._spool.seek(0)
        place = 0
        for line in self._spool:
            if self._places[_name_of(line)] == place:
                yield line
            place += len(line)

    def close(self) -> None:
        """Free the local copy."""
        self._spool.close()


def _name_of(line: bytes) -> str:
    try:
        return str(json.loads(line)["name"])
    except (ValueError, LookupError, TypeError):
        return ""
