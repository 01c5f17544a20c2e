"""What the routes answer where a real server is not brought to it every time: races, broken files."""

from __future__ import annotations

import shutil
import time
from base64 import b64decode
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import anyio
import httpx
import pytest
from limits import HANG
from starlette.requests import Request

from vllm_cosmos3.errors import Cosmos3Error, DiskFull
from vllm_cosmos3.server.app import Listen, make_app
from vllm_cosmos3.server.jobs.admission import Submission
from vllm_cosmos3.server.jobs.estimates import ThroughputEstimate
from vllm_cosmos3.server.jobs.job_files import CLIP
from vllm_cosmos3.server.jobs.journal import Journal
from vllm_cosmos3.server.jobs.live_jobs import LiveJobs
from vllm_cosmos3.server.jobs.service import Service
from vllm_cosmos3.server.jobs.video_job import COMPLETED, FAILED, VideoJob
from vllm_cosmos3.server.options import Options
from vllm_cosmos3.server.routes.videos import _accepted, _events, remixed
from vllm_cosmos3.server.storage import StorageLost
from vllm_cosmos3.stage.messages import Status

pytestmark = pytest.mark.anyio
EFFECTIVE = {"mode": "text2video", "num_frames": 5, "fps": 24.0, "output_size": "64x64", "seed": 1}
USAGE = {"frames": 1, "output_seconds": 1.0, "steps": 1, "gpu_seconds": 1.0}
CONTENT = bytes(range(256)) * 4000  # several chunks


class Stored(Service):
    """A service that makes nothing: it has the jobs of a journal."""

    def __init__(self, storage: Path) -> None:
        self.options = Options(storage_path=str(storage))
        self.names = ("tiny",)
        self.draining = False
        self.use(Journal(storage))

    def use(self, journal: Journal) -> None:
        """Have the jobs of this journal."""
        self.journal = journal
        self.jobs = LiveJobs(
            journal, cast("Any", None), self.options, ThroughputEstimate(), ranks=1
        )

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        self.journal.close()

    def status(self, timeout: float = 1.0) -> Status:
        return Status(state="ready")

    def finished(self, name: str, kind: str = "video") -> VideoJob:
        """A completed video."""
        job = VideoJob(id=name, kind=kind, model="tiny", prompt="", created=0.0, status=COMPLETED)
        job.effective, job.expires = EFFECTIVE, time.time() + 60
        self.journal.folder(name).mkdir(parents=True)
        (self.journal.folder(name) / CLIP).write_bytes(CONTENT)
        self.journal.add(job)
        self.journal.save(job)
        return job


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def at(tmp_path: Path) -> Iterator[Stored]:
    made = Stored(tmp_path)
    yield made
    made.journal.close()


@asynccontextmanager
async def client(at: Service, **listen: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the app around a service."""
    app = make_app(lambda: at, Listen(**listen))
    app.state.cosmos3 = at
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as made:
        yield made


async def test_a_job_deleted_while_the_page_is_read_is_left_out(at: Stored) -> None:
    class Deleting(Journal):
        def page(self, **question: Any) -> list[VideoJob] | None:
            jobs = super().page(**question)
            self.delete("b", ended=False)
            return jobs

    at.finished("a")
    job = VideoJob(id="b", kind="video", model="tiny", prompt="", created=0.0, effective=EFFECTIVE)
    at.journal.add(job)
    at.journal.close()
    at.use(Deleting(at.journal.storage.path))
    async with client(at) as http:
        answer = await http.get("/v1/videos")
    assert answer.status_code == 200
    assert [job["id"] for job in answer.json()["data"]] == ["a"]
    assert answer.json()["last_id"] == "a"


@pytest.mark.parametrize(("known", "status", "code"), [(True, 410, "expired"), (False, 404, "not_found")])  # fmt: skip
async def test_a_file_that_goes_before_it_is_opened(
    known: bool, status: int, code: str, at: Stored
) -> None:
    """By its age, or with its job."""

    class Losing(Journal):
        def folder(self, name: str) -> Path:
            shutil.rmtree(super().folder(name), ignore_errors=True)
            if not known:
                self.delete(name, ended=True)
            return super().folder(name)

    at.finished("a")
    at.journal.close()
    at.use(Losing(at.journal.storage.path))
    async with client(at) as http:
        answer = await http.get("/v1/videos/a/content")
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize(
    "fields",
    [{}, {"output_format": "jpeg"}, {"response_format": "file"}, {"response_format": "url", "output_format": "webp"}],
    ids=["png", "jpeg", "file", "url"],
)  # fmt: skip
@pytest.mark.parametrize(("known", "status", "code"), [(True, 410, "expired"), (False, 409, "cancelled")])  # fmt: skip
async def test_pictures_that_go_before_they_are_read(
    known: bool, status: int, code: str, fields: dict[str, Any], at: Stored
) -> None:
    """To make room, or by somebody who deletes them."""

    class Losing:
        async def create(self, submission: Submission) -> VideoJob:
            job = at.finished("image_a", kind="image")
            job.files = ["0.png"]
            at.journal.storage.remove(job.id)
            if not known:
                at.jobs.delete(job.id)
            return job

    at.admission = cast("Any", Losing())
    at.options = replace(at.options, storage_quota=90_000)
    async with client(at) as http:
        answer = await http.post("/v1/images/generations", json={"prompt": "a boat", **fields})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code)
    assert ("--storage-quota 90000" in error["message"]) == known


@pytest.mark.parametrize(
    ("path", "kind", "file"),
    [("videos/sync", "sync", CLIP), ("images/generations", "image", "0.png")],
)
async def test_what_is_finished_is_sent_though_it_cannot_be_deleted(
    path: str, kind: str, file: str, at: Stored, caplog: pytest.LogCaptureFixture
) -> None:
    answer = await answer_of_undeletable(at, path, kind, [file])
    assert answer.status_code == 200, answer.text
    sent = answer.content if kind == "sync" else b64decode(answer.json()["data"][0]["b64_json"])
    assert sent == CONTENT
    assert "a cannot be deleted: the journal of jobs cannot be used now" in caplog.text


async def test_why_nothing_was_made_is_told_though_it_cannot_be_deleted(at: Stored) -> None:
    error = {"code": "out_of_memory", "message": "it needs more"}
    answer = await answer_of_undeletable(at, "videos/sync", "sync", [], error=error)
    assert answer.json()["error"]["code"] == "out_of_memory"


async def answer_of_undeletable(
    at: Stored, path: str, kind: str, files: list[str], error: dict[str, str] | None = None
) -> httpx.Response:
    """The answer to a request whose job ends while the journal can be read and not written."""

    class Made:
        async def create(self, submission: Submission) -> VideoJob:
            job = at.finished("a", kind=kind)
            job.files, job.error = files, error
            job.status = FAILED if error else COMPLETED
            job.timings, job.usage = {"total": 1.0}, USAGE
            job.effective = EFFECTIVE | {"size": "64x64"}
            for name in files:
                (at.journal.folder("a") / name).write_bytes(CONTENT)
            at.journal._db.close()
            return job

    at.admission = cast("Any", Made())
    async with client(at) as http:
        return await http.post(f"/v1/{path}", json={"prompt": "a boat"})


async def test_a_download_goes_on_when_its_video_is_deleted(at: Stored) -> None:
    at.finished("a")
    async with client(at) as http, anyio.create_task_group():
        sent: list[bytes] = []
        app: Any = http._transport.app  # type: ignore[attr-defined]
        scope = http.build_request("GET", "/v1/videos/a/content")
        head: dict[str, Any] = {}

        async def receive() -> dict[str, Any]:
            await anyio.sleep_forever()
            raise AssertionError

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                head.update(message)
                at.jobs.delete("a")
                assert not at.journal.folder("a").exists()
            else:
                sent.append(message.get("body", b""))

        await app(
            {
                "type": "http", "method": "GET", "path": scope.url.path, "query_string": b"",
                "headers": [], "root_path": "", "scheme": "http", "server": ("server", 80),
                "client": ("client", 1), "http_version": "1.1", "asgi": {"spec_version": "2.4"},
            },
            receive,
            send,
        )  # fmt: skip
    assert head["status"] == 200
    assert b"".join(sent) == CONTENT


SIZE = len(CONTENT)


@pytest.mark.parametrize(
    ("asked", "status", "content_range"),
    [
        ("bytes=abc", 200, None),
        ("bytes=5-2", 200, None),
        ("bytes=-", 200, None),
        ("bytes=1-2,x", 200, None),
        ("items=0-1", 200, None),
        ("bytes", 200, None),
        ("bytes=10-19", 206, f"bytes 10-19/{SIZE}"),
        ("Bytes = 10-19", 206, f"bytes 10-19/{SIZE}"),
        ("bytes=-500", 206, f"bytes {SIZE - 500}-{SIZE - 1}/{SIZE}"),
        (f"bytes=-{SIZE + 5}", 206, f"bytes 0-{SIZE - 1}/{SIZE}"),
        (f"bytes={SIZE - 1}-", 206, f"bytes {SIZE - 1}-{SIZE - 1}/{SIZE}"),
        (f"bytes=0-1,{SIZE}-", 206, f"bytes 0-1/{SIZE}"),
        (f"bytes={SIZE}-", 416, f"bytes */{SIZE}"),
        ("bytes=-0", 416, f"bytes */{SIZE}"),
        (f"bytes={10**30}-", 416, f"bytes */{SIZE}"),
    ],
)
async def test_ranges(asked: str, status: int, content_range: str | None, at: Stored) -> None:
    """As RFC 9110, 14.2, has it."""
    at.finished("a")
    async with client(at) as http:
        answer = await http.get("/v1/videos/a/content", headers={"Range": asked})
    assert (answer.status_code, answer.headers.get("content-range")) == (status, content_range)
    if status == 200:
        assert answer.content == CONTENT
    elif status == 206:
        first, last = (content_range or "").removeprefix("bytes ").split("/")[0].split("-")
        assert answer.content == CONTENT[int(first) : int(last) + 1]
    else:
        assert answer.json()["error"]["code"] == "range_not_satisfiable"
        assert answer.headers["x-request-id"]


async def test_several_ranges_and_conditions(at: Stored) -> None:
    at.finished("a")
    async with client(at) as http:
        whole = await http.get("/v1/videos/a/content")
        two = await http.get("/v1/videos/a/content", headers={"Range": "bytes=0-1,-2"})
        assert two.status_code == 206
        assert two.headers["content-type"].startswith("multipart/byteranges")
        for value, status in ((whole.headers["etag"], 206), ('"other"', 200)):
            headers = {"Range": "bytes=0-1", "If-Range": value}
            part = await http.get("/v1/videos/a/content", headers=headers)
            assert part.status_code == status


async def test_every_failure_has_our_shape(at: Stored) -> None:
    """Also of what is outside of our routes, such as a middleware."""
    at.finished("a")
    app = make_app(lambda: at, Listen())
    app.state.cosmos3 = at

    @app.middleware("http")
    async def broken(request: Any, call_next: Any) -> Any:
        raise ValueError("of the middleware")

    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
        answer = await http.get("/v1/videos", headers={"x-request-id": "mine"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert answer.headers["x-request-id"] == "mine"


async def test_a_request_without_a_key_has_an_id(at: Stored) -> None:
    async with client(at, api_keys=("secret",), origins=("http://a.example",)) as http:
        answer = await http.get("/v1/videos", headers={"Origin": "http://a.example"})
    assert answer.status_code == 401
    assert answer.headers["x-request-id"]
    assert answer.headers["access-control-allow-origin"] == "http://a.example"


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/nothing", 404), ("PUT", "/v1/videos", 405)])  # fmt: skip
async def test_a_browser_may_read_errors(method: str, path: str, status: int, at: Stored) -> None:
    async with client(at, origins=("http://a.example",)) as http:
        answer = await http.request(method, path, headers={"Origin": "http://a.example"})
        assert (answer.status_code, answer.json()["error"]["type"]) == (status, "invalid_request_error")  # fmt: skip
        assert answer.headers["access-control-allow-origin"] == "http://a.example"
        assert answer.headers["vary"] == "Origin"


async def test_a_refused_preflight_says_why(at: Stored) -> None:
    async with client(at, origins=("http://a.example",)) as http:
        headers = {"Origin": "http://b.example", "Access-Control-Request-Method": "POST"}
        answer = await http.options("/v1/videos", headers=headers)
    assert answer.status_code == 400
    assert "Disallowed CORS origin" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "param", "seconds"),
    [
        ({}, None, 10),
        ({"deadline_seconds": 20}, "deadline_seconds", 590),
        ({"extra_params": {"deadline_seconds": 20.5}}, "extra_params.deadline_seconds", 590),
    ],
)
async def test_a_wait_that_is_too_long(
    fields: dict[str, Any], param: str | None, seconds: int, tmp_path: Path
) -> None:
    """The header says when it will not be: the default deadline is 600 seconds."""

    class Busy(LiveJobs):
        def estimated_wait(self) -> float:
            return 610.0

    busy = Stored(tmp_path)
    busy.jobs.__class__ = Busy
    async with client(busy) as http:
        answer = await http.post("/v1/videos/sync", json={"prompt": "a boat", **fields})
    busy.journal.close()
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (503, "estimated_wait_exceeds_deadline")
    assert (error["param"], int(answer.headers["retry-after"])) == (param, seconds)


async def test_metrics_go_on_when_the_storage_is_gone(tmp_path: Path) -> None:
    class Asked(Stored):
        asked = 0

        def replicas(self) -> list[dict[str, Any]]:
            self.asked += 1
            return []

    at, told = Asked(tmp_path / "storage"), []
    at.when_ready = lambda: told.append("ready")
    at.journal.close()
    for _ in range(2):
        with pytest.raises(Cosmos3Error):
            at._tick()
    assert (at.asked, told) == (2, ["ready"])


@pytest.mark.parametrize("error", [StorageLost, DiskFull])
async def test_events_go_on_while_the_storage_is_away(
    error: type[Cosmos3Error], at: Stored
) -> None:
    class Away(Journal):
        def holds(self, name: str) -> bool:
            raise error("it cannot be read now")

    job = VideoJob(id="a", kind="video", model="tiny", prompt="", created=0.0, effective=EFFECTIVE)
    at.journal.add(job)
    at.jobs._jobs["a"] = job

    async def receive() -> dict[str, str]:
        await anyio.sleep(HANG)
        return {"type": "http.disconnect"}

    with anyio.fail_after(HANG):
        events = _events(at, Request({"type": "http", "headers": []}, receive), job)
        assert (await anext(events)).startswith("event: progress\n")
        at.journal.__class__ = Away
        job.progress = 50
        assert '"progress": 50' in await anext(events)
        job.status = COMPLETED
        assert (await anext(events)).startswith("event: completed\n")


async def test_events_end_where_a_record_cannot_be_read_any_more(at: Stored) -> None:
    job = VideoJob(id="a", kind="video", model="tiny", prompt="", created=0.0, effective=EFFECTIVE)
    at.journal.add(job)

    async def receive() -> dict[str, str]:
        await anyio.sleep(HANG)
        return {"type": "http.disconnect"}

    with anyio.fail_after(HANG):
        events = _events(at, Request({"type": "http", "headers": []}, receive), job)
        assert (await anext(events)).startswith("event: progress\n")
        at.journal._run("update jobs set document = 'x'")
        told = await anext(events)
        with pytest.raises(StopAsyncIteration):
            await anext(events)
    assert told.startswith("event: error\n")
    assert "the record of video 'a' cannot be read" in told


async def test_nobody_waits_for_a_client_that_went_away(at: Stored) -> None:
    class Unfinished(LiveJobs):
        async def wait(self, job: VideoJob, seconds: float) -> VideoJob:
            await anyio.sleep(min(seconds, HANG))
            return job

    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    at.jobs.__class__ = Unfinished
    job = VideoJob(id="a", kind="video", model="tiny", prompt="", created=0.0, effective=EFFECTIVE)
    request = Request({"type": "http", "headers": [(b"prefer", b"wait=3600")]}, receive)
    with anyio.fail_after(HANG):
        await _accepted(at, request, job)


REQUEST = {"prompt": "a boat", "width": 64, "height": 96, "num_frames": 5, "fps": 12.0}


@pytest.mark.parametrize(
    ("source", "fields", "expected"),
    [
        (REQUEST, {"seconds": 2}, REQUEST | {"num_frames": None, "seconds": 2}),
        (REQUEST, {"size": "64x64"}, REQUEST | {"width": None, "height": None, "size": "64x64"}),
        (REQUEST, {"width": 96}, REQUEST | {"width": 96}),
        ({"size": "64x64", "seconds": 2}, {"width": 96, "height": 64, "num_frames": 9}, {"width": 96, "height": 64, "num_frames": 9}),
        ({"prompt_token_ids": [1], "negative_prompt": "b"}, {"prompt": "a", "negative_prompt_token_ids": [2]}, {"prompt": "a", "negative_prompt_token_ids": [2]}),
        ({"generate_sound": True, "sound_duration": 1.0}, {"generate_sound": False}, {"generate_sound": False}),
        ({"generate_sound": True, "sound_duration": 1.0}, {"sound_duration": 2.0}, {"generate_sound": True, "sound_duration": 2.0}),
    ],
)  # fmt: skip
def test_a_remix_replaces_what_it_says_in_other_words(
    source: dict[str, Any], fields: dict[str, Any], expected: dict[str, Any]
) -> None:
    job = VideoJob(id="a", kind="video", model="tiny", prompt="", created=0.0)
    job.request, job.effective = source, EFFECTIVE
    wanted = {name: value for name, value in expected.items() if value is not None}
    assert remixed(job, fields) == wanted | {"seed": 1}
