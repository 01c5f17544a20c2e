"""How fast a causal simulator answers: ``python benchmarks/sessions.py CKPT [CKPT ...]``.

The checkpoints may hold no weights (``make-checkpoint --size nano --kind sim-bimanual --no-weights``,
then ``--load-format dummy``). Of each, three sessions one after the other: the first one of the process,
one whose first frame is generated, and one that begins with a picture. Each is followed by steps with
random actions. Times are the caller's, from the call to frames on the host; phases are timed by events on
the device. The peak is that of torch's allocator (on a CPU, what the process ever had resident) and
stands beside what admission reserves: the weights and a session with its whole history.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clock import percentile
from latency import medians
from machine import heading, provenance
from vllm_cosmos3.checkpoint.hub import resolve
from vllm_cosmos3.checkpoint.simulators import FULL_HISTORY
from vllm_cosmos3.engine import Cosmos3
from vllm_cosmos3.engine_options import EngineConfig
from vllm_cosmos3.errors import Cosmos3Error
from vllm_cosmos3.generator.memory import estimate, session_work
from vllm_cosmos3.generator.output import Output
from vllm_cosmos3.request.prompts import load_tokenizer
from vllm_cosmos3.request.request import parse_size
from vllm_cosmos3.request.world import ChunkPlan, make_world, session_request

GIB = 2**30
EDGE_STEPS = 5  # at the begin and at the end of a session, of which the medians are compared
PROMPT = "Two robot arms at a table with a towel, seen from the head of the robot. " * 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One session. Seconds, bytes; ``steps`` without the first, which may choose kernels."""

    checkpoint: str
    session: str
    size: str
    chunk: int  # latent frames
    frames: int  # of a step
    first_frame: float
    first_step: float
    steps: list[float]
    early: float  # median of the first steps
    late: float  # and of the last
    phases: Mapping[str, float]  # medians of a step
    history: int  # latent frames before the last step
    peak: int
    planned: int

    @property
    def rate(self) -> float:
        """Frames a second."""
        return self.frames * len(self.steps) / sum(self.steps)


class Recorded(Cosmos3):
    """Keeps the plan and the output of every chunk, of which a session shows the frames alone."""

    chunks: list[tuple[ChunkPlan, Output]]

    def _run_chunk(self, plan: ChunkPlan) -> Output:
        output = super()._run_chunk(plan)
        self.chunks.append((plan, output))
        return output


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    rows: list[Row] = []
    loads: dict[str, float] = {}
    facts: dict[str, str] = {}
    try:
        for folder in args.models:
            with Recorded(
                folder,
                dtype=args.dtype,
                device=args.device,
                load_format=args.load_format,
                und_residency="gpu",
            ) as model:
                if not facts:
                    facts = provenance(model.device)
                    print(heading(facts), flush=True)
                loads[folder] = model.load_seconds
                print(f"{folder}: loaded in {model.load_seconds:.1f} s", HEAD, sep="\n", flush=True)
                rows += measure_all(model, folder, args)
    except Cosmos3Error as error:
        print(f"sessions: {error}", file=sys.stderr)
        return 2
    if args.json:
        made = [asdict(row) | {"frames_per_second": row.rate} for row in rows]
        report = {"machine": facts, "model_load_s": loads, "rows": made}
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def measure_all(model: Recorded, folder: str, args: argparse.Namespace) -> list[Row]:
    """The sessions of one checkpoint, printed as they come."""
    random = np.random.default_rng(0)
    width, height = parse_size(args.size)
    picture = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    rows = []
    for name, steps, image in (
        ("first of the process", EDGE_STEPS, None),
        ("generated frame", args.steps, None),
        ("picture", EDGE_STEPS, picture),
    ):
        fields = {"prompt": PROMPT, "size": args.size, "seed": 0, "image": image}
        if args.history:
            fields["history"] = args.history
        row = measure(model, folder, name, fields, steps, random, args)
        rows.append(row)
        print(line(row), flush=True)
    return rows


def measure(
    model: Recorded,
    folder: str,
    name: str,
    fields: dict[str, Any],
    steps: int,
    random: np.random.Generator,
    args: argparse.Namespace,
) -> Row:
    """One session of so many steps after its first."""
    if model.device.type != "cpu":  # whose peak is that of the process's life
        torch.accelerator.reset_peak_memory_stats(model.device)
    model.chunks = []
    planned = planned_bytes(folder, fields, str(model.device), args)
    seconds = []
    start = time.perf_counter()
    with model.session(**fields) as world:
        first_frame = time.perf_counter() - start
        for _ in range(1 + steps):
            actions = random.uniform(-0.1, 0.1, world.action_shape)
            start = time.perf_counter()
            frames = world.step(actions)
            seconds.append(time.perf_counter() - start)
    plans, outputs = zip(*model.chunks, strict=True)
    return Row(
        checkpoint=Path(folder).name,
        session=name,
        size=fields["size"],
        chunk=plans[-1].frames,
        frames=len(frames),
        first_frame=first_frame,
        first_step=seconds[0],
        steps=seconds[1:],
        early=statistics.median(seconds[1 : 1 + EDGE_STEPS]),
        late=statistics.median(seconds[-EDGE_STEPS:]),
        phases=medians([each.timings for each in outputs[2:]]),
        history=min(plans[-1].first, args.history or FULL_HISTORY),
        peak=max(each.peak_memory for each in outputs),
        planned=planned,
    )


def planned_bytes(
    folder: str, fields: dict[str, Any], device: str, args: argparse.Namespace
) -> int:
    """What weights and a session take by the plan that admission has."""
    config = EngineConfig(
        model=resolve(folder),
        device=device,
        dtype=args.dtype,
        load_format=args.load_format,
        und_residency="gpu",
    )
    model = config.read_model()
    tokenizer = load_tokenizer(config.model)
    opening = make_world(session_request(fields), model, tokenizer, "plan").opening
    memory = estimate(model, config, session_work(model, opening))
    return memory.resident + memory.request


HEAD = (
    "| checkpoint | session | chunk | first frame s | first step s | step p50 ms | p99 | frames/s "
    "| early, late step ms | history | phases of a step ms | peak / plan GiB |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def line(row: Row) -> str:
    """A row of the Markdown table."""
    phases = (f"{name} {1000 * each:.0f}" for name, each in row.phases.items() if each)
    cells = [
        row.checkpoint,
        row.session,
        f"{row.chunk} ({row.frames} frames)",
        f"{row.first_frame:.3f}",
        f"{row.first_step:.3f}",
        f"{1000 * statistics.median(row.steps):.0f}",
        f"{1000 * percentile(row.steps, 99):.0f}",
        f"{row.rate:.2f}",
        f"{1000 * row.early:.0f}, {1000 * row.late:.0f}",
        str(row.history),
        ", ".join(phases),
        f"{row.peak / GIB:.2f} / {row.planned / GIB:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("models", nargs="+", metavar="CKPT", help="simulators")
    parser.add_argument("--size", default="832x480")
    parser.add_argument("--steps", type=int, default=24, help="of the session that is timed, after its first")  # fmt: skip
    parser.add_argument("--history", type=int, help="latent frames remembered; default: 226")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--json", type=Path, help="write the report here")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
