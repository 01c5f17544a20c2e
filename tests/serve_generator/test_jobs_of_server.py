"""Jobs of a running server: progress, ranges, cancelling, waiting, load, slow and huge uploads."""

from __future__ import annotations

import asyncio
import json
import math
import re
import socket
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import Any

import httpx
import psutil
import pytest
from generators import LONG, SMALL, WAIT, create, eventually, finished, idle, suspended
from limits import HANG
from servers import Server

from vllm_cosmos3.server.jobs.journal import Journal

pytestmark = pytest.mark.serve
# With fewer httpx closes idle connections in one thread that another one has just chosen.
MANY = httpx.Limits(max_connections=200, max_keepalive_connections=200)


def get(server: Server, path: str, **options: Any) -> httpx.Response:
    return httpx.get(f"{server.url}{path}", timeout=HANG, **options)


def running(server: Server, job: dict[str, Any]) -> dict[str, Any]:
    """The job when it is denoising."""
    seen = [job]

    def is_running() -> bool:
        seen.append(get(server, f"/v1/videos/{job['id']}").json())
        return bool(seen[-1]["cosmos3"]["step"] > 0)

    eventually(is_running)
    return seen[-1]


def sample(server: Server, family: str) -> float:
    """The sum of one family on the metrics page."""
    found = re.findall(rf"^{family}(?:{{.*}})? (\S+)$", get(server, "/metrics").text, re.MULTILINE)
    assert found, family
    return sum(map(float, found))


def test_the_event_stream_is_monotonic_to_the_end(generator_server: Server) -> None:
    fields = SMALL | {"num_inference_steps": 200, "size": "128x128"}
    with ExitStack() as stack:
        with suspended(generator_server):  # it does not end before anybody looks
            job = create(generator_server, **fields)
            url = f"{generator_server.url}/v1/videos/{job['id']}/events"
            stream = stack.enter_context(httpx.stream("GET", url, timeout=HANG))
            coming = events_of(stream)
            events = [next(coming)]
        events += coming
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert [name for name, _ in events[:-1]] == ["progress"] * (len(events) - 1)
    assert len(events) >= 2
    assert events[-1][0] == events[-1][1]["status"] == "completed"
    shares = [job["progress"] for _, job in events]
    assert shares == sorted(shares)
    assert shares[-1] == 100


def events_of(stream: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and jobs."""
    name = ""
    for line in stream.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def test_ranges_and_heads_of_the_file(generator_server: Server) -> None:
    job = finished(generator_server, create(generator_server, **SMALL))
    path = f"/v1/videos/{job['id']}/content"
    whole = get(generator_server, path)
    assert whole.headers["accept-ranges"] == "bytes"
    part = get(generator_server, path, headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, whole.content[10:20])
    assert part.headers["content-range"] == f"bytes 10-19/{len(whole.content)}"
    beyond = get(generator_server, path, headers={"Range": "bytes=99999999-"})
    assert beyond.status_code == 416
    for headers in ({}, {"Range": "bytes=99999999-"}):
        head = httpx.head(f"{generator_server.url}{path}", headers=headers)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == str(len(whole.content))
        assert head.headers["content-type"] == "video/mp4"
    gone = httpx.head(f"{generator_server.url}/v1/videos/video_none/content")
    assert (gone.status_code, gone.content) == (404, b"")


def test_prefer_wait_answers_at_the_end_or_in_time(generator_server: Server) -> None:
    url = f"{generator_server.url}/v1/videos"
    body = {"prompt": "a boat", **SMALL}
    answer = httpx.post(url, json=body, headers=WAIT, timeout=HANG)
    assert answer.json()["status"] == "completed"
    assert answer.headers["preference-applied"] == WAIT["Prefer"]
    answer = httpx.post(
        url, json={"prompt": "a boat", **LONG}, headers={"Prefer": "respond-async, wait=0"}
    )
    assert answer.json()["status"] in ("queued", "in_progress")
    httpx.delete(f"{url}/{answer.json()['id']}")


def test_a_remix_waits_and_is_made_once(generator_server: Server) -> None:
    first = finished(generator_server, create(generator_server, **SMALL))
    url = f"{generator_server.url}/v1/videos/{first['id']}/remix"
    headers = WAIT | {"Idempotency-Key": "a remix"}

    def remix(**fields: Any) -> httpx.Response:
        return httpx.post(url, json={"prompt": "a train", **fields}, headers=headers, timeout=HANG)

    answer = remix(seconds=0.25, width=96, height=64)
    assert answer.headers["preference-applied"] == WAIT["Prefer"]
    job = answer.json()
    assert (job["status"], job["num_frames"], job["size"]) == ("completed", 9, "96x64")
    assert remix(seconds=0.25, width=96, height=64).json()["id"] == job["id"]
    other = remix()
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_conflict")


def test_a_clip_with_a_key_is_made_once(generator_server: Server) -> None:
    """And goes on being made for a client that comes back."""
    finished(generator_server, create(generator_server, **SMALL))
    idle(generator_server)
    url = f"{generator_server.url}/v1/videos/sync"
    before = sample(generator_server, "cosmos3:requests_completed_total")
    cancelled = sample(generator_server, "cosmos3:requests_cancelled_total")
    body = {"prompt": "a boat", **SMALL, "num_inference_steps": 60, "size": "128x128"}
    headers = {"Idempotency-Key": "a clip"}
    with generator_server.connection() as connection:
        sent = headers | {"Content-Type": "application/json"}
        connection.request("POST", "/v1/videos/sync", json.dumps(body), sent)
        eventually(
            lambda: (
                sample(generator_server, "cosmos3:requests_running") == 1
                or sample(generator_server, "cosmos3:requests_completed_total") > before
            )
        )
    answers = [httpx.post(url, json=body, headers=headers, timeout=HANG) for _ in range(2)]
    assert {answer.status_code for answer in answers} == {200}
    assert answers[0].content == answers[1].content
    assert sample(generator_server, "cosmos3:requests_completed_total") == before + 1
    assert sample(generator_server, "cosmos3:requests_cancelled_total") == cancelled
    other = httpx.post(url, json=body | {"seed": 7}, headers=headers, timeout=HANG)
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_conflict")


@pytest.mark.parametrize(
    ("path", "fields", "code"),
    [
        ("videos", {"colour": "red"}, "unknown_parameter"),
        ("videos", {"fps": 1000}, "invalid_value"),
        ("videos/sync", {"input_reference": "http://127.0.0.1/a.png"}, "url_not_allowed"),
        ("videos", {"input_reference": "file:///etc/passwd"}, "path_not_allowed"),
        ("videos", {"model": "sora-2"}, "model_not_found"),
        ("images/generations", {"stream": True}, "unsupported"),
        ("images/generations", {"image": "http://127.0.0.1/a.png"}, "unsupported"),
    ],
)
def test_every_refusal_is_counted_once(
    path: str, fields: dict[str, Any], code: str, generator_server: Server
) -> None:
    def counted() -> dict[str, float]:
        found = r'^cosmos3:requests_rejected_total{reason="(.*)"} (\S+)$'
        page = get(generator_server, "/metrics").text
        return {reason: float(n) for reason, n in re.findall(found, page, re.MULTILINE)}

    before = counted()
    url = f"{generator_server.url}/v1/{path}"
    answer = httpx.post(url, json={"prompt": "a boat", **fields}, timeout=HANG)
    assert answer.json()["error"]["code"] == code
    assert httpx.get(f"{generator_server.url}/v1/videos/nope").status_code == 404  # no request
    after = counted()
    assert after.keys() - before.keys() <= {code}
    assert after[code] == before.get(code, 0) + 1
    assert sum(after.values()) == sum(before.values()) + 1


def test_requests_and_ends_of_jobs_are_logged(generator_server: Server) -> None:
    """As vLLM logs them: uvicorn's line for each request, and ours among vLLM's."""
    job = finished(generator_server, create(generator_server, **SMALL))
    get(generator_server, f"/v1/videos/{job['id']}?for=the-log")
    for line in (
        rf"vllm-cosmos3 serve: ready: {generator_server.url} \(images, videos\)\n",
        rf'INFO: .* "GET /v1/videos/{job["id"]}\?for=the-log HTTP/1.1" 200 OK',
        rf"INFO .*{job['id']} completed after [0-9.]+ s",
    ):
        eventually(lambda line=line: re.search(line, generator_server.log.read_text()) is not None)


def test_a_deleted_job_stops_within_a_step(generator_server: Server) -> None:
    idle(generator_server)
    job = running(generator_server, create(generator_server, **LONG))
    before = sample(generator_server, "cosmos3:requests_cancelled_total")
    wasted = sample(generator_server, "cosmos3:cancelled_gpu_seconds_total")
    start = time.monotonic()
    httpx.delete(f"{generator_server.url}/v1/videos/{job['id']}")
    idle(generator_server)
    eventually(lambda: sample(generator_server, "cosmos3:cancelled_gpu_seconds_total") > wasted)
    assert sample(generator_server, "cosmos3:requests_cancelled_total") == before + 1
    assert job["cosmos3"]["step"] < 200
    wasted = sample(generator_server, "cosmos3:cancelled_gpu_seconds_total") - wasted
    assert 0 < wasted < time.monotonic() - start


def test_the_file_of_a_key_is_there_however_long_others_wait(generator_server: Server) -> None:
    url = f"{generator_server.url}/v1/videos/sync"
    sent = {"json": {"prompt": "a boat", **SMALL, "seed": 77, "deadline_seconds": 20}}
    sent |= {"headers": {"Idempotency-Key": "however long"}, "timeout": HANG}
    first = httpx.post(url, **sent)
    assert first.status_code == 200, first.text
    jobs = [create(generator_server, **LONG | {"seed": seed}) for seed in range(3)]
    other = httpx.post(url, json={"prompt": "a cat", **SMALL, "deadline_seconds": 1}, timeout=HANG)
    assert other.json()["error"]["code"] == "estimated_wait_exceeds_deadline"
    again = httpx.post(url, **sent)
    for job in jobs:
        httpx.delete(f"{generator_server.url}/v1/videos/{job['id']}")
    assert again.status_code == 200, again.text
    assert again.content == first.content


def test_all_who_wait_with_a_key_are_told_why_there_is_nothing(generator_server: Server) -> None:
    idle(generator_server)
    sent = {"json": {"prompt": "a boat", **LONG, "seed": 78, "deadline_seconds": 2}}
    sent |= {"headers": {"Idempotency-Key": "told"}, "timeout": HANG}
    with ThreadPoolExecutor() as pool:
        url = f"{generator_server.url}/v1/videos/sync"
        answers = [*pool.map(lambda _: httpx.post(url, **sent), range(3))]
    assert {answer.json()["error"]["code"] for answer in answers} == {"deadline_exceeded"}


def test_who_waits_for_a_video_is_told_that_it_was_deleted(generator_server: Server) -> None:
    url = f"{generator_server.url}/v1/videos"
    refused = sample(generator_server, "cosmos3:requests_rejected_total")
    with ThreadPoolExecutor() as pool:
        sent = {"json": {"prompt": "deleted", **LONG}, "headers": WAIT}
        waiting = pool.submit(httpx.post, url, **sent, timeout=HANG)
        found: list[str] = []

        def accepted() -> bool:
            listed = get(generator_server, "/v1/videos").json()["data"]
            found.extend(job["id"] for job in listed if job["prompt"] == "deleted")
            return bool(found)

        eventually(accepted)
        assert httpx.delete(f"{url}/{found[0]}").status_code == 200
        answer = waiting.result()
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "cancelled")
    assert sample(generator_server, "cosmos3:requests_rejected_total") == refused


def test_a_client_that_goes_away_stops_its_sync_request(generator_server: Server) -> None:
    idle(generator_server)
    before = sample(generator_server, "cosmos3:requests_cancelled_total")

    async def go_away() -> None:
        async with httpx.AsyncClient(base_url=generator_server.url) as client:
            body = {"prompt": "a boat", **LONG}
            asking = asyncio.ensure_future(client.post("/v1/videos/sync", json=body))
            while (await client.get("/health")).json()["queue"]["running"] == 0:
                await asyncio.sleep(0.05)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking

    asyncio.run(go_away())
    idle(generator_server)
    eventually(lambda: sample(generator_server, "cosmos3:requests_cancelled_total") == before + 1)


def test_a_deadline_ends_a_request(generator_server: Server) -> None:
    job = finished(generator_server, create(generator_server, **LONG, deadline_seconds=0.2))
    assert (job["status"], job["error"]["code"]) == ("failed", "deadline_exceeded")
    answer = get(generator_server, f"/v1/videos/{job['id']}/content")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "job_failed")


def test_a_thousand_creates_at_once(generator_server: Server) -> None:
    idle(generator_server)
    options: dict[str, Any] = {"base_url": generator_server.url, "timeout": HANG}

    async def post_all() -> list[httpx.Response]:
        # One thread: of fifty some would not get to send their body before it is given up. Those that
        # wait for a connection wait here: httpx would look at all of them whenever one is free.
        async with httpx.AsyncClient(**options, limits=MANY) as clients:
            turn = asyncio.Semaphore(50)

            async def post(seed: int) -> httpx.Response:
                async with turn:
                    body = {"prompt": "a boat", **LONG, "seed": seed}
                    return await clients.post("/v1/videos", json=body)

            return await asyncio.gather(*map(post, range(1000)))

    with under_way(generator_server), httpx.Client(**options) as client:
        before = psutil.Process(generator_server.pid).memory_info().rss
        answers = asyncio.run(post_all())
        accepted = [a.json()["id"] for a in answers if a.status_code == 200]
        try:
            refused = [a for a in answers if a.status_code != 200]
            reasons = Counter((a.status_code, a.json()["error"]["code"]) for a in refused)
            assert reasons == {(429, "queue_full"): 1000 - len(accepted)}
            assert 8 <= len(accepted) <= 12
            assert {a.headers["x-queue-limit"] for a in refused} == {"8"}
            assert {int(a.headers["x-queue-depth"]) for a in refused} <= set(range(1, 13))
            waits = {int(a.headers["retry-after"]) for a in refused}
            assert 1 <= min(waits) <= max(waits) <= 3600

            def in_progress() -> list[dict[str, Any]]:
                videos = client.get("/v1/videos", params={"limit": 100}).json()["data"]
                return [job for job in videos if job["status"] == "in_progress"]

            def is_told_when_one_ends() -> bool:
                again = client.post("/v1/videos", json={"prompt": "a boat", **LONG})
                left = min(job["cosmos3"]["eta_s"] for job in in_progress())
                return again.headers["retry-after"] == str(min(math.ceil(left), 3600))

            with suspended(generator_server):  # what is told of the time stands still
                eventually(is_told_when_one_ends)
                listed = client.get("/v1/videos", params={"limit": 100}).json()["data"]
            assert set(accepted) <= {job["id"] for job in listed}
            queues = [job["cosmos3"]["queue"] for job in listed if job["status"] == "queued"]
            etas = [queue["eta_s"] for queue in sorted(queues, key=lambda queue: queue["position"])]
            assert len(etas) >= 6
            assert etas == sorted(etas)
            assert etas[0] > 0
            assert psutil.Process(generator_server.pid).memory_info().rss < before + 200 * 2**20
        finally:
            ends = [client.delete(f"/v1/videos/{name}").status_code for name in accepted]
        assert set(ends) == {200}
    idle(generator_server)


@contextmanager
def under_way(server: Server) -> Iterator[str]:
    """The id of a long video that is being denoised, and is deleted at the end."""
    job = create(server, **LONG)
    try:
        running(server, job)
        yield job["id"]
    finally:
        httpx.delete(f"{server.url}/v1/videos/{job['id']}", timeout=HANG)


def test_two_hundred_polls_while_denoising(generator_server: Server) -> None:
    with (
        under_way(generator_server) as job,
        httpx.Client(base_url=generator_server.url, timeout=HANG, limits=MANY) as client,
    ):

        def poll(_: int) -> httpx.Response:
            return client.get(f"/v1/videos/{job}")

        with ThreadPoolExecutor(200) as pool:
            answers = list(pool.map(poll, range(200)))
        assert {(a.status_code, a.json()["id"], a.json()["status"]) for a in answers} == {
            (200, job, "in_progress")
        }


def test_a_huge_upload_is_refused_while_it_streams(generator_server: Server) -> None:
    sent, answer = _trickle(generator_server, 5 * 2**30, chunk=2**16, pause=0.0)
    assert b" 413 " in answer
    assert b"payload_too_large" in answer
    assert sent < 64 * 2**20


def test_a_silent_upload_is_given_up(generator_server: Server) -> None:
    _, answer = _trickle(generator_server, 2**20, chunk=100, pause=60.0)
    assert b" 408 " in answer
    assert b"request_timeout" in answer


def test_a_trickling_upload_is_given_up(generator_server: Server) -> None:
    sent, answer = _trickle(generator_server, 2**20, chunk=10, pause=0.2)
    assert b" 408 " in answer
    assert b"request_timeout" in answer
    assert sent < 1000


def _trickle(server: Server, length: int, *, chunk: int, pause: float) -> tuple[int, bytes]:
    """Send a chunked multipart body until the server answers; bytes sent, and its answer."""
    url = httpx.URL(server.url)
    head = (
        "POST /v1/videos HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
        "Content-Type: multipart/form-data; boundary=cut\r\n\r\n"
    )
    part = b'--cut\r\nContent-Disposition: form-data; name="input_reference"; filename="a"\r\n\r\n'
    sent = 0
    with socket.create_connection((url.host, url.port or 80), timeout=HANG) as connection:
        connection.sendall(head.encode() + b"%x\r\n%s\r\n" % (len(part), part))
        connection.settimeout(0.001)
        while sent < length:
            try:
                answer = connection.recv(65536)
            except TimeoutError:
                pass
            else:
                connection.settimeout(HANG)
                with suppress(ConnectionResetError):  # of what it has not read
                    while more := connection.recv(65536):  # the body may come after the head
                        answer += more
                return sent, answer
            connection.settimeout(HANG)
            with suppress(ConnectionError):  # it has answered meanwhile, and reads no more
                connection.sendall(b"%x\r\n%s\r\n" % (chunk, bytes(chunk)))
            sent += chunk
            connection.settimeout(pause or 0.001)
    return sent, b""


def test_every_metric_family_is_there(generator_server: Server) -> None:
    timings = finished(generator_server, create(generator_server, **SMALL))["cosmos3"]["timings_s"]
    phases = {name: seconds for name, seconds in timings.items() if name not in ("queue", "per_step", "total")}  # fmt: skip
    # Not the time in the queue: the first sign of its end may come when the ranks are already at work.
    assert 0 < timings["encode"] < sum(phases.values()) <= timings["total"]
    idle(generator_server)
    assert sample(generator_server, "cosmos3:queue_limit") == 8
    for family in ("cosmos3:queue_depth", "cosmos3:requests_running"):
        eventually(lambda family=family: sample(generator_server, family) == 0)
    assert sample(generator_server, "cosmos3:requests_rejected_total") > 0
    assert sample(generator_server, "cosmos3:requests_completed_total") > 0
    assert sample(generator_server, "cosmos3:requests_failed_total") >= 1
    assert sample(generator_server, "cosmos3:output_frames_total") >= 5
    assert sample(generator_server, "cosmos3:peak_memory_bytes") > 2**20
    assert sample(generator_server, "cosmos3:step_seconds_count") > 0
    assert sample(generator_server, "cosmos3:jobs_expired_total") == 0
    page = get(generator_server, "/metrics").text
    for phase in ("queue", "text", "denoise", "vae_decode", "encode", "total"):
        assert f'cosmos3:phase_seconds_bucket{{le="3600.0",phase="{phase}"}}' in page
    with closing(Journal(generator_server.log.parent / "storage")) as journal:
        before = journal.stored()
        finished(generator_server, create(generator_server, **SMALL))
        stored = journal.stored()
    assert stored > before
    # The storage is measured every two seconds.
    eventually(lambda: sample(generator_server, "cosmos3:stored_bytes") == stored)


def test_asleep_new_requests_are_refused_and_old_ones_wait(generator_server: Server) -> None:
    idle(generator_server)
    moved = httpx.post(f"{generator_server.url}/v1/cosmos3/sleep?timeout=30", timeout=HANG)
    try:
        assert moved.json()["surfaces"] == {"generator": "sleeping"}
        refused = httpx.post(f"{generator_server.url}/v1/videos", json={"prompt": "a boat"})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "10")
        assert refused.json()["error"]["code"] == "sleeping"
        assert "POST /v1/cosmos3/wake_up" in refused.json()["error"]["message"]
        health = get(generator_server, "/health")
        assert (health.status_code, health.json()["surfaces"]["generator"]) == (503, "sleeping")
        assert health.json()["error"]["code"] == "sleeping"
        assert get(generator_server, "/health/live").status_code == 200
        eventually(lambda: sample(generator_server, "cosmos3:sleeping") == 1)
        assert get(generator_server, "/v1/videos").status_code == 200
    finally:
        woken = httpx.post(f"{generator_server.url}/v1/cosmos3/wake_up", timeout=HANG)
    assert woken.json()["surfaces"] == {"generator": "ready"}
    assert get(generator_server, "/health").status_code == 200
    eventually(lambda: sample(generator_server, "cosmos3:sleeping") == 0)
    job = finished(generator_server, create(generator_server, **SMALL))
    assert job["status"] == "completed"


def test_it_stays_awake_for_a_request_that_does_not_end(generator_server: Server) -> None:
    job = running(generator_server, create(generator_server, **LONG))
    refused = httpx.post(f"{generator_server.url}/v1/cosmos3/sleep?timeout=0", timeout=HANG)
    assert refused.status_code == 429
    assert "1 request is still running after 0 s; the generator stays awake" in refused.text
    assert httpx.delete(f"{generator_server.url}/v1/videos/{job['id']}").status_code == 200
