"""WebDataset shards of a batch: finished results, packed into tar files that are read in sequence.

``shard-000007.tar`` holds the samples, ``shard-000007.jsonl`` a line of the index for each record in
it. The order makes killing harmless: the tar, then its lines, which make it count, then the folders
of the results and their claims go. A tar without lines is written over.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import Any

from vllm_cosmos3.batch.claims import Claims
from vllm_cosmos3.batch.index import line_of
from vllm_cosmos3.batch.store import Store

ARGUMENTS, OUTPUTS = "sample_args.json", "sample_outputs.json"  # in the folder of a result


class Packs:
    """The shards in a store, those of other runs included, and new ones."""

    def __init__(self, store: Store, claims: Claims) -> None:
        self._store, self._claims = store, claims
        self._known: set[str] = set()
        self._places: dict[str, tuple[str, str]] = {}  # of records: digest, and lines of the shard
        self._lines = lru_cache(4)(self._read)

    def line(self, name: str, digest: str) -> dict[str, Any] | None:
        """The line of a record that is in a shard, None if it is in none as it is now."""
        for shard in self._shards():
            if shard not in self._known:
                for line in self._lines(shard).values():
                    self._places[line["name"]] = line["digest"], shard
                self._known.add(shard)
        found, shard = self._places.get(name, ("", ""))
        return self._lines(shard)[name] if found == digest else None

    def empty(self) -> bool:
        """Whether there is no shard yet."""
        return not self._shards()

    def pack(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Pack the results of records, which this run has claimed, into a new shard. The lines of
        the index for them."""
        number = self._number()
        shard = f"shard-{number:06d}"
        lines = []
        with TemporaryDirectory(prefix="cosmos3-shard-") as folder:
            tar = Path(folder) / f"{shard}.tar"
            with tar.open("wb") as file:
                from webdataset import TarWriter

                writer = TarWriter(file, encoder=False)
                for name in names:
                    outputs = json.loads(self._store.read(f"{name}/{OUTPUTS}") or b"{}")
                    members = []
                    for sample in self._samples(name, outputs):
                        writer.write(sample)
                        members += [f"{sample['__key__']}.{x}" for x in sample if x != "__key__"]
                    line = line_of(name, outputs, shard=f"{shard}.tar")
                    lines.append(line | {"files": members, "digest": outputs["digest"]})
                writer.close()
            self._store.put(tar, f"{shard}.tar")
        text = "".join(json.dumps(line) + "\n" for line in lines)
        self._store.write(f"{shard}.jsonl", text.encode())
        for name in names:
            self.remove(name)
        self._claims.release(_claim(number))
        return lines

    def remove(self, name: str) -> None:
        """The folder of a result that is in a shard goes, and then its claim."""
        for file in self._store.names(name):
            self._store.delete(f"{name}/{file}")
        self._store.delete(name)
        if self._claims.holds(name) or self._claims.take(name):
            self._claims.release(name)

    def _shards(self) -> list[str]:
        names = self._store.names("")
        return [name for name in names if name.startswith("shard-") and name.endswith(".jsonl")]

    def _read(self, shard: str) -> Mapping[str, dict[str, Any]]:
        lines = map(json.loads, (self._store.read(shard) or b"").splitlines())
        return {line["name"]: line for line in lines}

    def _number(self) -> int:
        """The number of a new shard, which no other run gets."""
        shards = self._shards()
        number = int(shards[-1][len("shard-") : -len(".jsonl")]) + 1 if shards else 0
        while not self._claims.take(_claim(number)) or self._store.exists(
            f"shard-{number:06d}.jsonl"
        ):
            self._claims.release(_claim(number))
            number += 1
        return number

    def _samples(self, name: str, outputs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The samples of a result, one for each seed: its files by suffix, what it is, and a text."""
        arguments = outputs["args"]
        several = len(outputs["outputs"]) > 1
        for index, output in enumerate(outputs["outputs"]):
            content = output["content"]
            text = content.get("caption") or content.get("text") or arguments.get("prompt") or ""
            about = {
                "name": name,
                "content": content,
                "args": arguments,
                "timings": outputs["timings"],
            }
            sample: dict[str, Any] = {"__key__": f"{_key(name)}-{index}" if several else _key(name)}
            for file in output["files"]:
                suffix = PurePath(file).suffix.removeprefix(".")
                ending = "actions.json" if suffix == "json" else suffix
                sample[ending] = self._store.read(f"{name}/{file}")
            yield sample | {"json": json.dumps(about, default=str).encode(), "txt": text.encode()}


def _key(name: str) -> str:
    """The key of a sample, which ends at its first dot."""
    if "." not in name:
        return name
    return f"{name.replace('.', '_')}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _claim(number: int) -> str:
    return f".shard-{number:06d}"
