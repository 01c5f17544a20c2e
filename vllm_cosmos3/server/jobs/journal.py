"""The job journal: SQLite and a folder per job, shared by all API processes of one storage.

A job is written when it is accepted, when it starts, about twice a second while it runs, and when
it ends. Each process holds a lock on a file of its own; a lock that nobody holds any more means
that the jobs of that process were interrupted.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import sqlite3
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from vllm_cosmos3.errors import InvalidRequest

QUEUED, RUNNING, COMPLETED, FAILED = "queued", "in_progress", "completed", "failed"
ENDED = (COMPLETED, FAILED)

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


@dataclass(slots=True, kw_only=True)
class Job:
    """One request for pictures, from acceptance to expiry. All of it is JSON."""

    id: str
    kind: str  # video, or sync and image, which are not listed
    model: str
    prompt: str
    created: float
    body: str = ""  # hash of the request, against repeated sending
    key: str | None = None  # the client's Idempotency-Key
    status: str = QUEUED
    progress: int = 0
    phase: str = "queued"
    step: int = 0
    num_steps: int = 0
    work: float = 0.0  # what it costs: see estimates
    eta: float | None = None  # seconds
    position: int | None = None
    started: float | None = None
    completed: float | None = None
    expires: float | None = None
    removed: bool = False
    bytes: int = 0
    remixed_from: str | None = None
    continued_from: str | None = None
    frames_before: int = 0  # of the video that this one goes on from, without the shared frame
    upsampled_prompt: str | None = None
    request: dict[str, Any] = field(default_factory=dict)  # as asked, for a remix
    effective: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)  # of what is effective
    warnings: list[str] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    peak_memory: int = 0
    usage: dict[str, float] = field(default_factory=dict)
    guardrails: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] | None = None
    files: list[str] = field(default_factory=list)
    action: dict[str, Any] | None = None

    @property
    def ended(self) -> bool:
        return self.status in ENDED


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

    def add(self, job: Job) -> Job | None:
        """Write a new job; if its key was used before, the job that has it is given instead."""
        try:
            self._run(
                "insert into jobs (id, kind, owner, status, created, key, body, document)"
                " values (?, ?, ?, ?, ?, ?, ?, ?)",
                (job.id, job.kind, self.owner, job.status, job.created, job.key, job.body, _text(job)),
            )  # fmt: skip
        except sqlite3.IntegrityError:
            return self._one("key = ?", job.key)
        return None

    def save(self, job: Job) -> None:
        """Write what has changed of a job."""
        self._run(
            "update jobs set status=?, expires=?, bytes=?, removed=?, document=? where id=?",
            (job.status, job.expires, job.bytes, job.removed, _text(job), job.id),
        )

    def get(self, name: str) -> Job | None:
        """A job, unless it is unknown or deleted."""
        return self._one("id = ? and deleted = 0", name)

    def by_key(self, key: str) -> Job | None:
        """The job that was made with an Idempotency-Key."""
        return self._one("key = ?", key)

    def recent(self, body: str, seconds: float) -> Job | None:
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

    def page(self, *, after: str | None, limit: int, newest_first: bool) -> list[Job] | None:
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
        return [_job(row[0]) for row in rows]

    def doomed(self) -> list[str]:
        """Jobs of this process that were deleted, perhaps by another one."""
        rows = self._run("select id from jobs where deleted = 1 and owner = ?", (self.owner,))
        return [row[0] for row in rows]

    def orphans(self) -> list[Job]:
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
                    jobs.append(_job(document))
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
            job = _job(document)
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

    def _one(self, where: str, *values: object) -> Job | None:
        rows = self._run(f"select document from jobs where {where}", values)
        return _job(rows[0][0]) if rows else None

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


def _text(job: Job) -> str:
    return json.dumps(asdict(job))


def _job(document: str) -> Job:
    values: Mapping[str, Any] = json.loads(document)
    return Job(**values)
