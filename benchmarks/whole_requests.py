"""Whole requests on several GPUs: ``python benchmarks/scaling.py --whole CHECKPOINT --devices 4``.

From token ids to frames in the memory of the host, with the rows and the clocks of latency.py, on
layouts of all devices: a mesh, written cfg x ulysses x tp, whose ranks make one request together, or
``replicas``, where each device makes a request of its own at the same time. The checkpoint may hold no
weights (``make-checkpoint --size nano --no-weights``, or super, or --kind distilled-i2v).

Each row begins with a check, a few steps and the decoding of a request that is the same in all
layouts. It warms the kernels up, and its latents, on every rank, are compared bit by bit with those of
one device, where ``replicas`` come first. Then the row is made once, or as often as ``--repeat`` says. Of long
rows ``--measured-steps`` makes a part, as in latency.py, but for layouts that ``--in-full`` names.
``--graphs`` makes rows of few tokens a second time on meshes, with CUDA graphs over the collectives.

``--one-rank`` projects what a mesh of more devices than there are would take: one rank does its work on
one device (one_rank.py), and its communication counts with ``--link-gbs`` and ``--link-us``.

The table is printed beside published records (published.py); ``--table`` prints that of earlier reports.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import Tensor

import latency
from clock import synchronize
from floor import Rates, measure_rates, tokens
from latency import LONG, NAMED, Fields, text_lengths, write_seconds
from machine import heading, provenance
from meshes import Meeting, degrees, device_of, on_mesh, ranks
from one_rank import Collectives, Link, check_one_rank, on_one_rank
from vllm_cosmos3.checkpoint.config import ModelConfig, read_config
from vllm_cosmos3.checkpoint.hub import resolve
from vllm_cosmos3.checkpoint.layout.sizes import SIZES
from vllm_cosmos3.engine_options import ParallelConfig
from vllm_cosmos3.errors import Cosmos3Error, InvalidRequest
from vllm_cosmos3.generator.output import Output, Sample
from vllm_cosmos3.generator.pipeline import Pipeline
from vllm_cosmos3.media import Clip
from vllm_cosmos3.parallel.checks import check_degrees
from vllm_cosmos3.parallel.graphs import ON_MESHES, Recording, few
from vllm_cosmos3.parallel.host_copy import free_caches
from vllm_cosmos3.progress import Report
from vllm_cosmos3.request.plan import Plan
from vllm_cosmos3.request.planner import make_plan
from vllm_cosmos3.request.request import from_fields
from vllm_cosmos3.stage.call_sequence import CallSequence
from whole_tables import HEAD, REPLICAS, Json, line, print_tables

WHOLE = ["t2i-256p", "t2i-720p", "t2v-256p", "t2v-480p", "t2v-720p", "i2v-720p"]
DISTILLED = ["i2v-480p-4step", "i2v-720p-4step"]
CHECKED, CHECKED_LONG = 10, 3  # steps; replayed ones are among the ten
CHECK_SEED = 200  # of the first row, and of its prompt, which no measured request has


class Rank:
    """What latency.py needs of a `Cosmos3`, on one rank: its neighbours make the same calls.

    ``output`` and ``latents`` are those of the last request.
    """

    output: Output
    latents: Mapping[str, Tensor]

    def __init__(self, pipeline: Pipeline, meeting: Meeting, collectives: Collectives) -> None:
        self._pipeline, self._meeting, self._collectives = pipeline, meeting, collectives
        self.device = pipeline.device

    def plan(self, fields: Fields) -> Plan:
        return make_plan(from_fields(fields), self._pipeline.model, self._pipeline.tokenizer)

    def gains(self, fields: Fields) -> bool:
        """Whether this mesh records graphs of a request where it is allowed, and else does not."""
        plan, mesh = self.plan(fields), self._pipeline.mesh
        counts = tokens(plan, self._pipeline.model.transformer.latent_patch_size)
        share = sum(counts[stream.name] for stream in plan.streams) // mesh.ulysses.size
        return mesh.world.size > 1 and mesh.tp.size == 1 and few(share, plan.steps)

    def generate(
        self, fields: Fields, progress: Report = lambda _: None, clip: Clip | None = None
    ) -> Output:
        """One request, begun by all ranks together; no ``clip`` is written."""
        plan = self.plan(fields)
        self._begin_together()
        start = time.perf_counter()
        output = self._run(plan, progress)
        timings = {**output.timings, "total": time.perf_counter() - start}
        self.output = replace(output, timings=timings)
        return self.output

    def _begin_together(self) -> None:
        """Processes come out of a meeting some milliseconds apart, those of a group at once."""
        self._meeting.wait()
        world = self._pipeline.mesh.world
        if world.group is not None:
            dist.barrier(group=world.group)
        synchronize(self.device)

    def _run(self, plan: Plan, progress: Report) -> Output:
        pipeline = self._pipeline
        state: Any = None

        def call(method: str, *args: Any) -> Any:
            nonlocal state
            with self._collectives.within(method):
                if method == "encode":
                    state = pipeline.encode(*args)
                    return None
                if method == "decode":
                    self.latents = dict(state.denoised[-1])
                return getattr(pipeline, method)(state, *args)

        calls = CallSequence(plan)
        while not calls.advance(call, progress):
            pass
        output: Output = call("finish")
        return output


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    try:
        if not args.table:
            return measure_all(args)
        print_tables([row for file in args.table for row in json.loads(file.read_text())["rows"]])
    except Cosmos3Error as error:
        print(f"scaling: {error}", file=sys.stderr)
        return 2
    return 0


def measure_all(args: argparse.Namespace) -> int:
    """Start a process for each device, which make all layouts; the tables at the end."""
    args.model = resolve(args.model, weights=False)
    config = read_config(args.model)
    usual = usual_layouts(args.devices, guided=not config.distilled)
    args.layouts = args.layouts or (usual[1:] if args.one_rank else usual)
    args.rows = args.rows or (DISTILLED if config.distilled else WHOLE)
    check(args, config)
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        processes.spawn(serve, (args,), nprocs=args.processes)
        rows = json.loads((args.folder / "report.json").read_text())["rows"]
    print()
    print_tables(rows)
    return 0


def usual_layouts(devices: int, *, guided: bool) -> list[str]:
    """One request on each device, and all devices on one request."""
    shared = [f"2x{devices // 2}x1"] if guided and devices % 2 == 0 else []
    return [REPLICAS, *shared, f"1x{devices}x1"] if devices > 1 else [REPLICAS]


def check(args: argparse.Namespace, config: ModelConfig) -> None:
    """Refuse, before anything starts, what would fail on all ranks.

    Raises:
        InvalidRequest: a mesh has another number of ranks than there are devices, or does not suit.
    """
    unknown = set(args.in_full) - set(args.layouts)
    if unknown:
        raise InvalidRequest("in-full", min(unknown), f"one of {', '.join(args.layouts)}")
    for layout in args.layouts:
        if args.one_rank:
            check_one_rank(layout)
        if layout != REPLICAS:
            if not re.fullmatch(r"\d+x\d+x\d+", layout):
                raise InvalidRequest("layouts", layout, f"{REPLICAS}, or cfg x ulysses x tp")
            if ranks(layout) != args.devices:
                possible = f"{REPLICAS}, or cfg x ulysses x tp of {args.devices} ranks"
                raise InvalidRequest("layouts", layout, possible)
            mesh = ParallelConfig(**degrees(layout))
            check_degrees(mesh, config.transformer, guided=not config.distilled)
    there = torch.cuda.device_count() if args.device == "cuda" else args.processes
    if args.processes > there:
        raise InvalidRequest("devices", args.devices, f"at most {there}")


def serve(rank: int, args: argparse.Namespace) -> None:
    """One process: its part of all layouts."""
    device = device_of(args.device, rank)
    config = read_config(args.model)
    facts = provenance(device)
    rates = measure_rates(config.transformer, device, getattr(torch, args.dtype))
    free_caches()
    if rank == 0:
        print(heading(facts), latency.rate_line(rates), HEAD, sep="\n", flush=True)
    process = Process(
        rank=rank,
        args=args,
        config=config,
        rates=rates,
        meeting=Meeting(args.folder / "meeting", args.processes),
        report={"machine": facts, "rates": asdict(rates), "refused": [], "rows": []},
    )
    options = {"model": args.model, "dtype": args.dtype, "load_format": args.load_format}
    for layout in args.layouts:
        work = partial(process.measure_layout, layout)
        if args.one_rank:
            on_one_rank(layout, device, process.collectives, work, **options, **args.engine)
            continue
        alone = layout == REPLICAS
        on_mesh(
            "1x1x1" if alone else layout,
            0 if alone else rank,
            device,
            args.folder / f"mesh-{layout}",
            work,
            **options,
            **args.engine,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One of the processes, each of which has a device. The first one completes the ``report``."""

    rank: int
    args: argparse.Namespace
    config: ModelConfig
    rates: Rates
    meeting: Meeting
    report: Json
    written: set[tuple[int, ...]] = field(default_factory=set)  # shapes of clips
    collectives: Collectives = field(default_factory=Collectives)  # of one rank without the others

    def measure_layout(self, layout: str, pipeline: Pipeline) -> None:
        """All rows of one layout; what there is, is written after each of them."""
        model = Rank(pipeline, self.meeting, self.collectives)
        lengths = text_lengths(self.args, pipeline.device)
        numbers = count()  # of requests, so that no two of all rows have the same prompt
        wanted = latency.requests(self.args, pipeline.device)
        for place, (name, fields) in enumerate(wanted.items()):
            check = latency.request(fields, lengths, CHECK_SEED + place)
            for graphs in (False, True) if self.args.graphs and model.gains(check) else (False,):
                try:
                    with graphs_on_meshes(allowed=graphs), counted() as recordings:
                        found = self.measure_row(model, layout, name, fields, check, numbers)
                except Cosmos3Error as error:  # which all ranks raise before a step
                    self.report["refused"].append(f"{name} on {layout}: {error}")
                    self._keep(self.report["refused"][-1])
                    continue
                self._join(layout, found | {"graphs": graphs, "recordings": len(recordings)})

    def measure_row(
        self,
        model: Rank,
        layout: str,
        name: str,
        fields: Fields,
        check: Fields,
        numbers: Iterator[int],
    ) -> Json:
        """What this process has to tell of one row."""
        steps = min(fields["num_inference_steps"], CHECKED_LONG if name in LONG else CHECKED)
        seen = model.generate({**check, "num_inference_steps": steps})
        reference = self.args.folder / f"{name}.pt"
        if layout == REPLICAS and self.rank == 0:
            torch.save({stream: x.cpu() for stream, x in model.latents.items()}, reference)
        self.meeting.wait()
        found: Json = {
            "check": {
                "steps": steps,
                "seconds": seen.timings["total"],
                "apart": difference(model.latents, reference) if reference.exists() else None,
            }
        }
        shape = seen.video.shape if self.rank == 0 and seen.video is not None else None
        save = self.args.save and shape is not None and shape not in self.written
        settings = argparse.Namespace(**vars(self.args) | {"save": save, "mp4": False})
        if layout in self.args.in_full:
            settings.measured_steps = None
        row = latency.measure(
            model, self.config, name, fields, self.rates, numbers, settings, warmed_up=True
        )
        found["row"] = asdict(row) | {"rate": row.rate}
        if self.args.one_rank:
            sent = self.collectives.of_request(row.steps)
            link = Link(bandwidth=1e9 * self.args.link_gbs, latency=1e-6 * self.args.link_us)
            found["communication"] = asdict(sent) | {"seconds": sent.seconds(link)}
        if name in self.args.profile and layout != REPLICAS:
            profiles = latency.profiles_of(model, f"{name} on {layout}", fields, numbers)
            found["profiles"] = [asdict(each) for each in profiles]
        if save and shape is not None:
            self.written.add(shape)
            found["smooth"] = write_seconds(smooth(shape, model.output.fps))
        if shape is not None and layout != REPLICAS:
            found["hand_over"] = hand_over_seconds(model.output)
        return found

    def _join(self, layout: str, found: Json) -> None:
        """Complete the report by a row, from what all processes have found."""
        (self.args.folder / f"rank-{self.rank}.json").write_text(json.dumps(found))
        self.meeting.wait()
        if self.rank == 0:
            files = (self.args.folder / f"rank-{rank}.json" for rank in range(self.args.processes))
            all_found = [json.loads(file.read_text()) for file in files]
            row = joined(layout, self.config, self.args.devices, all_found)
            row["as_published"] = as_published(self.args)
            self.report["rows"].append(row)
            self._keep(line(row))
        self.meeting.wait()

    def _keep(self, news: str) -> None:
        """Print and write what there is: a run that is cut short still tells something."""
        if self.rank == 0:
            print(news, flush=True)
            for file in (self.args.folder / "report.json", self.args.json):
                if file is not None:
                    file.write_text(json.dumps(self.report, indent=1))


def difference(latents: Mapping[str, Tensor], reference: Path) -> float:
    """That of the stream that is farthest from those of one device, relative; 0 for the same bits."""
    largest = 0.0
    for stream, kept in torch.load(reference).items():
        x = latents[stream].cpu()
        if not torch.equal(x, kept):
            largest = max(largest, float((x - kept).norm() / kept.norm()))
    return largest


@contextmanager
def graphs_on_meshes(*, allowed: bool) -> Iterator[None]:
    with patch.dict(os.environ, {ON_MESHES: str(int(allowed))}):
        yield


@contextmanager
def counted() -> Iterator[list[int]]:
    """One entry for each CUDA graph that is recorded meanwhile."""
    made: list[int] = []
    record = Recording._record

    def recorded(recording: Recording, arguments: tuple[Tensor, ...]) -> None:
        made.append(1)
        record(recording, arguments)

    with patch.object(Recording, "_record", recorded):
        yield made


def smooth(shape: tuple[int, ...], fps: float) -> Output:
    """A clip that moves as filmed ones do, uint8 [T, H, W, 3]."""
    from clips import ClipShape, frames_of  # which needs PyAV, as writing does

    frames, height, width, _ = shape
    wanted = ClipShape(width=width, height=height, seconds=frames / fps, fps=fps)
    return Output(samples=(Sample(seed=0, video=np.stack(list(frames_of(wanted, 0)))),), fps=fps)


def hand_over_seconds(output: Output) -> float:
    """Through a file to the process of the caller, which is another where ranks are several."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result"
        start = time.perf_counter()
        with file.open("wb") as spool:
            pickle.dump(output, spool, protocol=pickle.HIGHEST_PROTOCOL)
        with file.open("rb") as spool:
            pickle.load(spool)
        return time.perf_counter() - start


def joined(layout: str, config: ModelConfig, devices: int, found: Sequence[Json]) -> Json:
    """A row of the report, from what each process has found."""
    totals = [each["row"]["warm"]["total"] for each in found]
    if "communication" in found[0]:
        totals[0] += found[0]["communication"]["seconds"]
    apart = [each["check"]["apart"] for each in found]
    alone = layout == REPLICAS
    return found[0] | {
        "model": size_of(config),
        "layout": layout,
        "devices": devices,
        "seconds": max(totals) if alone else totals[0],
        "gpu_seconds": statistics.mean(totals) if alone else devices * totals[0],
        "floor": found[0]["row"]["floor"] / (1 if alone else devices),
        "peaks": [each["row"]["peak"] for each in found],
        "recordings": min(each["recordings"] for each in found),
        "apart": None if None in apart else max(apart),
    }


def as_published(args: argparse.Namespace) -> bool:
    """Whether requests and weights are those of the published records, in bfloat16."""
    same = args.frames is None and args.num_inference_steps is None
    return same and args.dtype == "bfloat16" and not args.engine


def size_of(config: ModelConfig) -> str | None:
    """The name of the size with these layers."""
    layers, width = config.transformer.num_hidden_layers, config.transformer.hidden_size
    return next(
        (name for name, one in SIZES.items() if (one.layers, one.hidden_size) == (layers, width)),
        None,
    )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scaling.py --whole",
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", nargs="?", help="checkpoint folder or repository")
    parser.add_argument(
        "--table", nargs="+", type=Path, metavar="JSON", help="print earlier reports"
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--layouts", nargs="+", help=f"meshes of all devices, and {REPLICAS}")
    parser.add_argument("--rows", nargs="+", choices=NAMED, metavar="ROW", help=", ".join(NAMED))
    parser.add_argument("--frames", type=int, help="of the rows' videos, instead of 189")
    parser.add_argument("--num-inference-steps", type=int, help="of all rows, instead of theirs")
    parser.add_argument("--tokens", type=int, nargs=2, metavar=("PROMPT", "NEGATIVE"))
    parser.add_argument("--repeat", type=int, default=1, help="runs after the check")
    parser.add_argument("--measured-steps", type=int, help="of long rows, after three others")
    parser.add_argument("--measured-rows", nargs="+", choices=NAMED, default=LONG, metavar="ROW")
    parser.add_argument(
        "--in-full", nargs="+", default=[], metavar="LAYOUT", help="whose long rows are made whole"
    )
    parser.add_argument("--graphs", action="store_true", help="CUDA graphs over collectives, too")
    parser.add_argument(
        "--one-rank", action="store_true", help="of each mesh, on one device: a projection"
    )
    parser.add_argument(
        "--link-gbs", type=float, default=300.0, help="bandwidth to other devices, in GB/s"
    )
    parser.add_argument(
        "--link-us", type=float, default=20.0, help="latency of a collective, in microseconds"
    )
    parser.add_argument(
        "--profile", nargs="+", choices=NAMED, default=[], metavar="ROW", help="kernels, on meshes"
    )
    parser.add_argument(
        "--save", action="store_true", help="time writing the MP4, once for each size"
    )
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--load-format", default="dummy", choices=["dummy", "auto"])
    parser.add_argument(
        "--engine", type=json.loads, default={}, help="more engine options, as JSON"
    )
    parser.add_argument("--json", type=Path, help="write the report here, after each row")
    args = parser.parse_args(argv)
    if (args.model is None) == (args.table is None):
        parser.error("a checkpoint, or --table with reports")
    if args.repeat < 1:
        parser.error("--repeat is at least 1")
    args.size = None  # of a request that latency.py would make up
    args.processes = 1 if args.one_rank else args.devices
    return args
