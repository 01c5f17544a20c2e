"""The journal and its folder, whatever versions, disks and other people did to them."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from generators import eventually

from vllm_cosmos3.errors import DiskFull, InvalidRequest
from vllm_cosmos3.server import storage as storages
from vllm_cosmos3.server.jobs.journal import VERSION, Journal
from vllm_cosmos3.server.jobs.video_job import COMPLETED, UnreadableRecord, VideoJob
from vllm_cosmos3.server.options import Options
from vllm_cosmos3.server.storage import StorageLost, default_folder

EFFECTIVE = {"mode": "text2video", "num_frames": 5, "fps": 24.0, "output_size": "64x64", "seed": 1}


def video(name: str, **facts: Any) -> VideoJob:
    values = {"kind": "video", "model": "m", "prompt": "", "effective": EFFECTIVE}
    return VideoJob(**{"id": name, "created": time.time(), **values, **facts})


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    made = Journal(tmp_path)
    yield made
    made.close()


def changed(journal: Journal, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Write another document for a job, as another version or a broken disk does."""
    ((text,),) = journal._run("select document from jobs where id = ?", (name,))
    values = json.loads(text)
    result = change(values)
    text = result if isinstance(result, str) else json.dumps(values)
    journal._run("update jobs set document = ? where id = ?", (text, name))


UNREADABLE: dict[str, Callable[[dict[str, Any]], object]] = {
    "cut": lambda values: json.dumps(values)[:20],
    "empty": lambda values: "",
    "a list": lambda values: "[]",
    "null": lambda values: "null",
    "no id": lambda values: values.pop("id") and None,
    "another id": lambda values: values.update(id="x"),
    "a wrong type": lambda values: values.update(step="many"),
    "null for a list": lambda values: values.update(warnings=None),
    "deep": lambda values: "[" * 100_000,
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_row_that_cannot_be_read_harms_no_other(kind: str, journal: Journal) -> None:
    for name in ("a", "b", "c"):
        journal.add(video(name))
        journal.folder(name).mkdir()
    changed(journal, "b", UNREADABLE[kind])
    for newest_first in (True, False):
        page = journal.page(after=None, limit=2, newest_first=newest_first)
        assert page is not None
        assert {job.id for job in page} == {"a", "c"}
    assert journal.get("b") is None
    assert journal.holds("b")
    journal._run("update jobs set owner = 'gone' where id = 'b'")
    assert journal.orphans() == []
    assert journal.expire(quota=10**9, record_ttl=10**9) == ["b"]
    assert not journal.folder("b").exists()
    journal.delete("b", ended=True)
    journal.purge("b")
    assert not journal.holds("b")


def test_reading_waits_for_no_write_of_another_process(journal: Journal) -> None:
    journal.add(video("a"))
    other = sqlite3.connect(journal.storage.journal_file, isolation_level=None)
    other.execute("begin immediate")
    with ThreadPoolExecutor() as pool:
        written = pool.submit(journal.add, video("b"))
        eventually(journal._lock.locked)
        assert journal.get("a") is not None
        assert journal.page(after=None, limit=9, newest_first=True)
        assert not written.done()
        other.execute("commit")
        assert written.result() is None
    other.close()
    assert journal.get("b") is not None


def test_a_key_is_of_one_job_whether_it_can_be_read_or_not(tmp_path: Path) -> None:
    class Losing(Journal):
        """Another process deletes a job when it is looked for."""

        def _run(self, sql: str, values: tuple[object, ...] = ()) -> list[Any]:
            if "key = ?" in sql:
                super().delete("a", ended=False)
            return super()._run(sql, values)

    for kind in (Journal, Losing):
        journal = kind(tmp_path / kind.__name__)
        assert journal.add(video("a", key="key")) is None
        changed(journal, "a", UNREADABLE["cut"])
        if kind is Journal:
            with pytest.raises(UnreadableRecord, match="'a'"):
                journal.add(video("b", key="key"))
        else:
            assert journal.add(video("b", key="key")) is None
        assert journal.holds("b") == (kind is Losing)
        journal.close()


@pytest.mark.parametrize("lost", EFFECTIVE)
def test_a_record_that_lacks_a_part_is_told_as_such(lost: str, journal: Journal) -> None:
    journal.add(video("a"))
    changed(journal, "a", lambda values: values["effective"].pop(lost) and None)
    job = journal.get("a")
    assert job is not None
    with pytest.raises(UnreadableRecord, match="DELETE"):
        job.public()


def test_fields_of_a_newer_version_are_kept_and_not_shown(journal: Journal) -> None:
    journal.add(video("a"))
    changed(journal, "a", lambda values: values.update(lease=1))
    job = journal.get("a")
    assert job is not None
    assert "lease" not in job.public()
    job.status = COMPLETED
    journal.save(job)
    ((text,),) = journal._run("select document from jobs")
    assert json.loads(text)["lease"] == 1


def test_documents_of_the_first_version_go_on_loading(journal: Journal) -> None:
    """They had the same names, and fewer of them."""
    journal.add(video("a"))
    first = {"id": "a", "kind": "video", "model": "m", "prompt": "x", "created": 1.5, "key": None,
             "status": "completed", "effective": EFFECTIVE, "usage": {"frames": 5, "output_seconds": 0.2, "steps": 2, "gpu_seconds": 1.0}}  # fmt: skip
    changed(journal, "a", lambda _: json.dumps(first))
    journal._run("update jobs set status = 'completed'")
    job = journal.get("a")
    assert job is not None
    shown = job.public()
    assert (shown["created_at"], shown["usage"]["frames"], shown["fps"]) == (1, 5, 24.0)


@pytest.mark.parametrize(("found", "kept"), [(0, VERSION), (VERSION, VERSION), (99, 99)])
def test_journals_of_other_versions_are_opened(found: int, kept: int, tmp_path: Path) -> None:
    Journal(tmp_path).close()
    with sqlite3.connect(tmp_path / "jobs.sqlite") as database:
        database.execute(f"pragma user_version={found}")
        database.execute("alter table jobs add column lease text default ''")
    database.close()
    journal = Journal(tmp_path)
    journal.add(video("a"))
    assert journal.get("a") is not None
    assert journal._run("pragma user_version") == [(kept,)]
    journal.close()


def cut(file: Path) -> None:
    file.write_bytes(b"")


def damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[4096:8192] = os.urandom(4096)
    file.write_bytes(data)


def replace_by_text(file: Path) -> None:
    file.write_text("my shopping list, which is no database " * 200)


def other_table(file: Path) -> None:
    file.unlink()
    with sqlite3.connect(file) as database:
        database.execute("create table jobs (id text)")
    database.close()


@pytest.mark.parametrize("harm", [cut, damage, replace_by_text, other_table])
def test_a_damaged_journal_is_one_sentence(harm: Callable[[Path], None], tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for index in range(50):
        journal.add(video(f"video_{index}"))
    journal.folder("video_0").mkdir()
    journal.close()
    harm(tmp_path / "jobs.sqlite")
    with pytest.raises(InvalidRequest) as refusal:
        Journal(tmp_path)
    assert "jobs.sqlite" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["file", "file/below", "zero\0byte", "x" * 300])
def test_a_folder_that_cannot_be_is_one_sentence(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequest, match="a folder that can keep jobs and files"):
        Journal(tmp_path / name)


@pytest.mark.parametrize("change", [
    "status = 'dancing'", "created = 'abc'", "expires = 'soon'", "expires = 9e999", "bytes = 'x'", "removed = 'yes'",
    "kind = 'odd'", "owner = '../../x', status = 'in_progress'", "document = x'ff00'", "deleted = 1, owner = 'gone'",
])  # fmt: skip
def test_a_row_with_odd_columns_harms_no_other(change: str, journal: Journal) -> None:
    for index in range(3):
        journal.add(video(f"video_{index}"))
    journal._run(f"update jobs set {change} where id = 'video_1'")
    for _ in range(2):
        listed = journal.page(after=None, limit=20, newest_first=True)
        assert {"video_0", "video_2"} <= {job.id for job in listed}
        journal.orphans()
        journal.expire(quota=10**9, record_ttl=10**9)
        journal.stored()


@pytest.mark.parametrize("name", ["../victim", "..", "/etc", "a/b", "", "a\0b", "x" * 200])
def test_no_name_of_a_row_leads_elsewhere(name: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    journal = Journal(tmp_path / "storage")
    journal._run(
        "insert into jobs (id, kind, owner, status, created, expires, document)"
        " values (?, 'video', ?, 'completed', 1, 1, ?)",
        (name, "../../victim", json.dumps({**json.loads(video("a").document()), "id": name})),
    )
    journal._run("update jobs set status = 'queued'")
    journal.orphans()
    journal.stored()
    journal.expire(quota=1, record_ttl=10**9)
    journal.purge(name)
    assert victim.is_dir()
    with pytest.raises(StorageLost):
        journal.folder(name)
    journal.close()


def test_what_killed_servers_left_is_removed(tmp_path: Path) -> None:
    dead = Journal(tmp_path)
    dead.add(video("unfinished"))
    for folder in (dead.inputs, dead.folder("unnamed"), dead.folder("unfinished")):
        folder.mkdir(exist_ok=True)
        (folder / "clip").write_bytes(bytes(1000))
    os.utime(dead.folder("unnamed"), (1, 1))
    held, dead._held = dead._held, None
    assert held is not None
    held.close()  # as the system does for a process that is killed
    alive = Journal(tmp_path)
    assert alive.stored() == 2000  # the unfinished job, and the input
    assert [job.id for job in alive.orphans()] == ["unfinished"]
    alive.expire(quota=10**9, record_ttl=10**9)
    assert not dead.inputs.exists()
    assert not dead.folder("unnamed").exists()
    assert dead.folder("unfinished").exists()
    assert list(alive.storage.owners.iterdir()) == [alive.storage.owners / alive.owner]
    alive.close()
    dead._db.close()


def test_a_folder_that_goes_away_is_noticed(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "storage")
    journal.storage.check()
    (tmp_path / "storage").rename(tmp_path / "away")
    with pytest.raises(StorageLost):
        journal.storage.check()
    (tmp_path / "storage").mkdir()  # another one
    with pytest.raises(StorageLost):
        journal.storage.check()
    (tmp_path / "storage").rmdir()
    (tmp_path / "away").rename(tmp_path / "storage")
    journal.storage.check()
    journal.close()


def test_the_default_storage_is_of_the_user_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert Options().storage == tmp_path / "vllm-cosmos3"
    default_folder().mkdir(mode=0o777)
    default_folder().chmod(0o777)
    Journal(Options().storage).close()
    assert default_folder().stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(storages.os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(InvalidRequest, match="storage-path"):
        Journal(Options().storage)
    monkeypatch.setenv("XDG_STATE_HOME", "relative/counts/not")
    assert default_folder() == Path("~/.local/state/vllm-cosmos3").expanduser()


class Filled:
    """A disk that is full as long as a video and the spare room are there."""

    def __init__(self, journal: Journal) -> None:
        self.journal, self.room = journal, 0
        self.run = journal._run
        journal._run = self.refuse  # type: ignore[method-assign]

    def refuse(self, sql: str, values: tuple[object, ...] = ()) -> list[Any]:
        storage = self.journal.storage
        if sql.startswith("update") and (storage.path / "spare").exists():
            raise DiskFull("no room")
        return self.run(sql, values)


def test_deleting_works_on_a_full_disk(journal: Journal) -> None:
    journal.add(video("a", status=COMPLETED))
    journal.folder("a").mkdir()
    assert (journal.storage.path / "spare").stat().st_size == storages.SPARE
    Filled(journal)
    journal.delete("a", ended=True)
    assert not journal.folder("a").exists()
    assert journal.get("a") is None
    journal.storage.keep_spare()
    assert (journal.storage.path / "spare").stat().st_size == storages.SPARE
