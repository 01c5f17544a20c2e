"""Measures a served reasoner: one synthetic clip and 50 text tokens in, 1 or 100 tokens out.

The load of NVIDIA's published tables, without internet: closed loop at concurrency 1, 64, 128 and 256,
clips at 1 and 2 frames a second, every clip unique. Prints a table and writes JSON.

    python benchmarks/reasoner.py --url http://127.0.0.1:8000
    python benchmarks/reasoner.py --serve CKPT --quick -- --enforce-eager
"""

from __future__ import annotations

import argparse
import base64
import ipaddress
import itertools
import json
import os
import platform
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx

from aiperf_client import profile
from clips import ClipShape, make_all
from load import WORDS, Body, closed_loop

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools"))
from local_server import LocalServer, ServerFailed, local_server, program  # noqa: E402

MIX = ("text", "image", "video")
MIME = {"image": "image/png", "video": "video/mp4"}
QUICK = {"concurrency": [1, 16], "output_tokens": [1, 32], "fps": [2.0], "requests": 32}
QUICK |= {"width": 320, "height": 192, "seconds": 4.0, "clip_fps": 12.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row of the table."""

    media: str  # video, image, text, or mixed: all three in turn
    fps: float | None  # of the clips
    output_tokens: int
    concurrency: int


def main() -> None:
    args = arguments()
    shape = ClipShape(width=args.width, height=args.height, seconds=args.seconds, fps=args.clip_fps)
    with server(args) as (url, started):
        model, version = describe(url)
        print(f"{model} on vLLM {version}, {args.media}, {args.transport}", end="")
        print(", REPEATED clips: caches may answer" if args.repeat_clips else ", unique media")
        load = Load(args, url, model, shape)
        rows = []
        print_header()
        for case in cases(args):
            row = load.measure(case)
            rows.append({"case": case_record(case), **row})
            print_row(case, row)
        report = record(args, model, version, rows)
        if started is not None:
            report["server"] = server_record(started)
            print(f"server: {report['server']}")
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
        print(f"written: {args.json}")
    if any(row["errors"] for row in rows):
        sys.exit("some requests failed")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--url", help="of a running server, without /v1")
    where.add_argument("--serve", metavar="CKPT", help="start a server for this; flags after --")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 64, 128, 256])
    parser.add_argument("--output-tokens", type=int, nargs="+", default=[1, 100])
    parser.add_argument("--input-tokens", type=int, default=50, help="of text in each request")
    parser.add_argument(
        "--fps", type=float, nargs="+", default=[1, 2], help="sampled from the clip"
    )
    media = parser.add_mutually_exclusive_group()
    for name in ("image", "text", "mixed"):
        media.add_argument(
            f"--{name}", dest="media", action="store_const", const=name, help="instead of clips"
        )
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--seconds", type=float, default=10, help="length of a clip")
    parser.add_argument("--clip-fps", type=float, default=24, help="frame rate of the clip")
    parser.add_argument(
        "--fps-in",
        choices=("request", "clip"),
        default="request",
        help="request: the server samples the clip at --fps. clip: the clip itself has --fps, as "
        "AIPerf makes it, and the server decides",
    )
    parser.add_argument("--transport", choices=("base64", "file"), default="base64")
    parser.add_argument(
        "--media-folder", type=Path, help="for --transport file, if --url may read it"
    )
    parser.add_argument("--repeat-clips", type=int, metavar="N", help="only N different media")
    parser.add_argument("--requests", type=int, help="per row; default max(50, 4 x concurrency)")
    parser.add_argument("--warmup", type=int, help="per row; default max(4, concurrency)")
    parser.add_argument("--quick", action="store_true", help="a small load for a CPU")
    parser.add_argument(
        "--client", type=Path, metavar="AIPERF", help="let this aiperf send the load"
    )
    parser.add_argument("--tokenizer", help="for aiperf; default: the model's name")
    parser.add_argument("--json", type=Path, help="write everything measured here")
    parser.add_argument(
        "--allow-remote", action="store_true", help="load a host that is not this one"
    )
    own, after = split(sys.argv[1:])
    args = parser.parse_args(own)
    if args.quick:  # what was asked for stays
        parser.set_defaults(**QUICK)
        args = parser.parse_args(own)
    args.server_flags = after
    args.media = args.media or "video"
    if after and not args.serve:
        parser.error("flags after -- are for --serve")
    if args.client and args.media == "mixed":
        parser.error("aiperf cannot mix media; leave --mixed or --client out")
    if args.url and not args.allow_remote and not is_loopback(args.url):
        parser.error(f"{args.url} is not this machine; --allow-remote if you may load it")
    return args


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """Own arguments, and those after ``--``."""
    if "--" not in words:
        return words, []
    at = words.index("--")
    return words[:at], words[at + 1 :]


def is_loopback(url: str) -> bool:
    """Whether every address of the URL's host is this machine."""
    host = urllib.parse.urlsplit(url).hostname
    try:
        found = socket.getaddrinfo(host, None) if host else []
    except socket.gaierror:
        return False
    return bool(found) and all(ipaddress.ip_address(a[4][0]).is_loopback for a in found)


def cases(args: argparse.Namespace) -> Iterator[Case]:
    rates = args.fps if args.media in ("video", "mixed") else [None]
    for fps, tokens, concurrency in itertools.product(rates, args.output_tokens, args.concurrency):
        yield Case(media=args.media, fps=fps, output_tokens=tokens, concurrency=concurrency)


class Load:
    """Makes the requests of each case and sends them. No media is used twice in a run."""

    def __init__(self, args: argparse.Namespace, url: str, model: str, shape: ClipShape) -> None:
        self.args, self.url, self.model, self.shape = args, url, model, shape
        self.numbers = itertools.count()
        self.word_count = self._words_for(args.input_tokens) if args.client is None else 0

    def measure(self, case: Case) -> Body:
        requests = self.args.requests or max(50, 4 * case.concurrency)
        warmup = max(4, case.concurrency) if self.args.warmup is None else self.args.warmup
        if self.args.client is not None:
            return profile(
                self.args.client.absolute(),
                self.url,
                model=self.model,
                tokenizer=self.args.tokenizer or self.model,
                media=case.media,
                shape=self.shape,
                fps=case.fps,
                input_tokens=self.args.input_tokens,
                output_tokens=case.output_tokens,
                concurrency=case.concurrency,
                requests=requests,
                warmup=warmup,
            )
        with tempfile.TemporaryDirectory(dir=self.args.media_folder) as folder:
            bodies = self._bodies(case, requests + warmup, Path(folder))
            failed = closed_loop(self.url, bodies[:warmup], case.concurrency) if warmup else {}
            if failed.get("errors"):
                sys.exit(f"the warm-up failed: {failed['error_messages']}")
            return closed_loop(self.url, bodies[warmup:], case.concurrency)

    def _bodies(self, case: Case, count: int, folder: Path) -> list[Body]:
        """Request bodies; the media lie in ``folder`` where they are sent as file:// URLs."""
        shape = self.shape
        if self.args.fps_in == "clip" and case.fps is not None:
            shape = replace(shape, fps=case.fps)
        indices = list(itertools.islice(self.numbers, self.args.repeat_clips or count))
        parts: list[Body | None] = [None] * len(indices)
        for kind in MIME:
            turns = itertools.cycle(MIX) if case.media == "mixed" else itertools.repeat(case.media)
            places = [
                place
                for place, turn in zip(range(len(indices)), turns, strict=False)
                if turn == kind
            ]
            made = make_all(kind, shape, [indices[place] for place in places])
            for place, data in zip(places, made, strict=True):
                url = self._url(kind, data, folder / str(indices[place]))
                parts[place] = {"type": f"{kind}_url", f"{kind}_url": {"url": url}}
        return [self._body(case, parts[n % len(parts)], n) for n in range(count)]

    def _url(self, kind: str, data: bytes, path: Path) -> str:
        if self.args.transport == "base64":
            return f"data:{MIME[kind]};base64,{base64.b64encode(data).decode()}"
        path = path.with_suffix("." + MIME[kind].split("/")[1])
        path.write_bytes(data)
        return path.resolve().as_uri()

    def _body(self, case: Case, part: Body | None, number: int) -> Body:
        words = random.Random(f"{case} {number}").choices(WORDS, k=self.word_count)
        content: list[Body] = [{"type": "text", "text": " ".join(words)}]
        if part is not None:
            content.insert(0, part)
        body: Body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": case.output_tokens,
            "ignore_eos": True,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if part is not None and part["type"] == "video_url" and self.args.fps_in == "request":
            body["mm_processor_kwargs"] = {"fps": case.fps, "do_sample_frames": True}
        return body

    def _words_for(self, tokens: int) -> int:
        """How many words the server's tokenizer turns into this many tokens, on average."""
        words = random.Random(0).choices(WORDS, k=400)
        reply = httpx.post(
            f"{self.url}/tokenize",
            json={"model": self.model, "prompt": " ".join(words), "add_special_tokens": False},
        )
        reply.raise_for_status()
        return max(1, round(tokens * len(words) / reply.json()["count"]))


@contextmanager
def server(args: argparse.Namespace) -> Iterator[tuple[str, LocalServer | None]]:
    """The URL of the server, and the server itself where this program started it."""
    with tempfile.TemporaryDirectory() as folder:
        # file:// media and the server's permission to read them meet in this folder
        args.media_folder = args.media_folder or folder
        if args.url:
            yield args.url.rstrip("/"), None
            return
        log = Path(folder) / "server.log"
        command = [program(), "serve", args.serve]
        command += ["--surface", "reasoner", "--allowed-local-media-path", str(args.media_folder)]
        try:
            with local_server([*command, *args.server_flags], log=log) as started:
                yield started.url, started
        except ServerFailed as failure:
            sys.exit(str(failure))


def describe(url: str) -> tuple[str, str]:
    """The first served model and the version of vLLM."""
    try:
        models = httpx.get(f"{url}/v1/models").raise_for_status().json()
        version = httpx.get(f"{url}/version").raise_for_status().json()
    except httpx.HTTPError as error:
        sys.exit(f"{url} does not answer like a vLLM server: {error}")
    return str(models["data"][0]["id"]), str(version["version"])


def record(args: argparse.Namespace, model: str, version: str, rows: list[Body]) -> Body:
    """What is needed to repeat the measurement, and the rows. No names or paths of the machine."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    keep = (
        "media",
        "width",
        "height",
        "seconds",
        "clip_fps",
        "fps_in",
        "transport",
        "input_tokens",
    )
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip() or None,
        "model": Path(model).name,
        "vllm": version,
        "machine": {"cpus": os.cpu_count(), "architecture": platform.machine()},
        "client": "aiperf" if args.client else "benchmarks/reasoner.py",
        "load": {name: getattr(args, name) for name in keep},
        "media_repeat": args.repeat_clips or "never",
        "server_flags": args.server_flags,
        "rows": rows,
    }


def server_record(started: LocalServer) -> Body:
    return {
        "seconds_to_start": round(started.seconds_to_start, 1),
        "memory_gib_after_load": round(started.memory() / 2**30, 2),
    }


def case_record(case: Case) -> Body:
    return {name: getattr(case, name) for name in ("media", "fps", "output_tokens", "concurrency")}


def print_header() -> None:
    print(f"{'':30}{'TTFT ms':^24}{'ITL ms':^16}{'latency ms':^24}")
    print(
        f"{'load':>5}{'fps':>4}{'out':>5}{'C':>5}{'n':>6}{'err':>5}"
        f"{'p50':>8}{'p90':>8}{'p99':>8}{'p50':>8}{'p99':>8}{'p50':>8}{'p90':>8}{'p99':>8}"
        f"{'req/s':>8}{'tok/s':>8}{'prompt':>8}",
        flush=True,
    )


def print_row(case: Case, row: Body) -> None:
    def cells(metric: str, *names: str) -> str:
        values = row[metric]
        return "".join(f"{values[n]:8.1f}" if values else f"{'-':>8}" for n in names)  # type: ignore[index]

    print(
        f"{case.media:>5}{'-' if case.fps is None else f'{case.fps:g}':>4}{case.output_tokens:5}"
        f"{case.concurrency:5}{row['requests']:6}{row['errors']:5}"
        f"{cells('ttft_ms', 'p50', 'p90', 'p99')}{cells('itl_ms', 'p50', 'p99')}"
        f"{cells('latency_ms', 'p50', 'p90', 'p99')}"
        f"{row['requests_per_second']:8.2f}{row['output_tokens_per_second']:8.1f}"
        f"{row['prompt_tokens']:8.0f}",
        flush=True,
    )
    for message in row["error_messages"]:  # type: ignore[attr-defined]
        print(f"      {message}")


if __name__ == "__main__":
    main()
