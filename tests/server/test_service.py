"""What the service does where a real server cannot be brought to it."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from limits import HANG

from vllm_cosmos3.checkpoint.adapters.adapter import Adapter
from vllm_cosmos3.checkpoint.config import read_config
from vllm_cosmos3.errors import Cosmos3Error
from vllm_cosmos3.media_budget import MediaBudget
from vllm_cosmos3.progress import Progress, Report
from vllm_cosmos3.request.presets import PresetRule
from vllm_cosmos3.request.prompts import load_tokenizer
from vllm_cosmos3.request.questions import Question
from vllm_cosmos3.server.guardrails import Guardrails
from vllm_cosmos3.server.http.metrics import Metrics
from vllm_cosmos3.server.http.request_fields import ClientRequest
from vllm_cosmos3.server.jobs import admission
from vllm_cosmos3.server.jobs.admission import Admission, Submission
from vllm_cosmos3.server.jobs.estimates import ThroughputEstimate
from vllm_cosmos3.server.jobs.inference import Inference
from vllm_cosmos3.server.jobs.job_files import RECORD
from vllm_cosmos3.server.jobs.journal import Journal
from vllm_cosmos3.server.jobs.live_jobs import LiveJobs
from vllm_cosmos3.server.jobs.video_job import COMPLETED, FAILED, VideoJob
from vllm_cosmos3.server.options import Options
from vllm_cosmos3.server.storage import StorageLost


class Lockable(Journal):
    """A journal that another process may hold."""

    locked = False

    def save(self, job: VideoJob) -> None:
        if self.locked:
            raise StorageLost("another process holds it")
        super().save(job)


def test_an_end_that_cannot_be_written_is_written_later(tmp_path: Path) -> None:
    journal, stage = Lockable(tmp_path), HandedOver()
    jobs = LiveJobs(journal, cast("Any", stage), Options(), ThroughputEstimate(), ranks=1)
    job = VideoJob(id="a", kind="video", model="m", prompt="", created=0.0)
    journal.add(job)
    budget = MediaBudget(per_request=100, total=100)
    with budget.lease() as pixels:
        pixels.reserve(60, "size")
        jobs.submit(job, cast("Any", SimpleNamespace(batch=None)), 60.0, pixels)
    assert budget.used == 60  # while it waits and runs
    journal.locked = True
    stage.future.set_exception(Cosmos3Error("no"))
    assert budget.used == 0
    assert jobs.current(job).status == FAILED  # shown while it is not written
    assert len(jobs) == 1
    with pytest.raises(StorageLost):
        jobs.write_changes()
    assert jobs.current(job).status == FAILED
    journal.locked = False
    jobs.write_changes()
    stored = journal.get("a")
    assert stored is not None
    assert stored.status == FAILED
    assert len(jobs) == 0
    journal.close()


def test_who_has_a_job_from_the_journal_is_told_its_end_though_another_deletes_it(
    tmp_path: Path,
) -> None:
    journal, stage = Journal(tmp_path), HandedOver()
    jobs = LiveJobs(journal, cast("Any", stage), Options(), ThroughputEstimate(), ranks=1)
    job = VideoJob(id="a", kind="sync", model="m", prompt="", created=0.0)
    journal.add(job)
    found = journal.get("a")  # by its key, while the stage is about to take it
    assert found is not None
    with MediaBudget(per_request=100, total=100).lease() as pixels:
        jobs.submit(job, cast("Any", SimpleNamespace(batch=None)), 60.0, pixels)

    async def wait_while_it_fails() -> VideoJob:
        waiting = asyncio.ensure_future(jobs.wait(found, HANG))
        await asyncio.sleep(0.1)  # the other looks earlier
        stage.future.set_exception(Cosmos3Error("no"))
        jobs.delete("a")
        return await waiting

    ended = asyncio.run(wait_while_it_fails())
    assert (ended.status, ended.error) == (FAILED, {"code": "internal_error", "message": "no"})
    journal.close()


def test_who_sees_that_a_job_failed_finds_it_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, stage = Journal(tmp_path), HandedOver()
    jobs = LiveJobs(journal, cast("Any", stage), Options(), ThroughputEstimate(), ranks=1)
    job = VideoJob(id="a", kind="video", model="m", prompt="", created=0.0)
    journal.add(job)
    with MediaBudget(per_request=100, total=100).lease() as pixels:
        jobs.submit(job, cast("Any", SimpleNamespace(batch=None)), 60.0, pixels)
    counted: list[tuple[str, str]] = []
    monkeypatch.setattr(Metrics, "failure", lambda _, code: counted.append((code, job.status)))
    stage.future.set_exception(Cosmos3Error("no"))
    assert job.status == FAILED
    assert counted == [("internal_error", "queued")]
    journal.close()


class HandedOver:
    """A stage with one request."""

    def __init__(self) -> None:
        self.future: Future[object] = Future()

    def submit(self, *_: object, report: Report, **__: object) -> Any:
        self.report = report
        return SimpleNamespace(progress=None, position=0, future=self.future)


def test_a_request_took_what_its_phases_took_though_all_of_it_is_told_at_once(
    tmp_path: Path,
) -> None:
    """As to a server that was held up meanwhile."""
    journal, stage, throughput = Journal(tmp_path), HandedOver(), ThroughputEstimate()
    jobs = LiveJobs(journal, cast("Any", stage), Options(), throughput, ranks=2)
    job = VideoJob(id="a", kind="video", model="m", prompt="", created=time.time(), work=10.0)
    job.effective = {"num_frames": 5, "n": 1, "fps": 24.0}
    journal.add(job)
    with MediaBudget(per_request=100, total=100).lease() as pixels:
        jobs.submit(job, cast("Any", SimpleNamespace(batch=None)), 60.0, pixels)
    record = {
        "files": [], "action": None, "peak_memory": 0, "batch_size": 1, "guardrails": {}, "warnings": [],
        "timings": {"text": 100.0, "denoise": 400.0, "per_step": 40.0},
    }  # fmt: skip
    journal.folder("a").mkdir(parents=True)
    (journal.folder("a") / RECORD).write_text(json.dumps(record))
    stage.report(Progress(phase="encode", step=0, steps=10, elapsed=0.0, eta=None))
    stage.future.set_result(None)
    assert job.status == COMPLETED
    assert job.usage["gpu_seconds"] == 1000.0
    assert throughput.seconds(job.work) == 500.0
    journal.close()


class Clock:
    """Seconds that pass when they are told to."""

    time = staticmethod(time.time)

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


def test_writing_the_prompt_counts_towards_the_deadline(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, told = Clock(), list[float]()
    monkeypatch.setattr(admission, "time", clock)

    class Reasoner:
        async def caption(self, question: Question, seconds: float) -> str:
            told.append(seconds)
            clock.now += 40
            return "a boat at sea"

    class Stage(HandedOver):
        def submit(self, *given: object, report: Report, deadline: float, **more: object) -> Any:
            told.append(deadline)
            return super().submit(*given, report=report, **more)

    options, journal = Options(guardrails="off"), Journal(tmp_path)
    jobs = LiveJobs(journal, cast("Any", Stage()), options, ThroughputEstimate(), ranks=1)
    accepting = Admission(
        jobs,
        read_config(tiny_checkpoint),
        load_tokenizer(tiny_checkpoint),
        ("tiny",),
        Guardrails(options),
        cast("Any", Reasoner()),
        PresetRule.read("", ""),
        lambda: None,
        {},
        lambda **_: 1,
    )
    asked = ClientRequest(
        fields={"prompt": "a boat", "size": "64x64", "num_frames": 5},
        server_fields={"upsample_prompt": True, "deadline_seconds": 60.0},
        references={},
        warnings=(),
    )
    job = asyncio.run(accepting.create(Submission(kind="video", request=asked, deadline=600.0)))
    assert (job.upsampled_prompt, told) == ("a boat at sea", [60.0, 20.0])
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


class Accepting:
    """Admission of whatever comes."""

    def check_open(self) -> None:
        pass

    async def plan(self, request: ClientRequest) -> Any:
        return None

    def work(self, plan: object) -> float:
        return 1.0

    async def judge(self, request: ClientRequest) -> dict[str, Any]:
        return {}


def test_a_client_that_goes_while_it_is_accepted_is_cancelled() -> None:
    stage = SlowStage()
    inference = Inference(
        cast("Any", Accepting()),
        cast("Any", None),
        cast("Any", stage),
        ThroughputEstimate(),
        deadline=60.0,
        ranks=1,
    )

    async def go() -> None:
        asking = asyncio.ensure_future(inference.infer({"prompt": "go"}))
        await asyncio.to_thread(stage.reached.wait, HANG)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert not stage.cancelled
        stage.go_on.set()
        while not stage.cancelled:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(go(), HANG))
    assert inference.running == 0


def test_the_same_request_of_other_weights_is_another_one() -> None:
    request = ClientRequest(
        fields={"prompt": "a boat"}, server_fields={}, references={}, warnings=()
    )
    asked = Submission(kind="video", request=request, deadline=1.0)
    snow, rain = (Adapter(name="a", scale=1.0, dialect="peft", digest=d, pairs={}) for d in "sr")
    digests = {
        asked.digest(),
        asked.digest([snow]),
        asked.digest([rain]),
        asked.digest([snow, rain]),
    }
    assert len(digests) == 4
    assert asked.digest([snow]) == asked.digest([snow])
