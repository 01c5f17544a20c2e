"""The index of a batch, which several runs write."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vllm_cosmos3.batch.claims import Claims
from vllm_cosmos3.batch.index import Index, line_of
from vllm_cosmos3.batch.store import LocalStore, Store

RUNS = ["a", "b", "c", "d"]
EARLIER = [f"{number:04}" for number in range(2000)]  # enough to take a while


class Run:
    """One that has made the record of its name."""

    def __init__(self, name: str, store: Store, folder: Path) -> None:
        (folder / name).mkdir()
        self.store, self.index, self.claims = store, Index(folder / name, [name]), Claims(store)
        self.claims.start((0, 1))
        self.index.add(line_of(name, {"status": "success"}))

    def write(self) -> None:
        self.index.write(self.store, self.claims)

    def close(self) -> None:
        self.claims.close()
        self.index.close()


@pytest.fixture
def runs(store: Store, tmp_path: Path) -> Iterator[list[Run]]:
    made = [Run(name, store, tmp_path) for name in RUNS]
    yield made
    for run in made:
        run.close()
    assert store.names("") == ["index.jsonl"]


def names_in(store: Store) -> list[str]:
    lines = (store.read("index.jsonl") or b"").splitlines()
    return sorted(json.loads(line)["name"] for line in lines)


def test_runs_that_write_at_once_keep_the_lines_of_the_others(
    store: Store, runs: list[Run]
) -> None:
    store.write("index.jsonl", b"".join(b'{"name": "%s"}\n' % x.encode() for x in EARLIER))
    with ThreadPoolExecutor(len(runs)) as pool:
        list(pool.map(Run.write, runs))
    assert names_in(store) == EARLIER + RUNS


class Sleepy(LocalStore):
    """A store whose reader of the index sleeps until another run has taken it for dead and is done."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.meanwhile: Run | None = None

    def read(self, name: str) -> bytes | None:
        found = super().read(name)
        other = self.meanwhile
        if name == "index.jsonl" and other is not None:
            self.meanwhile = None
            for state in self.names(".cosmos3/runs"):
                self.delete(f".cosmos3/runs/{state}")
            other.write()
        return found


def test_a_run_that_was_taken_for_dead_writes_again(tmp_path: Path) -> None:
    store = Sleepy(tmp_path / "out")
    slow, other = Run("slow", store, tmp_path), Run("other", store, tmp_path)
    store.meanwhile = other
    slow.write()
    assert names_in(store) == ["other", "slow"]
    slow.close()
    other.close()
