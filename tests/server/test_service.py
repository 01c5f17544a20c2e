"""What the service does where a real server cannot be brought to it."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import pytest

from vllm_cosmos3.runtime.core import Status
from vllm_cosmos3.server.jobs import COMPLETED, Job, Journal
from vllm_cosmos3.server.service import Service


class Lockable(Journal):
    """A journal that another process may hold."""

    locked = False

    def save(self, job: Job) -> None:
        if self.locked:
            raise sqlite3.OperationalError("database is locked")
        super().save(job)


class Bookkeeping(Service):
    """The part of a service that writes jobs down."""

    def __init__(self, journal: Lockable) -> None:
        self.journal = journal
        self._own: dict[str, Job] = {}
        self._changed: set[str] = set()
        self._stage_jobs = {}
        self._lock = threading.Lock()

    def status(self, timeout: float = 1.0) -> Status:
        return Status(state="ready")


def test_an_end_that_cannot_be_written_is_written_later(tmp_path: Path) -> None:
    journal = Lockable(tmp_path)
    at = Bookkeeping(journal)
    job = Job(id="a", kind="video", model="m", prompt="", created=0.0)
    journal.add(job)
    at._own["a"] = job
    job.status, journal.locked = COMPLETED, True
    for _ in range(2):
        with pytest.raises(sqlite3.OperationalError):
            at._keep(job)
        assert at.get("a").status == COMPLETED  # shown while it is not written
    with pytest.raises(sqlite3.OperationalError):
        at._write_changes()
    journal.locked = False
    at._write_changes()
    stored = journal.get("a")
    assert stored is not None
    assert stored.status == COMPLETED
    assert (at._own, at._changed) == ({}, set())
    journal.close()
