"""Claims of several runs on one store: one gets a record, and the dead lose theirs."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Protocol

import pytest
from botocore.exceptions import EndpointConnectionError
from fsspec.implementations.memory import MemoryFileSystem
from generators import eventually
from limits import HANG

from vllm_cosmos3.batch.claims import CLAIMS, RUNS, STALE_SECONDS, Claims, _process
from vllm_cosmos3.batch.store import LocalStore, Store, store_at


class Begin(Protocol):
    def __call__(self, store: Store, share: tuple[int, int] = ...) -> Claims: ...


@pytest.fixture
def claims(monkeypatch: pytest.MonkeyPatch) -> Iterator[Begin]:
    """Begins a run, which has no second heartbeat that would undo what a test does, and ends with the test."""
    monkeypatch.setattr("vllm_cosmos3.batch.claims.HEARTBEAT_SECONDS", HANG)
    with ExitStack() as runs:

        def begin(store: Store, share: tuple[int, int] = (0, 1)) -> Claims:
            made = Claims(store)
            made.start(share)
            runs.callback(made.close)
            return made

        yield begin


def left_by(store: Store, name: str, state: dict[str, object]) -> None:
    """What a run leaves that ended without a word."""
    store.write(f"{RUNS}/old.json", json.dumps({"run": "old", "share": [0, 1], **state}).encode())
    assert store.create(f"{CLAIMS}/{name}.0", b"old")


def test_one_of_two_runs_gets_a_record(store: Store, claims: Begin) -> None:
    first, second = claims(store), claims(store)
    assert first.take("a.b")
    assert not second.take("a.b")
    assert second.take("c")
    assert first.holds("a.b")
    first.release("a.b")
    assert second.take("a.b")
    first.close()
    second.close()
    assert store.names("") == []


def test_one_of_many_at_once_gets_a_record(store: Store, claims: Begin) -> None:
    several = [claims(store) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        taken = list(pool.map(lambda one: [one.take(str(n)) for n in range(8)], several))
    assert [sum(column) for column in zip(*taken, strict=True)] == [1] * 8
    for one in several:
        one.close()
    assert store.names("") == []


def test_one_of_two_threads_creates_a_file_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though fsspec looks first and creates then."""
    store = store_at(f"memory://{uuid.uuid4().hex}")
    exists, both = MemoryFileSystem.exists, threading.Barrier(2)

    def seen_by_both(system: MemoryFileSystem, path: str, **options: object) -> bool:
        found: bool = exists(system, path, **options)
        with suppress(threading.BrokenBarrierError):
            both.wait(0.5)
        return found

    monkeypatch.setattr(MemoryFileSystem, "exists", seen_by_both)
    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(lambda _: store.create("a", b""), range(2))) == [False, True]


@pytest.mark.parametrize("way", ["create", "write"])
def test_a_folder_that_another_run_removes_as_empty_is_made_again(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed: list[Path] = []
    mkdir = Path.mkdir

    def made_and_removed(path: Path, *arguments: object, **options: object) -> None:
        mkdir(path, *arguments, **options)  # type: ignore[arg-type]
        if path.name == "claims" and not removed:
            removed.append(path)
            path.rmdir()

    monkeypatch.setattr(Path, "mkdir", made_and_removed)
    store = LocalStore(tmp_path)
    getattr(store, way)(f"{CLAIMS}/a.0", b"run")
    assert removed
    assert store.read(f"{CLAIMS}/a.0") == b"run"


def test_the_claim_of_a_process_that_ended_is_taken_over(store: Store, claims: Begin) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        left_by(store, "a", _process(process.pid))
        run = claims(store)
        assert run.left == {"a"}
        assert not run.take("a")  # it lives
        process.kill()
    assert run.take("a")
    assert not claims(store).take("a")
    run.close()
    assert store.names(RUNS) != ["old.json"]


def test_a_run_of_another_machine_is_dead_when_it_stops_beating(store: Store) -> None:
    now = 0.0
    left_by(store, "a", {"machine": "other", "pid": 1, "started": "1", "beat": 0})
    run = Claims(store, clock=lambda: now)
    assert not run.take("a")
    assert run.undecided()
    now = STALE_SECONDS - 1
    state = {"run": "old", "share": [0, 1], "machine": "other", "pid": 1, "started": "1", "beat": 1}
    store.write(f"{RUNS}/old.json", json.dumps(state).encode())
    assert not run.take("a")
    assert not run.undecided()  # it has moved
    now += STALE_SECONDS - 1
    assert not run.take("a")
    now += 1
    assert run.take("a")


def test_claims_that_are_being_written_are_not_those_of_one_dead_run(store: Store) -> None:
    now = 0.0
    run = Claims(store, clock=lambda: now)
    assert store.create(f"{CLAIMS}/a.0", b"")
    assert not run.take("a")
    now = STALE_SECONDS - 1
    assert store.create(f"{CLAIMS}/b.0", b"")
    assert not run.take("b")
    now = STALE_SECONDS
    assert not run.take("b")
    assert run.take("a")  # nobody will write it any more
    now = 2 * STALE_SECONDS - 1
    assert run.take("b")


class Outage(LocalStore):
    """A store that cannot be written to for a while, and says so in words of its own, as s3fs does."""

    broken = False

    def write(self, name: str, data: bytes) -> None:
        if self.broken:
            self.broken = False
            raise EndpointConnectionError(endpoint_url="http://nowhere")
        super().write(name, data)


def test_a_run_lives_on_after_an_outage(
    claims: Begin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("vllm_cosmos3.batch.claims.HEARTBEAT_SECONDS", 0.01)
    store = Outage(tmp_path)
    run = claims(store)
    store.broken = True
    eventually(lambda: not store.broken)
    before = store.read(f"{RUNS}/{run.run}.json")
    eventually(lambda: store.read(f"{RUNS}/{run.run}.json") != before)
    run.close()
    assert "the heartbeat of this run was not written" in caplog.text
    assert "nowhere" in caplog.text


def test_a_slow_run_sees_that_it_has_lost_a_record(store: Store, claims: Begin) -> None:
    slow = claims(store)
    assert slow.take("a")
    store.delete(f"{RUNS}/{slow.run}.json")  # as if it had been taken for dead
    other = claims(store)
    assert other.take("a")
    assert not slow.holds("a")
    assert other.holds("a")
    slow.release("a")
    assert not claims(store).take("a")  # it is the other's to give up
    assert slow.take("b")
    store.delete(f"{RUNS}/{slow.run}.json")
    assert other.take("b")
    other.release("b")
    assert not slow.holds("b")  # nobody does


def test_runs_of_other_shards_are_no_rivals(store: Store, claims: Begin) -> None:
    claims(store, (0, 2))
    run = claims(store, (1, 2))
    assert not run.rivals((1, 2))
    assert run.rivals((0, 2))
    assert run.rivals((1, 3))
    assert run.rivals((0, 1))


def test_a_worker_that_replaces_a_dead_one_of_its_run_takes_its_claim(
    store: Store, claims: Begin
) -> None:
    run = claims(store)
    assert Claims(store, run.run).take("a")
    assert Claims(store, run.run).take("a")
    assert not claims(store).take("a")
