"""Compares front ends of the reasoner in one run: ours, upstream's class, upstream tuned.

The same clips go to one server after the other: a clip and 50 text tokens in, 1 or 100 tokens out. Each
row gives the time to the first token, throughput and CPU seconds a request; for one request at a time
it also says where the time went, by timers in the server (``timed_server.py``).

    python benchmarks/front_ends.py CKPT -- --load-format dummy --no-enable-prefix-caching
    python benchmarks/front_ends.py CKPT --servers ours --also 'four=--api-server-count 4'
    python benchmarks/front_ends.py CKPT --servers ours ours-fp8 --rows 1:1:1:24:4 1:1:1:12:12:again
"""

from __future__ import annotations

import argparse
import base64
import importlib.util
import json
import os
import random
import re
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from clips import ClipShape, make_all
from load import WORDS, Body, closed_loop

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "tools"))
from local_server import LocalServer, ServerFailed, group_members, local_server  # noqa: E402

UPSTREAM = json.dumps({"architectures": ["Cosmos3ForConditionalGeneration"]})
FP8 = ("--quantization", "fp8", "--kv-cache-dtype", "fp8")
# What the table of stages says, and the timers that it adds up and takes away.
STAGES = {
    "base64": ("load", "-decode"),
    "decode the clip": ("decode",),
    "processor: pixels": ("pixels",),
    "processor: the rest": ("process", "-pixels"),
    "to the engine": ("transit",),
    "vision tower": ("vision",),
    "language model": ("prefill", "-vision"),
    "steps without a new request": ("decode step",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A load: ``requests`` measured ones after ``warmup`` others, ``concurrency`` at a time.

    ``again``: the measured ones are second questions about the clips of the others.
    """

    fps: float
    output_tokens: int
    concurrency: int
    requests: int
    warmup: int
    again: bool

    @property
    def clips(self) -> int:
        """Different ones."""
        return self.warmup if self.again else self.warmup + self.requests


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A server to measure: the program, its flags, what it finds in the environment."""

    program: str
    flags: tuple[str, ...] = ()
    environment: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Started:
    """A running server, the folder of its timers, and what stops it."""

    server: LocalServer
    stages: Path
    stack: ExitStack


def main() -> None:
    args = arguments()
    rows = [parse_row(text) for text in args.rows]
    kinds = list(server_kinds(args).items())
    shape = ClipShape(width=args.width, height=args.height, seconds=args.seconds, fps=args.clip_fps)
    measured: list[Body] = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as pool:
        coming = pool.submit(start, args, *kinds[0], Path(folder))
        clips = make_all("video", shape, range(sum(row.clips for row in rows)))
        print(f"{len(clips)} clips of {statistics.mean(map(len, clips)) / 1e3:.0f} kB", flush=True)
        for place, (name, _) in enumerate(kinds):
            started = coming.result()
            following = kinds[place + 1 : place + 2]
            unused = iter(clips)
            for row in rows if started else ():
                if args.overlap and following and row is rows[-1]:
                    coming = pool.submit(start, args, *following.pop(), Path(folder))
                asked = [next(unused) for _ in range(row.clips)]
                bodies = [
                    body(row, asked[n % row.clips], n, fps_in=args.fps_in)
                    for n in range(row.warmup + row.requests)
                ]
                measured.append({"server": name, **measure(started, row, bodies)})
                print_row(measured[-1])
            if started:
                started.stack.close()
            if following:
                coming = pool.submit(start, args, *following.pop(), Path(folder))
    if args.json:
        args.json.write_text(json.dumps({"flags": args.flags, "rows": measured}, indent=1) + "\n")
    if any(row["errors"] for row in measured) or {r["server"] for r in measured} < {
        name for name, _ in kinds
    }:
        sys.exit("some servers or requests failed")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", metavar="CKPT")
    parser.add_argument("--servers", nargs="+", default=["ours", "upstream", "upstream-4"])
    parser.add_argument(
        "--also", action="append", default=[], metavar="NAME=FLAGS", help="ours with more flags"
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        default=["1:1:1:20:4", "1:1:64:256:64", "1:100:64:256:64"],
        metavar="FPS:OUT:C:N:WARMUP[:again]",
        help="frames a second, output tokens, concurrency, requests, warm-up (default: %(default)s); "
        "again: the requests ask about the clips of the warm-up, which caches may know by then",
    )
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--seconds", type=float, default=10, help="length of a clip")
    parser.add_argument("--clip-fps", type=float, default=24, help="frame rate of a clip")
    parser.add_argument(
        "--fps-in",
        choices=("media", "processor"),
        default="media",
        help="media_io_kwargs: the loader samples, which everybody can do; mm_processor_kwargs: the "
        "processor samples, the documented recipe of ours",
    )
    parser.add_argument(
        "--overlap",
        action="store_true",
        help="start a server while the one before it serves its last row: on a GPU the start is "
        "Python's for the first 40 s",
    )
    parser.add_argument("--logs", type=Path, help="keep the servers' logs in this folder")
    parser.add_argument("--json", type=Path)
    words = sys.argv[1:]
    at = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:at])
    args.flags = words[at + 1 :]
    return args


def parse_row(text: str) -> Row:
    fps, tokens, concurrency, requests, warmup, *more = text.split(":")
    if more not in ([], ["again"]) or (more and not int(warmup)):
        sys.exit(f"--rows {text}: must be FPS:OUT:C:N:WARMUP, or end in :again after a warm-up")
    return Row(
        fps=float(fps),
        output_tokens=int(tokens),
        concurrency=int(concurrency),
        requests=int(requests),
        warmup=int(warmup),
        again=bool(more),
    )


def server_kinds(args: argparse.Namespace) -> dict[str, Kind]:
    """The servers that were asked for, in order."""
    ours = Kind(program="vllm-cosmos3", flags=("--surface", "reasoner"))
    flags = ["--hf-overrides", UPSTREAM]
    if importlib.util.find_spec("cv2") is None:  # vLLM's other decoder
        flags += ["--media-io-kwargs", json.dumps({"video": {"backend": "pyav"}})]
    from vllm_cosmos3.compat import has_serve_flag

    if has_serve_flag("trust-request-mm-kwargs"):
        flags.append("--trust-request-mm-kwargs")
    upstream = Kind(program="vllm", flags=tuple(flags), environment=("VLLM_PLUGINS=none",))
    known = {
        "ours": ours,
        "ours-fp8": Kind(program=ours.program, flags=(*ours.flags, *FP8)),
        "reference": Kind(
            program=ours.program,
            flags=ours.flags,
            environment=("VLLM_COSMOS3_PROCESSOR=reference",),
        ),
        "upstream": upstream,
        "upstream-4": Kind(
            program=upstream.program,
            flags=(*upstream.flags, "--api-server-count", "4"),
            environment=upstream.environment,
        ),
    }
    for text in args.also:
        name, _, more = text.partition("=")
        found = re.findall(r"^(\w+=\S+)\s", more)  # a leading NAME=VALUE goes into the environment
        more = more.removeprefix(found[0]) if found else more
        known[name] = Kind(
            program=ours.program,
            flags=(*ours.flags, *shlex.split(more)),
            environment=tuple(found),
        )
        args.servers.append(name)
    if unknown := set(args.servers) - set(known):
        sys.exit(f"--servers is {min(unknown)!r}, must be one of {', '.join(known)}")
    return {name: known[name] for name in args.servers}


def start(args: argparse.Namespace, name: str, kind: Kind, folder: Path) -> Started | None:
    """The server, ready; None if it did not start, which has then been said."""
    stages = folder / name
    stages.mkdir()
    environment = [f"VLLM_COSMOS3_STAGES={stages}", *kind.environment]
    program = [sys.executable, str(HERE / "timed_server.py"), kind.program]
    command = ["env", *environment, *program, "serve", args.checkpoint, *args.flags, *kind.flags]
    log = (args.logs or folder) / f"{name}.log"
    stack = ExitStack()
    try:
        server = stack.enter_context(local_server(command, log=log))
    except ServerFailed as failure:
        print(f"{name}: {failure}", flush=True)
        return None
    print(f"{name}: ready after {server.seconds_to_start:.0f} s; {shlex.join(kind.flags)}")
    print_header()
    return Started(server, stages, stack)


def body(row: Row, clip: bytes, number: int, *, fps_in: str) -> Body:
    """A request."""
    words = " ".join(random.Random(f"{row} {number}").choices(WORDS, k=45))
    url = f"data:video/mp4;base64,{base64.b64encode(clip).decode()}"
    content = [
        {"type": "video_url", "video_url": {"url": url}},
        {"type": "text", "text": words},
    ]
    sampling: Body = {
        "media": {"media_io_kwargs": {"video": {"fps": row.fps}}},
        "processor": {"mm_processor_kwargs": {"fps": row.fps, "do_sample_frames": True}},
    }
    return {
        **sampling[fps_in],  # type: ignore[dict-item]
        "messages": [{"role": "user", "content": content}],
        "max_tokens": row.output_tokens,
        "ignore_eos": True,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def measure(started: Started, row: Row, bodies: Sequence[Body]) -> Body:
    """One row of the table; stages and shares of CPU are of the measured requests only."""
    url, group = started.server.url, started.server.pid
    closed_loop(url, bodies[: row.warmup], row.concurrency)
    begin, cpu = time.monotonic(), cpu_seconds(group)
    result = closed_loop(url, bodies[row.warmup :], row.concurrency)
    used = cpu_seconds(group) - cpu
    return {
        **asdict(row),
        **result,
        "cpu_seconds": round(used / row.requests, 3),
        "stages_ms": stages_of(started.stages, begin, row.requests),
    }


def cpu_seconds(group: int) -> float:
    """Processor time so far of all processes of a group."""
    ticks = 0
    for pid in group_members(group):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def stages_of(folder: Path, since: float, requests: int) -> dict[str, float]:
    """Milliseconds a request of each stage of ``STAGES`` since a moment."""
    lines = [
        json.loads(line) for file in folder.iterdir() for line in file.read_text().splitlines()
    ]
    lines = sorted((x for x in lines if x["begin"] >= since), key=lambda line: line["begin"])
    spent: dict[str, float] = {}
    for line in lines:
        spent[line["stage"]] = spent.get(line["stage"], 0.0) + line["end"] - line["begin"]
    left = [x["end"] for x in lines if x["stage"] == "process"]
    came = [x["begin"] for x in lines if x["stage"] == "arrive"]
    # In a queue the pairs may be of different requests, whose sum is the same.
    spent["transit"] = sum(sorted(came)[: len(left)]) - sum(sorted(left)[: len(came)])
    return {
        title: round(
            1e3
            / requests
            * sum((-1 if n[0] == "-" else 1) * spent.get(n.lstrip("-"), 0.0) for n in names),
            2,
        )
        for title, names in STAGES.items()
    }


def print_header() -> None:
    print(
        f"{'server':>14}{'clip':>6}{'fps':>4}{'out':>5}{'C':>4}{'n':>5}{'err':>4}{'TTFT mean':>11}{'p50':>9}"
        f"{'p99':>9}{'latency':>9}{'req/s':>8}{'tok/s':>8}{'prompt':>8}{'CPU s/req':>10}",
        flush=True,
    )


def print_row(row: Body) -> None:
    ttft, latency = row["ttft_ms"], row["latency_ms"]
    cells = (
        [f"{ttft[name]:{width}.0f}" for name, width in (("mean", 11), ("p50", 9), ("p99", 9))]
        if ttft
        else ["-" * 9] * 3
    )  # type: ignore[index]
    print(
        f"{row['server']:>14}{'again' if row['again'] else 'new':>6}{row['fps']:4g}{row['output_tokens']:5}{row['concurrency']:4}"
        f"{row['requests']:5}{row['errors']:4}{''.join(cells)}"
        f"{latency['p50'] if latency else 0:9.0f}{row['requests_per_second']:8.2f}"  # type: ignore[index]
        f"{row['output_tokens_per_second']:8.1f}{row['prompt_tokens']:8.0f}{row['cpu_seconds']:10.3f}",
        flush=True,
    )
    print(" " * 14, ", ".join(f"{k} {v:.1f}" for k, v in row["stages_ms"].items()), flush=True)  # type: ignore[attr-defined]
    for message in row["error_messages"]:  # type: ignore[attr-defined]
        print(f"{'':14} {message}", flush=True)


if __name__ == "__main__":
    main()
