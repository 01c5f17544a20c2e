"""How much memory one device needs, against the plan: ``python benchmarks/memory.py CHECKPOINT``.

The checkpoint may hold no weights (``make-checkpoint --size nano --no-weights``): they are random.
Every placement of the weights runs the same requests, and must give the latents of the first one bit
by bit. Peaks are those of torch's allocator. Then the limits: a request under a cap that the
allocator enforces, a refusal before any step, and an error of the allocator inside a step.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from clock import now
from machine import heading, provenance
from vllm_cosmos3.engine_options import EngineConfig, ParallelConfig
from vllm_cosmos3.errors import OutOfMemory
from vllm_cosmos3.generator.memory import MemoryEstimate, estimate, work_of
from vllm_cosmos3.generator.memory.reservation import lift_limit
from vllm_cosmos3.generator.pipeline import Pipeline
from vllm_cosmos3.parallel.mesh import Mesh, init_mesh
from vllm_cosmos3.request.planner import make_plan
from vllm_cosmos3.request.request import GenerateRequest

GIB = 2**30
PLACEMENTS: dict[str, dict[str, Any]] = {
    "all on the device": {"und_residency": "gpu"},
    "text tower on the host": {"und_residency": "host"},
    "layers streamed": {"und_residency": "gpu", "enable_layerwise_offload": True},
    "text tower on the host, layers streamed": {
        "und_residency": "host",
        "enable_layerwise_offload": True,
    },
}
REFERENCES: dict[str, str] = {}  # digests of the first placement's latents, by request
CAPS = ((48.0, {}), (24.0, {"enable_layerwise_offload": True}))  # GiB, on top of und_residency auto


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One request. Bytes and seconds; phases are peaks with the weights."""

    placement: str
    request: str
    loading: int
    peak: int
    planned: int
    phases: dict[str, int]
    planned_phases: dict[str, int]
    text_s: float
    step_s: float
    decode_s: float
    equal: bool | None  # to the first placement


def main() -> int:
    args = parse()
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu")
    mesh = init_mesh(ParallelConfig())
    plain = EngineConfig(
        model=args.checkpoint,
        device=str(device),
        quantization=args.quantization,
        dtype=args.dtype,
        load_format=args.load_format,
    )
    rows: list[Row] = []
    for name in args.placements or PLACEMENTS:
        rows += placed(replace(plain, **PLACEMENTS[name]), name, mesh, args)
        free(device)
    limits: list[str] = []
    if device.type == "cuda":
        for cap, settings in CAPS:
            config = replace(plain, memory_limit=cap, **settings)
            limits += capped(config, mesh, args)
            free(device)
        limits += refused(replace(plain, und_residency="gpu"), mesh, args)
    facts = provenance(device)
    print("\n".join(["", heading(facts), "", table(rows), "", *limits]))
    if args.json:
        report = {"facts": facts, "rows": [asdict(row) for row in rows], "limits": limits}
        args.json.write_text(json.dumps(report, indent=2))
    return 0 if all(row.equal is not False for row in rows) else 1


def load(config: EngineConfig, mesh: Mesh) -> tuple[Pipeline, int]:
    """A pipeline, and the bytes at the peak of loading it."""
    device = torch.device(config.device)
    reset_peak(device)
    pipeline = Pipeline.load(config, mesh, device)
    return pipeline, peak(device)


def free(device: torch.device) -> None:
    """Nothing of a pipeline that nobody refers to is left afterwards."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        lift_limit(device)


def placed(config: EngineConfig, name: str, mesh: Mesh, args: argparse.Namespace) -> list[Row]:
    """All requests with the weights in one place."""
    pipeline, loading = load(config, mesh)
    rows = []
    for label in args.requests:
        rows.append(measure(pipeline, name, label, loading, args))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    return rows


def measure(
    pipeline: Pipeline,
    placement: str,
    label: str,
    loading: int,
    args: argparse.Namespace,
) -> Row:
    """One request, phase by phase."""
    device, plan = (
        pipeline.device,
        make_plan(request(label, args), pipeline.model, pipeline.tokenizer),
    )
    memory: MemoryEstimate = estimate(pipeline.model, pipeline.config, work_of(plan))
    pipeline.texts.clear()
    phases: dict[str, int] = {}
    seconds: dict[str, float] = {}

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        reset_peak(device)
        start = now(device)
        yield
        seconds[name] = now(device) - start
        phases[name] = peak(device)

    with phase("text"):
        state = pipeline.encode(plan)
    pipeline.step(state)  # kernels are chosen in the first one
    with phase("denoise"):
        while not state.done:
            pipeline.step(state)
    latents = state.denoised[0]["vision"]
    digest = hashlib.sha256(latents.cpu().numpy().tobytes()).hexdigest()
    with phase("decode"):
        pipeline.decode(state)
    equal = digest == REFERENCES[label] if label in REFERENCES else None
    REFERENCES.setdefault(label, digest)
    return Row(
        placement=placement,
        request=label,
        loading=loading,
        peak=max(loading, *phases.values()),
        planned=memory.peak,
        phases=phases,
        planned_phases={name: memory.resident + size for name, size in memory.phases.items()},
        text_s=seconds["text"],
        step_s=seconds["denoise"] / (plan.steps - 1),
        decode_s=seconds["decode"],
        equal=equal,
    )


def capped(config: EngineConfig, mesh: Mesh, args: argparse.Namespace) -> Iterator[str]:
    """The largest request, held to a limit by the allocator."""
    pipeline, loading = load(config, mesh)
    label, cap = args.requests[-1], config.memory_limit
    row = measure(pipeline, f"cap of {cap:g} GiB", label, loading, args)
    yield (
        f"* Under a cap of {cap:g} GiB, text tower on the {pipeline.config.und_residency},"
        f" layers {'streamed' if pipeline.config.enable_layerwise_offload else 'resident'}:"
        f" {label} peaks at {row.peak / GIB:.1f} GiB, {row.step_s:.2f} s a step,"
        f" bits equal: {row.equal}."
    )


def refused(config: EngineConfig, mesh: Mesh, args: argparse.Namespace) -> Iterator[str]:
    """What happens where memory does not suffice."""
    pipeline, _ = load(config, mesh)
    yield f"* Refused before any step: {refusal(pipeline, args.requests[-1], args)}"
    yield f"* Inside a step: {failure(pipeline, args)}"


def refusal(pipeline: Pipeline, label: str, args: argparse.Namespace) -> str:
    """Of a request for which a ballast leaves no room; then a small one is served."""
    plan = make_plan(request(label, args), pipeline.model, pipeline.tokenizer)
    need = estimate(pipeline.model, pipeline.config, work_of(plan)).request
    ballast = fill(pipeline.device, leave=need // 2)
    try:
        pipeline.encode(plan)
    except OutOfMemory as error:
        del ballast
        return f"{error}. {served(pipeline, args)}"
    raise AssertionError("was not refused")


def failure(pipeline: Pipeline, args: argparse.Namespace) -> str:
    """Of torch's allocator in a step, provoked by a ballast that comes after the admission."""
    state = pipeline.encode(
        make_plan(request(args.requests[-1], args), pipeline.model, pipeline.tokenizer)
    )
    pipeline.step(state)
    ballast = fill(pipeline.device, leave=64 * 2**20)
    try:
        pipeline.step(state)
    except torch.OutOfMemoryError as error:
        words = str(error).splitlines()[0][:120]
    else:
        raise AssertionError("did not run out of memory")
    del ballast, state
    gc.collect()
    torch.cuda.empty_cache()
    return f"{words}... {served(pipeline, args)}"


def served(pipeline: Pipeline, args: argparse.Namespace) -> str:
    """The smallest request, compared with what it gave before."""
    label = args.requests[0]
    state = pipeline.encode(make_plan(request(label, args), pipeline.model, pipeline.tokenizer))
    while not state.done:
        pipeline.step(state)
    digest = hashlib.sha256(state.denoised[0]["vision"].cpu().numpy().tobytes()).hexdigest()
    return f"Then {label} works, bits equal: {digest == REFERENCES[label]}."


def fill(device: torch.device, leave: int) -> torch.Tensor:
    """A tensor that leaves so many bytes of the device."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return torch.empty(max(0, free - leave), dtype=torch.uint8, device=device)


def request(label: str, args: argparse.Namespace) -> GenerateRequest:
    """``label`` is WIDTHxHEIGHTxFRAMES, with "+sound" at the end if there is some."""
    size, _, frames = label.removesuffix("+sound").rpartition("x")
    return GenerateRequest(
        prompt_token_ids=list(range(10, 10 + args.tokens)),
        negative_prompt_token_ids=list(range(20, 20 + args.tokens)),
        size=size,
        num_frames=int(frames),
        num_inference_steps=args.steps,
        guidance_scale=6.0,
        generate_sound=label.endswith("+sound"),
        seed=0,
        allow_untrained_size=True,
    )


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.init()  # the allocator of a device that was not used yet cannot be asked
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def table(rows: list[Row]) -> str:
    """Markdown, in GiB: measured / planned."""
    lines = [
        "| weights | request | load | text | denoise | decode | peak / plan | off by "
        "| text s | step s | decode s | bits equal |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        phases = (
            f"{row.phases[name] / GIB:.2f} / {row.planned_phases[name] / GIB:.2f}"
            for name in ("text", "denoise", "decode")
        )
        off = f"{(row.planned - row.peak) / row.peak:+.1%}" if row.peak else ""
        equal = {None: "", True: "yes", False: "NO"}[row.equal]
        lines.append(
            f"| {row.placement} | {row.request} | {row.loading / GIB:.2f} | {' | '.join(phases)} "
            f"| {row.peak / GIB:.2f} / {row.planned / GIB:.2f} | {off} "
            f"| {row.text_s:.2f} | {row.step_s:.3f} | {row.decode_s:.2f} | {equal} |"
        )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization", choices=["none", "fp8"])
    parser.add_argument("--load-format", default="dummy", choices=["dummy", "auto"])
    parser.add_argument("--requests", nargs="+", default=["1280x720x1", "320x192x189", "320x192x189+sound", "832x480x189", "1280x720x189"], metavar="WxHxN")  # fmt: skip
    parser.add_argument("--placements", nargs="+", choices=list(PLACEMENTS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=3, help="the first one is not timed")
    parser.add_argument("--tokens", type=int, default=512, help="of the prompt and of the negative")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
