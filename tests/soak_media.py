"""Thousands of pictures and clips, one in twenty malformed, at a served reasoner. ``make soak`` runs it.

    python tests/soak_media.py CKPT [--requests 2000] [--concurrency 16] [-- FLAGS OF VLLM]

Every good request must be answered as when it was asked alone, every bad one with status 400 and one
short sentence, and the server's memory must not grow. Status 1 otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from media_files import data_url, encoded, picture, png

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))
from local_server import LocalServer, local_server, program

BAD_SHARE = 0.05
# Few blocks of KV cache, whose pages count as memory once they have been used.
SMALL = ["--enforce-eager", "--max-model-len", "4096", "--max-num-seqs", "32"]
SMALL += ["--num-gpu-blocks-override", "128"]
GROWTH = 1.1  # of memory, from a quarter of the way to the end; vLLM alone takes 1.07


@dataclass(frozen=True, slots=True)
class Ask:
    """A request: what is sent beside the question, and whether it is sound."""

    name: str
    part: dict[str, Any]
    options: dict[str, Any]
    good: bool


def video(data: bytes) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": data_url(data, "video/mp4")}}


def image(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(data, "image/png")}}


def asks() -> list[Ask]:
    """Every kind of request, sound ones and malformed ones."""
    clip, still = encoded(frames=48), png(picture(90, 70))
    good = {
        "clip": (video(clip), {}),
        "clip at 4 fps": (video(clip), {"fps": 4, "do_sample_frames": True}),
        "odd clip": (video(encoded(width=97, height=63, frames=31, pixels="yuv444p")), {}),
        "VP9": (video(encoded(codec="libvpx-vp9", container="webm", frames=33)), {"fps": 1}),
        "MJPEG": (video(encoded(codec="mjpeg", container="avi", pixels="yuvj420p")), {}),
        "picture": (image(still), {}),
        "wide picture": (image(png(picture(300, 20))), {}),
    }
    bad: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "truncated clip": (video(clip[: len(clip) // 2]), {}),
        "noise as clip": (video(random.Random(0).randbytes(5000)), {}),
        "empty clip": (video(b""), {}),
        "header of a clip": (video(clip[:48]), {}),
        "picture as clip": (video(still), {}),
        "one frame": (video(encoded(frames=1)), {}),
        "clip as picture": (image(clip), {}),
        "truncated picture": (image(still[:300]), {}),
        "narrow picture": (image(png(picture(1, 300))), {}),
        "no base64": ({"type": "image_url", "image_url": {"url": "data:image/png;base64,?!"}}, {}),
        "fps 0": (video(clip), {"fps": 0}),
        "unknown option": (video(clip), {"frames_per_second": 2}),
    }
    return [Ask(name, *found, good=True) for name, found in good.items()] + [
        Ask(name, *found, good=False) for name, found in bad.items()
    ]


async def soak(url: str, model: str, requests: int, concurrency: int, watch: Any) -> Counter[str]:
    """Send them; what went wrong, counted. ``watch(done)`` is called after each request."""
    good = [ask for ask in asks() if ask.good]
    bad = [ask for ask in asks() if not ask.good]
    dice, turn = random.Random(0), asyncio.Semaphore(concurrency)
    wrong: Counter[str] = Counter()
    async with httpx.AsyncClient(timeout=120) as client:
        alone = {ask.name: await answer(client, url, model, ask) for ask in good}
        wrong.update(f"{name} alone: {a}" for name, a in alone.items() if a[0] != 200)
        done = 0

        async def one(ask: Ask) -> None:
            nonlocal done
            async with turn:
                status, text = await answer(client, url, model, ask)
            done += 1
            if ask.good and (status, text) != alone[ask.name]:
                wrong[f"{ask.name}: {status} {text[:200]}"] += 1
            if not ask.good and (status != 400 or not 10 < len(text) < 400):
                wrong[f"{ask.name}: {status} {text[:200]}"] += 1
            watch(done)

        chosen = [dice.choice(bad if dice.random() < BAD_SHARE else good) for _ in range(requests)]
        await asyncio.gather(*map(one, chosen))
    return wrong


async def answer(client: httpx.AsyncClient, url: str, model: str, ask: Ask) -> tuple[int, str]:
    """Status, and the answer or the message."""
    content = [ask.part, {"type": "text", "text": "what is shown?"}]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 4,
        "temperature": 0,
        "mm_processor_kwargs": ask.options,
    }
    reply = await client.post(f"{url}/v1/chat/completions", json=body)
    found = reply.json()
    if reply.status_code != 200:
        return reply.status_code, str(found.get("error", found).get("message", found))
    return 200, f"{found['choices'][0]['message']['content']} ({found['usage']['prompt_tokens']})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--concurrency", type=int, default=16)
    words = sys.argv[1:]
    at = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:at])
    command = [program(), "serve", args.checkpoint, "--surface", "reasoner", *SMALL]
    command += words[at + 1 :]
    with (
        tempfile.TemporaryDirectory() as folder,
        local_server(command, log=Path(folder) / "server.log") as server,
    ):
        return report(server, args)


def report(server: LocalServer, args: argparse.Namespace) -> int:
    model = httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"]
    memory: dict[int, float] = {}

    def watch(done: int) -> None:
        if done % max(1, args.requests // 8) == 0:
            memory[done] = server.memory() / 2**30
            print(f"{done} requests, {memory[done]:.3f} GiB", flush=True)

    wrong = asyncio.run(soak(server.url, model, args.requests, args.concurrency, watch))
    for text, count in wrong.most_common(20):
        print(f"{count} x {text}")
    sizes = list(memory.values())
    grown = sizes[-1] / sizes[len(sizes) // 4]
    print(f"{args.requests} requests, {wrong.total()} wrong; memory grew to {grown:.3f} of itself")
    return int(bool(wrong) or grown > GROWTH)


if __name__ == "__main__":
    sys.exit(main())
