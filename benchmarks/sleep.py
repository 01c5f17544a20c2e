"""What sleeping costs the generator: ``python benchmarks/sleep.py CKPT --load-format dummy``.

A request is run until it is warm. Then each round leaves the weights in the host's memory, brings them
back, and runs the request again: the first time, when texts are encoded and graphs are recorded anew,
and once more. The latents of every round are compared with those before it, bit by bit. Used memory is
that of the whole device on a GPU, and what this process has resident on a CPU, where nothing moves.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from clock import synchronize
from latency import NAMED, Fields, request
from machine import heading, provenance
from vllm_cosmos3.engine import Cosmos3
from vllm_cosmos3.errors import Cosmos3Error

GIB = 2**30
PROMPT, NEGATIVE = 512, 512  # tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """To the host and back. Seconds and bytes."""

    sleep_s: float
    wake_up_s: float
    first_s: float
    second_s: float
    before: int
    asleep: int
    after: int
    equal: bool


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    fields = dict(NAMED[args.row]) | args.fields
    try:
        with Cosmos3(
            args.model,
            dtype=args.dtype,
            device=args.device,
            load_format=args.load_format,
            **args.engine,
        ) as model:
            report = measure(model, args.row, fields, args.rounds)
    except Cosmos3Error as error:
        print(f"sleep: {error}", file=sys.stderr)
        return 2
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if all(each["equal"] for each in report["rounds"]) else 1


def measure(model: Cosmos3, row: str, fields: Fields, rounds: int) -> dict[str, Any]:
    """Every round, printed as it comes."""
    facts = provenance(model.device)
    print(heading(facts), f"model load: {model.load_seconds:.1f} s", sep="\n", flush=True)
    warm = [run(model, fields, number)[0] for number in range(3)]
    _, expected = run(model, fields, 0)
    print(f"{row}: cold {warm[0]:.2f} s, warm {warm[-1]:.2f} s", HEAD, sep="\n", flush=True)
    made = []
    for number in range(rounds):
        made.append(once(model, fields, 3 + number, expected))
        print(line(number + 1, made[-1]), flush=True)
    return {
        "machine": facts,
        "model_load_s": model.load_seconds,
        "request": fields,
        "cold_s": warm[0],
        "warm_s": warm[-1],
        "rounds": [asdict(each) for each in made],
    }


def once(model: Cosmos3, fields: Fields, number: int, expected: str) -> Round:
    """One round; ``number`` makes a prompt of its own for its first request."""
    device = model.device
    before = used(device)
    sleep_s = timed(model.sleep, device)
    asleep = used(device)
    wake_up_s = timed(model.wake_up, device)
    first_s, _ = run(model, fields, number)
    second_s, digest = run(model, fields, 0)
    return Round(
        sleep_s=sleep_s,
        wake_up_s=wake_up_s,
        first_s=first_s,
        second_s=second_s,
        before=before,
        asleep=asleep,
        after=used(device),
        equal=digest == expected,
    )


def run(model: Cosmos3, fields: Fields, number: int) -> tuple[float, str]:
    """Seconds of a request, and a digest of what it made."""
    lengths = None if model.device.type == "cpu" else [PROMPT, NEGATIVE]
    start = time.perf_counter()
    output = model.generate({**request(fields, lengths, number), "output_type": "latent"})
    seconds = time.perf_counter() - start
    latents = output.latents
    assert latents is not None
    return seconds, hashlib.sha256(latents["vision"].tobytes()).hexdigest()


def timed(call: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def used(device: torch.device) -> int:
    """Bytes of the device that anybody uses now; on a CPU those of this process."""
    if device.type == "cpu":
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free)


HEAD = (
    "| round | sleep s | wake_up s | first request s | second s | used before GiB | asleep | after "
    "| bits equal |\n|---|---|---|---|---|---|---|---|---|"
)


def line(number: int, each: Round) -> str:
    """A row of the Markdown table."""
    cells = [str(number)]
    cells += [f"{x:.2f}" for x in (each.sleep_s, each.wake_up_s, each.first_s, each.second_s)]
    cells += [f"{x / GIB:.2f}" for x in (each.before, each.asleep, each.after)]
    return f"| {' | '.join([*cells, 'yes' if each.equal else 'NO'])} |"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", help="checkpoint folder or repository")
    parser.add_argument("--row", choices=NAMED, default="t2i-720p", metavar="ROW", help="of latency.py")  # fmt: skip
    parser.add_argument("--fields", type=json.loads, default={}, help="more fields of it, as JSON")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument(
        "--engine", type=json.loads, default={}, help="more arguments of Cosmos3, as JSON"
    )
    parser.add_argument("--json", type=Path, help="write the report here")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
