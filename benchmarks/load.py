"""Closed-loop load on a chat completions endpoint: N requests, C at a time, each one streamed.

Times are taken where the bytes arrive. Token counts are the server's own, from the usage record.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import httpx
import numpy as np

Body = dict[str, object]
WORDS = [
    "the",
    "robot",
    "arm",
    "lifts",
    "a",
    "red",
    "cube",
    "from",
    "table",
    "and",
    "puts",
    "it",
    "into",
    "grey",
    "tray",
    "while",
    "car",
    "stops",
]  # of prompts


@dataclass(frozen=True, slots=True)
class Timing:
    """One request: seconds, and tokens as the server counted them."""

    first_token: float
    total: float
    prompt_tokens: int
    output_tokens: int


class RequestFailed(Exception):
    """The server refused a request or broke off."""


def closed_loop(url: str, bodies: Sequence[Body], concurrency: int) -> Body:
    """Send every body, at most ``concurrency`` at once, and summarise. Errors are counted."""
    started = time.perf_counter()
    results = asyncio.run(_send_all(f"{url}/v1/chat/completions", bodies, concurrency))
    return summary(results, time.perf_counter() - started)


def summary(results: Sequence[Timing | RequestFailed], seconds: float) -> Body:
    """Throughput of the successful requests over the whole time, and their percentiles in ms."""
    done = [r for r in results if isinstance(r, Timing)]
    errors = Counter(str(r) for r in results if isinstance(r, RequestFailed))
    # AIPerf's definition: the time after the first token, divided among the other tokens
    gaps = [(r.total - r.first_token) / (r.output_tokens - 1) for r in done if r.output_tokens > 1]
    return {
        "requests": len(results),
        "errors": sum(errors.values()),
        "error_messages": [f"{count} x {text}" for text, count in errors.most_common(3)],
        "seconds": round(seconds, 3),
        "requests_per_second": round(len(done) / seconds, 3),
        "output_tokens_per_second": round(sum(r.output_tokens for r in done) / seconds, 2),
        "ttft_ms": _percentiles([r.first_token for r in done]),
        "itl_ms": _percentiles(gaps),
        "latency_ms": _percentiles([r.total for r in done]),
        "prompt_tokens": _mean([r.prompt_tokens for r in done]),
        "output_tokens": _mean([r.output_tokens for r in done]),
    }


async def _send_all(
    url: str, bodies: Sequence[Body], concurrency: int
) -> list[Timing | RequestFailed]:
    turn = asyncio.Semaphore(concurrency)
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    async with httpx.AsyncClient(timeout=None, limits=limits) as client:

        async def one(body: Body) -> Timing | RequestFailed:
            async with turn:
                try:
                    return await _send(client, url, body)
                except RequestFailed as failure:
                    return failure
                except httpx.HTTPError as error:
                    return RequestFailed(f"{type(error).__name__}: {error}")

        return await asyncio.gather(*map(one, bodies))


async def _send(client: httpx.AsyncClient, url: str, body: Body) -> Timing:
    """One streamed request. The first chunk with a choice carries the first token."""
    started = time.perf_counter()
    first, usage = None, None
    async with client.stream("POST", url, json=body) as reply:
        if reply.status_code != 200:
            text = (await reply.aread()).decode(errors="replace")
            raise RequestFailed(f"HTTP {reply.status_code}: {text[:200]}")
        async for line in reply.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise RequestFailed(f"broken off: {str(chunk['error'])[:200]}")
            if chunk["choices"] and first is None:
                first = time.perf_counter() - started
            usage = chunk.get("usage") or usage
    if first is None or usage is None:
        raise RequestFailed("the stream ended without a token or without its usage record")
    total = time.perf_counter() - started
    return Timing(first, total, usage["prompt_tokens"], usage["completion_tokens"])


def _percentiles(seconds: Sequence[float]) -> Body:
    """Mean, p50, p90 and p99 in milliseconds; empty where nothing was measured."""
    if not seconds:
        return {}
    milliseconds = 1000 * np.asarray(seconds)
    p50, p90, p99 = np.percentile(milliseconds, (50, 90, 99))
    values = {"mean": milliseconds.mean(), "p50": p50, "p90": p90, "p99": p99}
    return {name: round(float(value), 2) for name, value in values.items()}


def _mean(counts: Sequence[int]) -> float:
    return round(sum(counts) / len(counts), 1) if counts else 0.0
