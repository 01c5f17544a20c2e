"""How long requests take, phase by phase: ``python benchmarks/latency.py CKPT --json out.json``.

On a CPU one small request, on a GPU the rows of ROWS (``--rows``); ``--size`` and its neighbours
make a request of your own instead. Each runs through `Cosmos3.generate`: once cold, which is the
first request of its shape in this process, then ``--repeat`` times. Of long rows ``--measured-steps
N`` makes 3 + N steps only and counts the others as the median of the last N, marked with ~.
Rows of BESIDE, FASTER and EDGE are made only where they are named: the first are as long as another,
the second not exact, or not of 35 guided steps, the last what Cosmos3-Edge makes by default. FP8 is a
setting of the engine, ``--engine '{"quantization": "fp8"}'``, which the report repeats.

Phases and steps are timed by events on the device that nothing waits for, the total by the host's
clock. The tail is what is left of the total: sound, frames to the host, Python. Writing MP4 is not
in it; ``--save`` times that apart, and ``--mp4`` puts it into the total: the file is written while
frames are decoded, and a smooth clip takes the place of the noise that random weights make. Every
request has prompt tokens of its own, so that no cache of texts helps, and the same negative ones, as
is usual.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import patch

import numpy as np
import torch

from clock import StepClock, percentile
from floor import Rates, Work, decode_work, measure_rates, step_work, text_work, tokens
from kernel_profile import Profile, profile_table
from machine import heading, provenance
from vllm_cosmos3.checkpoint.config import ModelConfig, read_config
from vllm_cosmos3.checkpoint.hub import resolve
from vllm_cosmos3.engine import Cosmos3
from vllm_cosmos3.errors import Cosmos3Error
from vllm_cosmos3.generator.output import Output, Report
from vllm_cosmos3.media import Clip, VideoWriter
from vllm_cosmos3.request.defaults import defaults_of
from vllm_cosmos3.request.plan import Plan
from vllm_cosmos3.request.request import parse_size

Fields = dict[str, Any]

WARM_STEPS = 3  # of an extrapolated row, not counted
LONG = [
    "t2v-480p",
    "t2v-720p",
    "i2v-720p",
    "edge-t2v-default",
]  # of which --measured-steps makes a part
CUSTOM = "custom"  # the row that options make up
PROFILED_STEPS = 2  # of a video; five times as many of an image, whose graph needs a few to record
VIDEO = {"num_frames": 189, "fps": 24, "num_inference_steps": 35, "guidance_scale": 6.0}
IMAGE = {**VIDEO, "num_frames": 1}
ROWS: dict[str, Fields] = {
    "t2i-256p": {**IMAGE, "size": "320x192"},
    "t2i-720p": {**IMAGE, "size": "1280x720"},
    "t2v-256p": {**VIDEO, "size": "320x192"},
    "i2v-256p": {**VIDEO, "size": "320x192", "image": True},
    "sound-256p": {**VIDEO, "size": "320x192", "generate_sound": True},
    "t2v-480p": {**VIDEO, "size": "832x480"},
    "t2v-720p": {**VIDEO, "size": "1280x720"},
    "policy-droid": {  # what a robot waits for: 32 actions, and no pixels
        "action_mode": "policy",
        "domain_name": "droid_lerobot",
        "raw_action_dim": 8,
        "action_state": [0.0] * 8,
        "num_frames": 33,
        "size": "640x544",
        "image": True,
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "flow_shift": 5.0,
        "output_type": "latent",
    },
}
BESIDE: dict[str, Fields] = {"i2v-720p": {**ROWS["t2v-720p"], "image": True}}
SEA = {"step_cache": "sea"}
FOUR = {"num_inference_steps": 4, "guidance_scale": 1.0}  # as a distilled checkpoint
FASTER: dict[str, Fields] = {
    "t2i-720p-sea": {**ROWS["t2i-720p"], **SEA},
    "t2v-256p-sea": {**ROWS["t2v-256p"], **SEA},
    "t2v-480p-sea": {**ROWS["t2v-480p"], **SEA},
    "t2v-720p-sea": {**ROWS["t2v-720p"], **SEA},
    "t2v-480p-4step": {**ROWS["t2v-480p"], **FOUR},
    "i2v-480p-4step": {**ROWS["t2v-480p"], **FOUR, "image": True},
    "t2v-720p-4step": {**ROWS["t2v-720p"], **FOUR},
    "i2v-720p-4step": {**ROWS["t2v-720p"], **FOUR, "image": True},
}
# Pictures of one request that share its steps; all of them guided, as in the row of one.
SHARED = {"preset": "high", "guidance_interval": [0.0, 1000.0]}
FASTER |= {f"t2i-256p-n{n}": {**ROWS["t2i-256p"], **SHARED, "n": n} for n in (1, 2, 4, 8)}


def default_row(kind: str, mode: str) -> Fields:
    """What a checkpoint of this kind makes where a request names only its prompt."""
    usual = defaults_of(kind)[mode]
    names = ("num_frames", "fps", "num_inference_steps", "guidance_scale", "flow_shift")
    fields = {name: getattr(usual, name) for name in names}
    return {**fields, "size": f"{usual.width}x{usual.height}"}


EDGE: dict[str, Fields] = {
    "edge-t2i-default": default_row("edge", "text2image"),  # 640x640, 50 steps
    "edge-t2v-default": default_row("edge", "text2video"),  # 832x480, 121 frames, 35 steps
}
NAMED = ROWS | BESIDE | FASTER | EDGE


class Model(Protocol):
    """What is measured: a `Cosmos3`, or one rank of a mesh."""

    device: torch.device

    def plan(self, fields: Fields, /) -> Plan: ...

    def generate(
        self, fields: Fields, /, *, progress: Report = ..., clip: Clip | None = ...
    ) -> Output: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One request. Seconds by phase, seconds by step; bytes; steps of the step cache."""

    phases: dict[str, float]
    steps: list[float]
    peak: int
    save: float | None
    reused: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one kind of request took. Medians of the warm runs; seconds, bytes, FLOP."""

    name: str
    request: Fields
    tokens: dict[str, int]
    steps: int
    reused: int  # of the steps, by the step cache
    measured_steps: int | None  # None: all of them; else the denoising is extrapolated
    cold: dict[str, float]
    warm: dict[str, float]
    step_p50: float
    step_p99: float
    save: float | None
    peak: int
    step_flop: float
    decode_flop: float
    denoise_floor: float
    floor: float  # of text, denoising and decoding
    runs: list[dict[str, float]]

    @property
    def rate(self) -> float:
        """FLOP/s while denoising, of the steps that were computed."""
        return self.step_flop * (self.steps - self.reused) / self.warm["denoise"]


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        with Cosmos3(
            args.model,
            dtype=args.dtype,
            device=args.device,
            load_format=args.load_format,
            attention_backend=args.attention_backend,
            **args.engine,
        ) as model:
            report = measure_all(model, read_config(resolve(args.model, weights=False)), args)
    except Cosmos3Error as error:
        print(f"latency: {error}", file=sys.stderr)
        return 2
    print(tables(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def measure_all(model: Cosmos3, config: ModelConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Every row, printed as it comes: a run that is cut short still tells something."""
    device = model.device
    facts = provenance(device)
    print(heading(facts), f"model load: {model.load_seconds:.1f} s", sep="\n", flush=True)
    rates = measure_rates(config.transformer, device, getattr(torch, args.dtype))
    print(rate_line(rates), HEAD, sep="\n", flush=True)
    rows, profiles = [], []
    numbers = count()  # of requests, so that no two of all rows have the same prompt
    for name, fields in requests(args, device).items():
        row = measure(model, config, name, fields, rates, numbers, args)
        print(line(asdict(row) | {"rate": row.rate}), flush=True)
        rows.append(asdict(row) | {"rate": row.rate})
        if args.profile:
            profiles += profiles_of(model, name, fields, numbers)
    return {
        "machine": facts,
        "model_load_s": model.load_seconds,
        "dtype": args.dtype,
        "engine": args.engine,
        "rates": asdict(rates),
        "rows": rows,
        "profiles": [asdict(each) for each in profiles],
    }


def requests(args: argparse.Namespace, device: torch.device) -> dict[str, Fields]:
    """The rows that were asked for, or the one request that the other options make up."""
    if args.rows or (device.type != "cpu" and args.size is None):
        chosen = {name: dict(NAMED[name]) for name in args.rows or ROWS}
        for fields in chosen.values():
            if args.frames and fields["num_frames"] > 1:
                fields["num_frames"] = args.frames
            if args.num_inference_steps:
                fields["num_inference_steps"] = args.num_inference_steps
        return chosen
    return {
        CUSTOM: {
            "size": args.size or "320x192",
            "num_frames": args.num_frames,
            "num_inference_steps": args.num_inference_steps or 8,
            "guidance_scale": args.guidance_scale,
            "generate_sound": args.sound,
        }
    }


def measure(
    model: Model,
    config: ModelConfig,
    name: str,
    fields: Fields,
    rates: Rates,
    numbers: Iterator[int],
    args: argparse.Namespace,
    *,
    warmed_up: bool = False,
) -> Row:
    """One cold run unless the model is warmed up, the warm ones, and what they should have taken."""
    steps = fields["num_inference_steps"]
    measured = args.measured_steps if name in (*args.measured_rows, CUSTOM) else None
    if measured and measured + WARM_STEPS >= steps:
        measured = None
    if measured:
        fields = {**fields, "num_inference_steps": WARM_STEPS + measured}
    lengths = text_lengths(args, model.device)
    plan = model.plan(request(fields, lengths, 0))
    runs = [
        run(
            model,
            request(fields, lengths, next(numbers)),
            measured,
            steps,
            save=args.save,
            mp4=args.mp4,
        )
        for _ in range(args.repeat + (not warmed_up))
    ]
    warm = runs if warmed_up else runs[1:] or runs
    reused = max(each.reused for each in warm)
    every_step = [step for each in warm for step in each.steps]
    step, text = step_work(config.transformer, plan), text_work(config.transformer, plan)
    decoded = [decode_work(config, plan.streams[0].shape)] * len(plan.seeds) * plan.decoded
    decode = sum(decoded, Work())
    denoise_floor = step.floor(rates) * (steps - reused)
    saves = [each.save for each in warm if each.save is not None]
    return Row(
        name=name,
        request=fields | {"num_inference_steps": steps},
        tokens=tokens(plan, config.transformer.latent_patch_size),
        steps=steps,
        reused=reused,
        measured_steps=measured,
        cold=runs[0].phases,
        warm=medians([each.phases for each in warm]),
        step_p50=percentile(every_step, 50),
        step_p99=percentile(every_step, 99),
        save=statistics.median(saves) if saves else None,
        peak=max(each.peak for each in warm),
        step_flop=step.total,
        decode_flop=decode.total,
        denoise_floor=denoise_floor,
        floor=text.floor(rates) + denoise_floor + decode.floor(rates),
        runs=[each.phases for each in runs],
    )


def text_lengths(args: argparse.Namespace, device: torch.device) -> list[int] | None:
    """Tokens of the prompt and of the negative one; None for real texts."""
    return args.tokens or ([512, 512] if device.type != "cpu" else None)


def request(fields: Fields, lengths: list[int] | None, seed: int) -> Fields:
    """The fields of one run: its own prompt, a seed, and pixels where a picture is asked for."""
    fields = {**fields, "seed": seed, "allow_untrained_size": True}
    if fields.pop("image", False):
        width, height = parse_size(fields["size"])
        random = np.random.RandomState(0)
        fields["image"] = random.randint(0, 256, (height, width, 3), dtype=np.uint8)
    if lengths is None:
        return {**fields, "prompt": f"Paper boat number {seed} floats down a stream"}
    prompt, negative = lengths
    fields["prompt_token_ids"] = [10 + (7 * i + seed) % 400 for i in range(prompt)]
    if fields["guidance_scale"] != 1:
        fields["negative_prompt_token_ids"] = [20 + 3 * i % 400 for i in range(negative)]
    return fields


def run(
    model: Model,
    fields: Fields,
    measured: int | None,
    steps: int,
    *,
    save: bool,
    mp4: bool,
) -> Run:
    """One request. Steps that were not made count as the median of the last ``measured`` ones."""
    clock = StepClock(model.device)
    if model.device.type != "cpu":  # whose peak is that of the process's life
        torch.accelerator.reset_peak_memory_stats(model.device)
    with mp4_of(fields, wanted=mp4) as clip:
        output = model.generate(fields, progress=clock, clip=clip)
    timed = clock.steps()[-measured:] if measured else clock.steps()
    phases = {name: seconds for name, seconds in output.timings.items() if name != "model_load"}
    known = ("text", "vae_encode", "denoise", "vae_decode")
    phases["tail"] = max(0.0, phases["total"] - sum(phases[name] for name in known))
    if measured:
        missing = statistics.median(timed) * (steps - fields["num_inference_steps"])
        phases["total"] += missing
        phases["denoise"] += missing
        phases["per_step"] = phases["denoise"] / steps
    written = write_seconds(output) if save else None
    return Run(
        phases=phases,
        steps=timed,
        peak=output.peak_memory,
        save=written,
        reused=output.reused_steps,
    )


@contextmanager
def mp4_of(fields: Fields, *, wanted: bool) -> Iterator[Clip | None]:
    """The file that a video is written to while it is decoded, which gets a smooth clip instead."""
    if not wanted or fields["num_frames"] == 1:
        yield None
        return
    frames = iter(smooth_frames(fields["num_frames"], fields["size"], fields["fps"]))
    write = VideoWriter.write

    def write_smooth(writer: VideoWriter, made: np.ndarray) -> None:
        write(writer, np.stack([next(frames) for _ in made]))

    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(VideoWriter, "write", write_smooth),
    ):
        yield Clip(path=Path(folder) / "clip.mp4")


@lru_cache(maxsize=2)
def smooth_frames(count: int, size: str, fps: float) -> list[np.ndarray]:
    """Frames that move as filmed ones do, uint8 [H, W, 3]."""
    from clips import ClipShape, frames_of  # which needs PyAV, as writing does

    width, height = parse_size(size)
    shape = ClipShape(width=width, height=height, seconds=count / fps, fps=fps)
    return list(frames_of(shape, 0))


def write_seconds(output: Output) -> float:
    """Writing the file that a user would get. Random weights make noise, the encoder's worst case."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        output.save(Path(folder) / "result")
        return time.perf_counter() - start


def medians(runs: list[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.median(each[name] for each in runs) for name in runs[0]}


def profiles_of(model: Model, name: str, fields: Fields, numbers: Iterator[int]) -> list[Profile]:
    """Of a few steps, and of a few steps with what follows them."""
    kinds = (True,) if "output_type" in fields else (True, False)
    few = (short(fields, next(numbers), latents=latents) for latents in kinds)
    return [profile(model, name, each) for each in few]


def short(fields: Fields, number: int, *, latents: bool) -> Fields:
    """A few steps of a row, with or without what follows them."""
    steps, few = fields["num_inference_steps"], FOUR["num_inference_steps"]
    if steps > few:  # else those of a distilled checkpoint, which makes no others
        steps = PROFILED_STEPS if fields["num_frames"] > 1 else 5 * PROFILED_STEPS
    fields = {**request(fields, [512, 512], number), "num_inference_steps": steps}
    return {**fields, "output_type": "latent"} if latents else fields


def profile(model: Model, name: str, fields: Fields) -> Profile:
    """Kernels of a request whose shape was run before."""
    what = f"{name}, {fields['num_inference_steps']} steps"
    if "output_type" not in fields:
        what += " and the decoder"
    return profile_table(what, lambda: model.generate(fields), model.device)


HEAD = (
    "| request | tokens | steps | cold s | total s | text | denoise | step p50 ms | p99 | encode "
    "| decode | tail | save | peak GiB | TFLOP/s | of product rate | floor s | floor / total |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def line(row: dict[str, Any], product_rate: float | None = None) -> str:
    """A row of the Markdown table. Extrapolated figures are marked with a tilde."""
    warm, about = row["warm"], "~" if row["measured_steps"] else ""
    measured = f" ({row['measured_steps']} measured)" if row["measured_steps"] else ""
    measured += f" ({row['reused']} reused)" if row["reused"] else ""
    share = "" if product_rate is None else f"{100 * row['rate'] / product_rate:.0f} %"
    cells = [
        row["name"],
        ", ".join(f"{count:,}" for count in row["tokens"].values()),
        f"{row['steps']}{measured}",
        f"{about}{row['cold']['total']:.2f}",
        f"{about}{warm['total']:.2f}",
        f"{warm['text']:.3f}",
        f"{about}{warm['denoise']:.2f}",
        f"{1000 * row['step_p50']:.1f}",
        f"{1000 * row['step_p99']:.1f}",
        f"{warm['vae_encode']:.3f}",
        f"{warm['vae_decode']:.2f}",
        f"{warm['tail']:.3f}",
        "" if row["save"] is None else f"{row['save']:.2f}",
        f"{row['peak'] / 2**30:.1f}",
        f"{row['rate'] / 1e12:.3g}",
        share,
        f"{row['floor']:.3g}",
        f"{100 * row['floor'] / warm['total']:.0f} %",
    ]
    return f"| {' | '.join(cells)} |"


def rate_line(rates: Rates) -> str:
    return (
        f"rates of this run: products {rates.product / 1e12:.4g} TFLOP/s, attention "
        f"{rates.attention / 1e12:.4g} TFLOP/s, reading {rates.read / 1e9:.4g} GB/s"
    )


def tables(report: dict[str, Any]) -> str:
    """What a person reads at the end: the table in one piece, then the profiles."""
    product = report["rates"]["product"]
    parts = ["", HEAD, *(line(row, product) for row in report["rows"])]
    parts += [Profile(**each).table() for each in report["profiles"]]
    return "\n".join(parts)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", help="checkpoint folder or repository")
    parser.add_argument("--rows", nargs="+", choices=NAMED, metavar="ROW", help=", ".join(NAMED))
    parser.add_argument("--frames", type=int, help="of the rows' videos, instead of theirs")
    parser.add_argument("--size", help="of a request of your own; default 320x192")
    parser.add_argument("--num-frames", type=int, default=25)
    parser.add_argument("--num-inference-steps", type=int, help="default: 35 for rows, else 8")
    parser.add_argument("--guidance-scale", type=float, default=6.0)
    parser.add_argument("--sound", action="store_true")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--attention-backend", default="auto")
    parser.add_argument(
        "--engine", type=json.loads, default={}, help="more arguments of Cosmos3, as JSON"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        nargs=2,
        metavar=("PROMPT", "NEGATIVE"),
        help="lengths of the texts; default: 512 512 on a GPU, real texts on a CPU",
    )
    parser.add_argument("--repeat", type=int, default=3, help="runs after the first")
    parser.add_argument("--measured-steps", type=int, help="of long rows, after three others")
    parser.add_argument(
        "--measured-rows",
        nargs="+",
        choices=NAMED,
        default=LONG,
        metavar="ROW",
        help="the long rows",
    )
    parser.add_argument("--profile", action="store_true", help="kernels of a few steps of each row")
    parser.add_argument("--save", action="store_true", help="time writing the MP4 or PNG too")
    parser.add_argument("--mp4", action="store_true", help="write it meanwhile, within the total")
    parser.add_argument("--json", type=Path, help="write the report here")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
