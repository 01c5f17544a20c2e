"""``vllm-cosmos3 plan``: memory per GPU for a checkpoint, a mesh and a request, before anything loads.

Everything is computed from the configuration files; no device is needed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from vllm_cosmos3.checkpoint.config import ModelConfig, read_config
from vllm_cosmos3.checkpoint.hub import resolve
from vllm_cosmos3.checkpoint.latents import pixel_frames
from vllm_cosmos3.checkpoint.layout.files import published_files
from vllm_cosmos3.checkpoint.layout.sizes import SIZES
from vllm_cosmos3.cli.flags import add_engine_flags, given, integer, number
from vllm_cosmos3.cli.units import gib_of
from vllm_cosmos3.engine_options import OPTIONS, EngineConfig, EngineOptions
from vllm_cosmos3.errors import InvalidRequest, did_you_mean
from vllm_cosmos3.generator.memory import (
    Layout,
    MemoryEstimate,
    Work,
    estimate,
    layouts,
    resolve_residency,
    resolved_parameters,
    session_work,
    suggestions,
    work_with,
)
from vllm_cosmos3.parallel.checks import check_degrees
from vllm_cosmos3.request.defaults import TEXT_TOKENS
from vllm_cosmos3.request.fields import Spec
from vllm_cosmos3.request.request import SPECS, GenerateRequest
from vllm_cosmos3.request.world import opening_of, session_request

GIB = 2**30
PHASES = {  # of the estimate; the largest peak counts
    "text": "reading text",
    "encode": "encoding inputs",
    "denoise": "denoising",
    "decode": "decoding",
    "sound": "decoding sound",
}
WITHOUT_CHECKPOINT = {"nano": "base", "super": "base", "edge": "edge"}  # size -> kind
WITHOUT_MEMORY = (  # of the options
    "weight_transfer",
    "device",
    "attention_backend",
    "distributed_executor_backend",
)
GPU_MEMORY = Spec(
    kind="float", low=0, above=True, high=100_000, unit="GiB", help="memory of one GPU"
)
SESSIONS = Spec(kind="int", low=1, high=10_000, help="sessions at once")
GPUS = Spec(kind="int", low=1, high=4096, help="in all")
OF_REQUESTS = {  # with their defaults: of checkpoints that are no simulators
    "num_frames": None, "guidance_scale": None, "generate_sound": False, "step_cache": "none",
}  # fmt: skip
OF_SESSIONS = {"history": None, "sessions": 1}  # of simulators
PURPOSES = {
    "latency": "latency: one request is done soonest",
    "throughput": "throughput: most requests an hour",
}
LENGTH = Spec(
    kind="int", low=1, high=SPECS["max_sequence_length"].high, unit="tokens", help="of each prompt"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="folder, repository, demo, demo-4step, demo-policy, nano, super or edge",
    )
    add_engine_flags(parser, [name for name in OPTIONS if name not in WITHOUT_MEMORY])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cuda, or cpu for what torch allocates there (default: cuda)")  # fmt: skip
    parser.add_argument("--gpu-memory", type=gib_of, default=80.0, metavar="GIB", help="memory of one GPU (default: 80)")  # fmt: skip
    parser.add_argument(
        "--gpus",
        type=integer,
        metavar="N",
        help="also say how to divide this many GPUs for latency and for throughput",
    )
    parser.add_argument("--size", metavar="WxH", help="output size (default: of the checkpoint)")  # fmt: skip
    parser.add_argument("--num-frames", type=integer, metavar="N", help="number of frames; 1 for an image (default: of the checkpoint)")  # fmt: skip
    parser.add_argument("--guidance-scale", type=number, metavar="X", help="guidance scale; 1: no negative prompt (default: of the checkpoint)")  # fmt: skip
    parser.add_argument("--generate-sound", action="store_true", help="include a sound track")
    parser.add_argument("--step-cache", choices=SPECS["step_cache"].choices, default="none", help="sea: keep what SeaCache reuses (default: none)")  # fmt: skip
    parser.add_argument("--text-tokens", type=integer, default=TEXT_TOKENS, metavar="N", help=f"length of each prompt in tokens (default: {TEXT_TOKENS:,})")  # fmt: skip
    parser.add_argument("--history", type=integer, metavar="N", help="of a simulator: latent frames that a session remembers (default: 226)")  # fmt: skip
    parser.add_argument("--sessions", type=integer, default=1, metavar="N", help="of a simulator: sessions at once (default: 1)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes")


def run(args: argparse.Namespace) -> int:
    """Print the table, or JSON. Status 1 where the request does not fit."""
    options = EngineOptions(
        args.model, device=args.device, **given(args, OPTIONS.keys() - {"device"})
    )
    model = options.applied(known_model(args.model, options.revision, options.checkpoint_kind))
    engine = options.on(model.path, args.device)
    check_degrees(engine.parallel, model.transformer, guided=not model.distilled)
    work = work_of(args, model)
    gpu = GPU_MEMORY.checked("gpu_memory", args.gpu_memory)
    engine = engine.limited(round(gpu * GIB))
    limit = round(min(gpu, engine.memory_limit or gpu) * GIB)
    gpus = None if args.gpus is None else GPUS.checked("gpus", args.gpus)
    divided = {} if gpus is None else layouts(model, engine, work, limit, gpus)
    engine = resolve_residency(model, engine, work, limit)
    memory = estimate(model, engine, work)
    advice = [] if memory.needed <= limit else suggestions(model, engine, work, limit)
    if args.json:
        said = record(memory, engine, work, limit, advice)
        print(json.dumps(said | {"layouts": layout_records(divided)}, indent=2))
    else:
        print("\n".join(table(args.model, memory, engine, work, model)))
        print("\n".join(verdict(memory.needed, limit, advice, divides=bool(divided))))
        if gpus is not None:
            print("\n".join(layout_lines(divided, gpus, limit)))
    return 0 if divided or memory.needed <= limit else 1


def known_model(name: str, revision: str | None = None, kind: str | None = None) -> ModelConfig:
    """The configuration of a checkpoint, or the published one of a size."""
    if name not in WITHOUT_CHECKPOINT or Path(name).exists():
        near = (
            ""
            if "/" in name or Path(name).exists()
            else did_you_mean(name.lower(), WITHOUT_CHECKPOINT)
        )
        if near:
            raise InvalidRequest(
                "model", name, f"a folder, a repository, nano, super or edge; {near}"
            )
        found = resolve(name, revision, weights=False)
        return read_config(found, kind)
    size = SIZES[name]
    assert size.vocab_size is not None  # tiny alone takes it from its tokenizer
    ids: dict[str, int] = defaultdict(int)  # of markup tokens, which take no memory
    files = published_files(size, WITHOUT_CHECKPOINT[name], size.vocab_size, ids, "bfloat16")
    with tempfile.TemporaryDirectory() as folder:
        for file, contents in files.items():
            path = Path(folder) / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(contents))
        return read_config(Path(folder), kind)


def work_of(args: argparse.Namespace, model: ModelConfig) -> Work:
    """The sizes of a request with these flags, checked as a request is; warnings go to stderr."""
    length = LENGTH.checked("text_tokens", args.text_tokens)
    _check_suits(args, simulator=model.causal is not None)
    if model.causal is not None:
        fields = {"size": args.size, "history": args.history}
        asked = session_request(
            {name: value for name, value in fields.items() if value is not None}
        )
        sessions = SESSIONS.checked("sessions", args.sessions)
        return session_work(model, opening_of(model, asked, length), sessions)
    request = GenerateRequest(
        prompt="any",
        size=args.size,
        num_frames=args.num_frames,
        guidance_scale=args.guidance_scale,
        generate_sound=args.generate_sound,
        step_cache=args.step_cache,
    )
    request = replace(request, allow_untrained_size=True)  # of which no error should propose one
    numbers = resolved_parameters(model, request)
    for warning in numbers.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    work = work_with(numbers, model)
    return replace(work, text=(length,) * len(work.text))


def _check_suits(args: argparse.Namespace, *, simulator: bool) -> None:
    """Refuse what this checkpoint has no use for."""
    values = vars(args)
    for name, default in OF_REQUESTS.items() if simulator else OF_SESSIONS.items():
        if values[name] != default:
            kind = "is a simulator" if simulator else "is no simulator"
            raise InvalidRequest(name, values[name], f"left out: {args.model} {kind}", "conflict")


def table(
    name: str, memory: MemoryEstimate, engine: EngineConfig, work: Work, model: ModelConfig
) -> list[str]:
    """What a person reads, in GiB."""
    mesh = engine.parallel
    shape = next(shape for name, shape in work.streams if name == "vision")
    ranks = _gpus(mesh.world_size)
    if engine.data_parallel_size > 1:
        ranks = f"{engine.data_parallel_size} replicas of {ranks}"
    axes, degrees = (" x ".join(map(str, part)) for part in zip(*mesh.degrees.items(), strict=True))
    frames, scale = pixel_frames(shape[2], model.vae), model.vae.scale_factor_spatial
    adapted = "".join(f" + {adapter.name}:{adapter.scale:g}" for adapter in model.adapters)
    size, length = f"{shape[4] * scale}x{shape[3] * scale}", f"{frames} frames"
    sessions = []
    if work.history:
        length = f"{work.sessions} session{'s' if work.sessions > 1 else ''} in chunks of {shape[2]} latent frames"
        sessions = [("kept by each session", memory.held)]
    quantized = f" and {model.quantization.scheme}" if model.quantization else ""
    rows = [
        *((f"weights: {part}", size) for part, size in memory.weights.items()),
        ("all weights", memory.resident),
        ("start, at its peak", memory.loading),
        *sessions,
        *(
            (f"peak while {PHASES[phase]}", memory.resident + n)
            for phase, n in memory.phases.items()
        ),
        ("reserve: CUDA, workspaces", memory.reserve),
        ("needed", memory.needed),
        *((f"on the host: {part}", size) for part, size in memory.host.items()),
    ]
    return [
        f"{name}{adapted}, {engine.dtype}{quantized}, on {ranks} ({axes}: {degrees})",
        f"{size}, {length}, text {' and '.join(map(str, work.text))} tokens, text tower on the {engine.und_residency}",
        "",
        f"{'GiB of each GPU':28}",
        *(f"{what:28}{size / GIB:9.2f}" for what, size in rows),
        "",
    ]


def verdict(
    needed: int, limit: int, advice: list[tuple[str, int]], *, divides: bool = False
) -> list[str]:
    """Whether it fits, and what to change unless it fits in a layout of several GPUs."""
    if needed <= limit:
        return [f"fits in {limit / GIB:g} GiB"]
    lines = [f"does not fit in {limit / GIB:g} GiB: needs {needed / GIB:.2f} GiB"]
    lines += [f"would fit with {flags}: {size / GIB:.2f} GiB" for flags, size in advice]
    return lines if advice or divides else [*lines, "ask for fewer frames or a smaller size"]


def layout_lines(divided: Mapping[str, Layout], gpus: int, limit: int) -> list[str]:
    """How to divide the GPUs, a line for each purpose."""
    if not divided:
        return ["", f"{_gpus(gpus)} of {limit / GIB:g} GiB: the request fits in no mesh of them"]
    lines = ["", f"{_gpus(gpus)} of {limit / GIB:g} GiB"]
    for purpose, layout in divided.items():
        count, ranks = layout.engine.data_parallel_size, layout.engine.parallel.world_size
        used = "" if layout.gpus == gpus else f"{layout.gpus} of {_gpus(gpus)}, "
        lines.append(
            f"{PURPOSES[purpose]:42} {count} replica{'s' if count > 1 else ''} of {_gpus(ranks)}: {layout.flags}"
            f" ({used}{layout.needed / GIB:.2f} GiB each)"
        )
    return lines


def layout_records(divided: Mapping[str, Layout]) -> dict[str, object]:
    """The same for programs."""
    return {
        purpose: {
            "replicas": layout.engine.data_parallel_size,
            "gpus": layout.gpus,
            "parallel": asdict(layout.engine.parallel),
            "flags": layout.flags,
            "needed": layout.needed,
        }
        for purpose, layout in divided.items()
    }


def _gpus(count: int) -> str:
    return f"{count} GPU{'s' if count > 1 else ''}"


def record(
    memory: MemoryEstimate,
    engine: EngineConfig,
    work: Work,
    limit: int,
    advice: list[tuple[str, int]],
) -> dict[str, object]:
    """The same for programs, in bytes."""
    return {
        "parallel": asdict(engine.parallel),
        "und_residency": engine.und_residency,
        "enable_layerwise_offload": engine.enable_layerwise_offload,
        "work": asdict(work),
        "weights": dict(memory.weights),
        "host": dict(memory.host),
        "loading": memory.loading,
        "held": memory.held,
        "phases": dict(memory.phases),
        "peak": memory.peak,
        "reserve": memory.reserve,
        "limit": limit,
        "fits": memory.needed <= limit,
        "would_fit_with": dict(advice),
    }
