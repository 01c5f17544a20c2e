"""Load on a server: N requests for images, videos, chat, robots' actions or the state of a video.

    python benchmarks/serving.py --url http://127.0.0.1:8000 --kind videos --requests 20 \\
        --concurrency 4 --fields '{"size": "320x192", "num_frames": 25}'

A closed loop keeps ``--concurrency`` requests under way; ``--rate`` sends that many a second, whatever
the server does. ``--distinct`` gives each a prompt of its own, so that no text is cached. ``--kind polls``
makes one long video and polls its state. Prints a table; ``--json FILE`` writes the same as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException

from vllm_cosmos3.robots import droid, msgpack

POLL_SECONDS = 0.05
LONG = {"size": "256x256", "num_frames": 61, "num_inference_steps": 200}  # of --kind polls


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One request that was served. Seconds."""

    latency: float
    queue: float = 0.0
    gpu: float = 0.0
    batch_size: int = 1


class Refused(Exception):
    """The server refused a request or failed it. The message is its code."""


async def main() -> None:
    args = _parser().parse_args()
    fields = json.loads(args.fields)
    limits = httpx.Limits(max_connections=None)
    headers = {"Authorization": f"Bearer {args.api_key}"}
    async with httpx.AsyncClient(
        base_url=args.url, timeout=None, limits=limits, headers=headers
    ) as client:
        started = time.perf_counter()
        results = await _load(client, args, fields)
        seconds = time.perf_counter() - started
    report = {"kind": args.kind, "rate": args.rate, **summary(results, seconds)}
    print(table(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2))


async def _load(
    client: httpx.AsyncClient, args: argparse.Namespace, fields: dict[str, Any]
) -> list[Served | str]:
    """Send all requests, each after the other's turn or after its time."""
    turn = asyncio.Semaphore(args.concurrency if args.rate is None else args.requests)
    if args.kind == "polls":
        async with _under_way(client, {"prompt": args.prompt, **LONG, **fields}) as path:
            return await _send_all(args, turn, lambda: _poll(client, path))
    if args.kind == "chat" and "model" not in fields:
        listed = _accepted(await client.get("/v1/models"))
        fields = {"model": listed["data"][0]["id"], **fields}
    send = {"images": _image, "videos": _video, "chat": _chat, "actions": _actions}[args.kind]
    numbers = count(1)

    def body() -> dict[str, Any]:
        prompt = f"{args.prompt}, number {next(numbers)}" if args.distinct else args.prompt
        return {"prompt": prompt, **fields}

    return await _send_all(args, turn, lambda: send(client, body()))


async def _send_all(
    args: argparse.Namespace, turn: asyncio.Semaphore, send: Callable[[], Awaitable[Served]]
) -> list[Served | str]:
    async def one(index: int) -> Served | str:
        if args.rate is not None:
            await asyncio.sleep(index / args.rate)
        async with turn:
            try:
                return await send()
            except Refused as error:
                return str(error)
            except (httpx.HTTPError, WebSocketException, OSError, ValueError) as error:
                return type(error).__name__

    return await asyncio.gather(*map(one, range(args.requests)))


async def _image(client: httpx.AsyncClient, body: dict[str, Any]) -> Served:
    start = time.perf_counter()
    answer = _accepted(await client.post("/v1/images/generations", json=body))
    timings = answer["cosmos3"]["timings_s"]
    latency = time.perf_counter() - start
    return Served(
        latency=latency,
        queue=timings["queue"],
        gpu=answer["usage"]["gpu_seconds"],
        batch_size=answer["cosmos3"]["batch_size"],
    )


async def _video(client: httpx.AsyncClient, body: dict[str, Any]) -> Served:
    start = time.perf_counter()
    job = _accepted(await client.post("/v1/videos", json=body))
    while job["status"] in ("queued", "in_progress"):
        await asyncio.sleep(POLL_SECONDS)
        job = _accepted(await client.get(f"/v1/videos/{job['id']}"))
    if job["status"] == "failed":
        raise Refused(job["error"]["code"])
    latency = time.perf_counter() - start
    timings, usage = job["cosmos3"]["timings_s"], job["usage"]
    return Served(
        latency=latency,
        queue=timings["queue"],
        gpu=usage["gpu_seconds"],
        batch_size=job["cosmos3"]["batch_size"],
    )


async def _chat(client: httpx.AsyncClient, body: dict[str, Any]) -> Served:
    message = {"role": "user", "content": body.pop("prompt")}
    start = time.perf_counter()
    _accepted(await client.post("/v1/chat/completions", json={"messages": [message], **body}))
    return Served(latency=time.perf_counter() - start)


async def _actions(client: httpx.AsyncClient, body: dict[str, Any]) -> Served:
    """One robot that asks once. Connecting is not part of its latency."""
    url = str(client.base_url).replace("http", "ws", 1)
    headers = {"Authorization": client.headers["Authorization"]}
    async with connect(url, additional_headers=headers, max_size=None) as socket:
        await socket.recv()  # what the server wants
        start = time.perf_counter()
        await socket.send(msgpack.pack(droid.example() | body))
        answer = await socket.recv()
        latency = time.perf_counter() - start
    if isinstance(answer, str):
        raise Refused(json.loads(answer)["error"]["code"])
    timing = msgpack.unpack(answer)["server_timing"]
    phases = ("text_ms", "vae_encode_ms", "denoise_ms")
    gpu = sum(timing[name] for name in phases) / 1000
    return Served(latency=latency, queue=timing["queue_ms"] / 1000, gpu=gpu)


@asynccontextmanager
async def _under_way(client: httpx.AsyncClient, body: dict[str, Any]) -> AsyncIterator[str]:
    """The path of a video that is being denoised; it is deleted at the end."""
    job = _accepted(await client.post("/v1/videos", json=body))
    path = f"/v1/videos/{job['id']}"
    try:
        while job["cosmos3"]["phase"] != "denoise":
            if job["status"] not in ("queued", "in_progress"):
                sys.exit(f"serving: the video was {job['status']} before a look found it denoised")
            await asyncio.sleep(POLL_SECONDS)
            job = _accepted(await client.get(path))
        yield path
        if (status := _accepted(await client.get(path))["status"]) != "in_progress":
            print(f"the video was {status} before the last look; make it longer with --fields")
    finally:
        await client.delete(path)


async def _poll(client: httpx.AsyncClient, path: str) -> Served:
    start = time.perf_counter()
    _accepted(await client.get(path))
    return Served(latency=time.perf_counter() - start)


def _accepted(answer: httpx.Response) -> dict[str, Any]:
    body: dict[str, Any] = answer.json()
    if answer.status_code != 200:
        raise Refused(str(body.get("error", {}).get("code", answer.status_code)))
    return body


def summary(results: list[Served | str], seconds: float) -> dict[str, Any]:
    """Percentiles of what was served, and the errors by code."""
    served = [result for result in results if isinstance(result, Served)]
    errors = Counter(result for result in results if isinstance(result, str))
    gpu = sum(result.gpu for result in served)
    return {
        "requests": len(results),
        "errors": sum(errors.values()),
        "errors_by_code": dict(errors),
        "seconds": round(seconds, 3),
        "outputs_per_second": round(len(served) / seconds, 4),
        "latency_s": _percentiles([result.latency for result in served]),
        "queue_s": _percentiles([result.queue for result in served]),
        "gpu_seconds_per_output": round(gpu / len(served), 4) if served else None,
        "batch_sizes": dict(sorted(Counter(result.batch_size for result in served).items())),
    }


def _percentiles(seconds: list[float]) -> dict[str, float]:
    if not seconds:
        return {}
    values = np.percentile(seconds, (50, 90, 99))
    return {name: round(float(v), 4) for name, v in zip(("p50", "p90", "p99"), values, strict=True)}


def table(report: dict[str, Any]) -> str:
    """The report as lines of text."""
    lines = []
    for name, value in report.items():
        shown = value
        if isinstance(value, dict):
            shown = "  ".join(f"{key} {each}" for key, each in value.items()) or "-"
        lines.append(f"{name.replace('_', ' '):24} {shown}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key", default="EMPTY")
    kinds = ("images", "videos", "chat", "actions", "polls")
    parser.add_argument("--kind", choices=kinds, default="images")
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument(
        "--concurrency", type=int, default=4, help="under way at once (closed loop)"
    )
    parser.add_argument("--rate", type=float, help="requests a second (open loop)")
    parser.add_argument("--prompt", default="A paper boat drifts down a stream")
    parser.add_argument("--distinct", action="store_true", help="number the prompts")
    parser.add_argument("--fields", default="{}", help="more fields of each request, as JSON")
    parser.add_argument("--json", type=Path, help="write the report here")
    return parser


if __name__ == "__main__":
    asyncio.run(main())
