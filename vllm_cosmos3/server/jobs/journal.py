"""The job journal: SQLite and a folder per job, shared by all API processes of one storage.

A job is written when it is accepted, when it starts, about twice a second while it runs, and when
it ends. Each process holds a lock on a file of its own; a lock that nobody holds any more means
that the jobs of that process were interrupted.

The columns decide; the document beside them is the rest of a job. A row whose document cannot be
read, as a newer version or a damaged disk may leave one, is in no list, expires as others do, and can
be deleted.
"""

from __future__ import annotations

import fcntl
import logging
import shutil
import sqlite3
import threading
import time
import uuid
from pathlib import Path
from typing import IO, Any

from vllm_cosmos3.errors import Cosmos3Error, DiskFull
from vllm_cosmos3.server.jobs.video_job import ENDED, UnreadableRecord, VideoJob
from vllm_cosmos3.server.storage import NAME, SPARE, Storage, StorageLost, bytes_in, unusable

logger = logging.getLogger(__name__)

VERSION = 1  # of the schema, in the file's user_version; versions before it said 0
LEFT_SECONDS = 600.0  # until a folder that no job names was left by a dead process

_SCHEMA = """
create table if not exists jobs (
  number integer primary key autoincrement,
  id text not null unique,
  kind text not null,
  owner text not null,
  status text not null,
  created real not null,
  expires real,
  bytes integer not null default 0,
  removed integer not null default 0,
  deleted integer not null default 0,
  key text unique,
  body text,
  document text not null
);
create index if not exists by_owner on jobs (owner, status);
create index if not exists by_expiry on jobs (removed, expires);
"""
_READ = "select id, status, expires, bytes, removed, document from jobs where"
_COLUMNS = frozenset(["number", "id", "kind", "owner", "status", "created", "expires", "bytes", "removed", "deleted", "key", "body", "document"])  # fmt: skip


class Journal:
    """The jobs of one storage folder. Safe in several threads and processes."""

    def __init__(self, folder: Path) -> None:
        """Make the folder, or go on with what is in it.

        Raises:
            InvalidRequest: it cannot be made, or not be written to, or its journal is damaged or
                none of ours.
        """
        self.storage = Storage(folder)
        self.owner = uuid.uuid4().hex
        self.inputs = self.storage.inputs / self.owner
        self._lock, self._read_lock = threading.Lock(), threading.Lock()
        self._unreadable: set[str] = set()  # rows that were logged
        try:
            self._db = _opened(self.storage)
            self._reader = _connected(self.storage.journal_file)
            self._held = self._lock_of(self.owner)
            self.inputs.mkdir()
        except (OSError, sqlite3.Error) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise unusable(folder, reason) from None
        assert self._held is not None  # the name is new

    def close(self) -> None:
        with self._lock, self._read_lock:
            self._db.close()
            self._reader.close()
        shutil.rmtree(self.inputs, ignore_errors=True)
        (self.storage.owners / self.owner).unlink(missing_ok=True)
        if self._held is not None:
            self._held.close()

    def folder(self, name: str) -> Path:
        """The folder of a job's files."""
        return self.storage.folder(name)

    # One job.

    def add(self, job: VideoJob) -> VideoJob | None:
        """Write a new job; if its key was used before, the job that has it is given instead.

        Raises:
            UnreadableRecord: that one cannot be read.
        """
        try:
            self._run(
                "insert into jobs (id, kind, owner, status, created, key, body, document)"
                " values (?, ?, ?, ?, ?, ?, ?, ?)",
                (job.id, job.kind, self.owner, job.status, job.created, job.key, job.body, job.document()),
            )  # fmt: skip
        except sqlite3.IntegrityError:
            rows = self._run(f"{_READ} key = ?", (job.key,))
            if not rows:  # it was deleted meanwhile
                return self.add(job)
            found = self._loaded(rows[0])
            if found is None:
                raise UnreadableRecord(rows[0][0]) from None
            return found
        return None

    def save(self, job: VideoJob) -> None:
        """Write what has changed of a job."""
        self._run(
            "update jobs set status=?, expires=?, bytes=?, removed=?, document=? where id=?",
            (job.status, job.expires, job.bytes, job.removed, job.document(), job.id),
        )

    def get(self, name: str) -> VideoJob | None:
        """A job, unless it is unknown, deleted or unreadable."""
        return self._one("id = ? and deleted = 0", name)

    def holds(self, name: str) -> bool:
        """Whether there is a row of this name, readable or not."""
        return bool(self._run("select 1 from jobs where id = ? and deleted = 0", (name,)))

    def by_key(self, key: str) -> VideoJob | None:
        """The job that was made with an Idempotency-Key."""
        return self._one("key = ?", key)

    def recent(self, body: str, seconds: float) -> VideoJob | None:
        """The last job of the same request in the last ``seconds``."""
        return self._one(
            "body = ? and created > ? and deleted = 0 order by number desc limit 1",
            body,
            time.time() - seconds,
        )

    def delete(self, name: str, *, ended: bool) -> None:
        """Hide a job at once; its row and files go with `purge`.

        On a full disk the files of an ended one go first, and the room that was kept for this.
        """
        hide = "update jobs set deleted = 1, key = null where id = ?"
        try:
            self._run(hide, (name,))
        except DiskFull:
            if ended:
                self.storage.remove(name)
            self.storage.free_spare()
            self._run(hide, (name,))

    def purge(self, name: str) -> None:
        self.storage.remove(name)
        self._run("delete from jobs where id = ?", (name,))

    # Many jobs.

    def page(self, *, after: str | None, limit: int, newest_first: bool) -> list[VideoJob] | None:
        """Videos in the order of creation, ``limit`` of them; None if ``after`` is unknown."""
        number = None
        if after is not None:
            found = self._run("select number from jobs where id = ? and deleted = 0", (after,))
            if not found:
                return None
            number = found[0][0]
        order, beyond = ("desc", "<") if newest_first else ("asc", ">")
        jobs: list[VideoJob] = []
        while len(jobs) < limit:  # unreadable ones leave room for others
            where = f"and number {beyond} {int(number)}" if number is not None else ""
            rows = self._run(
                f"select number, {_READ.removeprefix('select ')} kind = 'video' and deleted = 0"
                f" {where} order by number {order} limit ?",
                (limit - len(jobs),),
            )
            if not rows:
                break
            number = rows[-1][0]
            jobs += [job for row in rows if (job := self._loaded(row[1:])) is not None]
        return jobs

    def pending_deletion(self) -> list[str]:
        """Jobs of this process that were deleted, perhaps by another one."""
        rows = self._run("select id from jobs where deleted = 1 and owner = ?", (self.owner,))
        return [row[0] for row in rows]

    def orphans(self) -> list[VideoJob]:
        """Unfinished jobs of processes that are gone; what else they left is removed."""
        owners = {path.name for path in self.storage.owners.iterdir()}
        owners |= {path.name for path in self.storage.inputs.iterdir()}
        owners |= {
            row[0]
            for row in self._run(
                "select distinct owner from jobs"
                " where deleted = 1 or status in ('queued', 'in_progress')"
            )
        }
        jobs = []
        for owner in owners - {self.owner}:
            jobs += self._orphans_of(owner)
        return jobs

    def _orphans_of(self, owner: str) -> list[VideoJob]:
        if not NAME.fullmatch(owner):
            return []  # in a row that nobody of us wrote
        lock = self._lock_of(owner)
        if lock is None:
            return []
        jobs = []
        for name, deleted, status in self._run(
            "select id, deleted, status from jobs where owner = ?", (owner,)
        ):
            if deleted:
                self.purge(name)
            elif status not in ENDED:
                job = self.get(name)
                if job is None:
                    end = "update jobs set status = 'failed', expires = ? where id = ?"
                    self._run(end, (time.time(), name))
                else:
                    jobs.append(job)
        shutil.rmtree(self.storage.inputs / owner, ignore_errors=True)
        lock.close()
        (self.storage.owners / owner).unlink(missing_ok=True)
        return jobs

    def expire(self, *, quota: int, record_ttl: float) -> list[str]:
        """Remove files that are too old or too many, then records that are too old."""
        now = time.time()
        due = [
            row[0]
            for row in self._run(
                "select id from jobs where removed = 0 and deleted = 0 and expires < ?", (now,)
            )
        ]
        over = self.stored() - quota
        if over > 0:
            for name, size in self._run(
                "select id, bytes from jobs where removed = 0 and bytes > 0 order by number"
            ):
                if over > 0:
                    due.append(name)
                    over -= size
        for name in due:
            self.storage.remove(name)
            self._run(
                "update jobs set removed = 1, bytes = 0, expires = min(coalesce(expires, ?), ?)"
                " where id = ?",
                (now, now, name),
            )
        self._run("delete from jobs where removed = 1 and created < ?", (now - record_ttl,))
        self._remove_left_folders()
        self.storage.keep_spare()
        return due

    def stored(self) -> int:
        """Bytes of all results, of those that are being made, and of inputs."""
        ended = self._run("select coalesce(sum(bytes), 0) from jobs where removed = 0")[0][0]
        unfinished = self._run("select id from jobs where status in ('queued', 'in_progress')")
        parts = [self.storage.files / name for (name,) in unfinished if NAME.fullmatch(name)]
        return int(ended) + sum(map(bytes_in, [*parts, self.storage.inputs]))

    def _remove_left_folders(self) -> None:
        """Remove folders that no job names: what a killed process was about to use."""
        before = time.time() - LEFT_SECONDS
        for folder in self.storage.folders():
            known = self._run("select 1 from jobs where id = ?", (folder.name,))
            if not known and folder.lstat().st_mtime < before:
                self.storage.remove(folder.name)

    # The database.

    def _one(self, where: str, *values: object) -> VideoJob | None:
        rows = self._run(f"{_READ} {where}", values)
        return self._loaded(rows[0]) if rows else None

    def _loaded(self, row: tuple[Any, ...]) -> VideoJob | None:
        """The job of a row, None if it cannot be read."""
        name, status, expires, size, removed, document = row
        try:
            job = VideoJob.load(document)
            job.status, job.expires, job.bytes, job.removed = status, expires, size, bool(removed)
            if job.id != name:
                raise ValueError("its document is of another job")
        except (ValueError, TypeError, RecursionError) as error:
            if name not in self._unreadable:
                self._unreadable.add(name)
                logger.warning("the record of %s cannot be read: %s", name, error)
            return None
        return job

    def _run(self, sql: str, values: tuple[object, ...] = ()) -> list[Any]:
        """The rows of a statement. Reads wait for no write, which may wait for another process."""
        reads = sql.startswith("select")
        database, lock = (self._reader, self._read_lock) if reads else (self._db, self._lock)
        try:
            with lock:
                return database.execute(sql, values).fetchall()
        except sqlite3.IntegrityError:
            raise
        except sqlite3.Error as error:
            raise self._trouble(error) from None

    def _trouble(self, error: sqlite3.Error) -> Cosmos3Error:
        """What an error of SQLite means for a client."""
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # without its details
        full = code == sqlite3.SQLITE_FULL
        try:
            free = shutil.disk_usage(self.storage.path).free
        except OSError:
            return StorageLost("the storage folder went away")
        if full or (code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN) and free < SPARE):
            return DiskFull("the disk of the storage is full: delete videos, or make room on it")
        return StorageLost(f"the journal of jobs cannot be used now ({error})")

    def _lock_of(self, owner: str) -> IO[bytes] | None:
        """The lock of a process, held until it is closed; None if that process lives."""
        file = (self.storage.owners / owner).open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        return file


def _opened(storage: Storage) -> sqlite3.Connection:
    """The database of a folder, new or checked.

    Raises:
        InvalidRequest: it is damaged, or no journal of jobs.
        sqlite3.Error: it cannot be opened.
    """
    file = storage.journal_file
    _check_whole(storage)
    database = _connected(file)
    try:
        (found,) = database.execute("pragma quick_check(1)").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(found)
        database.execute("pragma journal_mode=wal")
        database.execute("pragma synchronous=normal")
        database.execute("pragma wal_autocheckpoint=100")  # pages: a small disk has room for both
        columns = {row[1] for row in database.execute("pragma table_info(jobs)")}
        if columns and not columns >= _COLUMNS:
            raise sqlite3.DatabaseError("its table of jobs has other columns")
        database.executescript(_SCHEMA)
        # A newer version's number stays: what it added has defaults, or the columns would differ.
        if database.execute("pragma user_version").fetchone()[0] < VERSION:
            database.execute(f"pragma user_version={VERSION}")
    except sqlite3.DatabaseError as error:
        database.close()
        if isinstance(error, sqlite3.OperationalError):
            raise
        raise damaged(file, str(error)) from None
    return database


def _connected(file: Path) -> sqlite3.Connection:
    """A connection for any thread; what it cannot do within 30 seconds is an error."""
    return sqlite3.connect(file, timeout=30, isolation_level=None, check_same_thread=False)


def _check_whole(storage: Storage) -> None:
    """Stop at a journal that was cut to nothing: a new one would forget the jobs beside it."""
    file = storage.journal_file
    left = file.is_file() and file.stat().st_size == 0 and next(storage.folders(), None)
    if left:
        raise damaged(file, "it is empty, and there are results beside it")


def damaged(file: Path, reason: str) -> Cosmos3Error:
    """The one sentence about a journal that cannot be read."""
    lines = [line for line in reason.splitlines() if line.strip() and not line.startswith("***")]
    first = lines[0] if lines else "it cannot be read"
    return unusable(
        file.parent, f"its {file.name} is damaged: {first}; move that file away to start without it"
    )
