"""The job journal: SQLite and a folder per job, shared by all API processes of one storage.

A job is written when it is accepted, when it starts, about twice a second while it runs, and when
it ends. Each process holds a lock on a file of its own; a lock that nobody holds any more means
that the jobs of that process were interrupted.
"""

from __future__ import annotations

import fcntl
import shutil
import sqlite3
import threading
import time
import uuid
from pathlib import Path
from typing import IO, Any

from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.server.jobs.video_job import ENDED, VideoJob

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


class Journal:
    """The jobs of one storage folder. Safe in several threads and processes."""

    def __init__(self, storage: Path) -> None:
        """Make the folder, or go on with what is in it.

        Raises:
            InvalidRequest: it cannot be made, or not be written to, or holds another journal.
        """
        self.storage = storage
        self.owner = uuid.uuid4().hex
        self._lock = threading.Lock()
        try:
            (storage / "owners").mkdir(parents=True, exist_ok=True)
            self._db = _opened(storage / "jobs.sqlite")
            self._held = self._lock_of(self.owner)
        except (OSError, sqlite3.Error) as error:
            reason = getattr(error, "strerror", None) or error
            possible = f"a folder that can keep jobs and files ({reason})"
            raise InvalidRequest("storage_path", str(storage), possible) from None
        assert self._held is not None  # the name is new

    def close(self) -> None:
        with self._lock:
            self._db.close()
        (self.storage / "owners" / self.owner).unlink(missing_ok=True)
        if self._held is not None:
            self._held.close()

    def folder(self, name: str) -> Path:
        return self.storage / "files" / name

    # One job.

    def add(self, job: VideoJob) -> VideoJob | None:
        """Write a new job; if its key was used before, the job that has it is given instead."""
        try:
            self._run(
                "insert into jobs (id, kind, owner, status, created, key, body, document)"
                " values (?, ?, ?, ?, ?, ?, ?, ?)",
                (job.id, job.kind, self.owner, job.status, job.created, job.key, job.body, job.document()),
            )  # fmt: skip
        except sqlite3.IntegrityError:
            return self._one("key = ?", job.key)
        return None

    def save(self, job: VideoJob) -> None:
        """Write what has changed of a job."""
        self._run(
            "update jobs set status=?, expires=?, bytes=?, removed=?, document=? where id=?",
            (job.status, job.expires, job.bytes, job.removed, job.document(), job.id),
        )

    def get(self, name: str) -> VideoJob | None:
        """A job, unless it is unknown or deleted."""
        return self._one("id = ? and deleted = 0", name)

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

    def delete(self, name: str) -> None:
        """Hide a job at once; its row and files go with `purge`."""
        self._run("update jobs set deleted = 1, key = null where id = ?", (name,))

    def purge(self, name: str) -> None:
        shutil.rmtree(self.folder(name), ignore_errors=True)
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
        where = f"and number {beyond} {int(number)}" if number is not None else ""
        rows = self._run(
            f"select document from jobs where kind = 'video' and deleted = 0 {where}"
            f" order by number {order} limit ?",
            (limit,),
        )
        return [VideoJob.load(row[0]) for row in rows]

    def pending_deletion(self) -> list[str]:
        """Jobs of this process that were deleted, perhaps by another one."""
        rows = self._run("select id from jobs where deleted = 1 and owner = ?", (self.owner,))
        return [row[0] for row in rows]

    def orphans(self) -> list[VideoJob]:
        """Unfinished jobs of processes that are gone; their deleted ones are forgotten."""
        owners = self._run(
            "select distinct owner from jobs where owner != ?"
            " and (deleted = 1 or status in ('queued', 'in_progress'))",
            (self.owner,),
        )
        jobs = []
        for (owner,) in owners:
            lock = self._lock_of(owner)
            if lock is None:
                continue
            rows = self._run(
                "select id, deleted, status, document from jobs where owner = ?", (owner,)
            )
            for name, deleted, status, document in rows:
                if deleted:
                    self.purge(name)
                elif status not in ENDED:
                    jobs.append(VideoJob.load(document))
            lock.close()
            (self.storage / "owners" / owner).unlink(missing_ok=True)
        return jobs

    def expire(self, *, quota: int, record_ttl: float) -> list[str]:
        """Remove files that are too old or too many, then records that are too old."""
        now = time.time()
        due = self._run(
            "select document from jobs where removed = 0 and deleted = 0 and expires < ?", (now,)
        )
        over = self.stored() - quota
        if over > 0:
            oldest = self._run(
                "select document, bytes from jobs where removed = 0 and bytes > 0 order by number"
            )
            for document, size in oldest:
                if over > 0:
                    due.append((document,))
                    over -= size
        names = []
        for (document,) in due:
            job = VideoJob.load(document)
            shutil.rmtree(self.folder(job.id), ignore_errors=True)
            job.removed, job.bytes = True, 0
            job.expires = min(job.expires or now, now)
            self.save(job)
            names.append(job.id)
        self._run("delete from jobs where removed = 1 and created < ?", (now - record_ttl,))
        return names

    def stored(self) -> int:
        """Bytes of all results."""
        return int(self._run("select coalesce(sum(bytes), 0) from jobs where removed = 0")[0][0])

    # The database.

    def _one(self, where: str, *values: object) -> VideoJob | None:
        rows = self._run(f"select document from jobs where {where}", values)
        return VideoJob.load(rows[0][0]) if rows else None

    def _run(self, sql: str, values: tuple[object, ...] = ()) -> list[Any]:
        with self._lock:
            return self._db.execute(sql, values).fetchall()

    def _lock_of(self, owner: str) -> IO[bytes] | None:
        """The lock of a process, held until it is closed; None if that process lives."""
        file = (self.storage / "owners" / owner).open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        return file


def _opened(file: Path) -> sqlite3.Connection:
    database = sqlite3.connect(file, timeout=30, isolation_level=None, check_same_thread=False)
    try:
        database.execute("pragma journal_mode=wal")
        database.execute("pragma synchronous=normal")
        database.executescript(_SCHEMA)
    except sqlite3.Error:
        database.close()
        raise
    return database
