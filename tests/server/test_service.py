"""What the service does where a real server cannot be brought to it."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from limits import HANG

from vllm_cosmos3.engine_options import EngineConfig
from vllm_cosmos3.server.http.metrics import metrics
from vllm_cosmos3.server.http.request_fields import Asked
from vllm_cosmos3.server.jobs.estimates import Pace
from vllm_cosmos3.server.jobs.journal import COMPLETED, Job, Journal
from vllm_cosmos3.server.jobs.service import Service
from vllm_cosmos3.server.options import Options
from vllm_cosmos3.stage.process import Status


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


class SlowStage:
    """Takes a request when it is told to."""

    def __init__(self) -> None:
        self.reached, self.go_on, self.cancelled = threading.Event(), threading.Event(), False

    def submit(self, *_: object, **__: object) -> Any:
        self.reached.set()
        assert self.go_on.wait(HANG)
        return SimpleNamespace(progress=None, future=Future[object](), cancel=self._cancel)

    def _cancel(self) -> None:
        self.cancelled = True


class Accepting(Service):
    """The part of a service that hands requests of robots to the stage."""

    def __init__(self, stage: SlowStage) -> None:
        self.stage = cast("Any", stage)
        self.metrics = metrics()
        self._inferring = 0
        self.options = Options()
        self.sizing = cast("Any", SimpleNamespace(engine=EngineConfig(model=Path("tiny"))))
        self.model = cast("Any", SimpleNamespace(transformer=SimpleNamespace(latent_patch_size=2)))
        self._pace = Pace()

    def _check_open(self) -> None:
        pass

    async def _plan(self, asked: Asked, media: Mapping[str, Any]) -> Any:
        return None

    async def _guarded(self, asked: Asked) -> dict[str, Any]:
        return {}


def test_a_client_that_goes_while_it_is_accepted_is_cancelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vllm_cosmos3.server.jobs.estimates.work", lambda *_: 1.0)
    stage = SlowStage()
    at = Accepting(stage)

    async def go() -> None:
        asking = asyncio.ensure_future(at.infer({"prompt": "go"}))
        await asyncio.to_thread(stage.reached.wait, 60)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert not stage.cancelled
        stage.go_on.set()
        while not stage.cancelled:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(go(), 60))
    assert at._inferring == 0
