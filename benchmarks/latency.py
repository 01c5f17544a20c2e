"""How long one request takes, phase by phase: ``python benchmarks/latency.py CKPT --json out.json``.

Runs the request once to warm up and then ``--repeat`` times, prints the median of every phase and
writes all runs. The default is small enough for a CPU. FLOPs are those of the transformer, two for
each multiply-add.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from pathlib import Path

from vllm_cosmos3.config import ModelConfig, TransformerConfig, read_config
from vllm_cosmos3.engine import Cosmos3
from vllm_cosmos3.errors import Cosmos3Error
from vllm_cosmos3.hub import resolve
from vllm_cosmos3.plan import Plan
from vllm_cosmos3.version import __version__


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    fields = {
        "prompt": "A paper boat floats down a stream",
        "size": args.size,
        "num_frames": args.num_frames,
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
        "generate_sound": args.sound,
        "seed": 0,
        "allow_untrained_size": True,
    }
    try:
        config = read_config(resolve(args.model, weights=False))
        with Cosmos3(
            args.model, dtype=args.dtype, device=args.device, load_format=args.load_format
        ) as model:
            plan = model.plan(fields)
            outputs = [model.generate(fields) for _ in range(args.repeat + 1)][1:]
            device = str(model.device)
    except Cosmos3Error as error:
        print(f"latency: {error}", file=sys.stderr)
        return 2
    runs = [dict(output.timings) for output in outputs]
    counts = tokens(plan, config.transformer.latent_patch_size)
    work = flops(config, plan)
    report = {
        "version": __version__,
        "model": str(args.model),
        "device": device,
        "machine": platform.processor() or platform.machine(),
        "dtype": args.dtype,
        "request": fields,
        "tokens": counts,
        "flops": work,
        "median_seconds": {name: statistics.median(r[name] for r in runs) for name in runs[0]},
        "runs": runs,
        "peak_memory_bytes": max(output.peak_memory for output in outputs),
    }
    print(table(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def tokens(plan: Plan, patch: int) -> dict[str, int]:
    """Tokens of the generation sequence by stream, and of each text."""
    counts = {}
    for stream in plan.streams:
        plane = 1
        if stream.name == "vision":
            plane = -(-stream.shape[3] // patch) * -(-stream.shape[4] // patch)
        counts[stream.name] = stream.length * plane
    texts = dict(zip(("prompt", "negative_prompt"), map(len, plan.token_ids), strict=False))
    return counts | texts


def flops(model: ModelConfig, plan: Plan) -> dict[str, int]:
    """Of the whole request: both texts once, all steps of all branches. Heads excluded."""
    config = model.transformer
    counts = tokens(plan, config.latent_patch_size)
    generated = sum(counts[stream.name] for stream in plan.streams)
    text = sum(
        layers_flops(config, len(ids), attended=(len(ids) + 1) / 2) for ids in plan.token_ids
    )
    step = sum(
        layers_flops(config, generated, attended=generated + len(ids)) for ids in plan.token_ids
    )
    return {"text": text, "per_step": step, "denoise": step * plan.steps}


def layers_flops(config: TransformerConfig, length: int, attended: float) -> int:
    """One tower on ``length`` tokens of which each attends to ``attended`` on average."""
    query = config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    matrices = config.hidden_size * (2 * query + 2 * key + 3 * config.intermediate_size)
    return round(config.num_hidden_layers * length * (2 * matrices + 4 * attended * query))


def table(report: dict) -> str:
    """What a person reads."""
    request, counts, work = report["request"], report["tokens"], report["flops"]
    seconds = report["median_seconds"]
    lines = [
        f"{report['model']} on {report['device']}, {report['dtype']}",
        f"{request['size']}, {request['num_frames']} frames,"
        f" {request['num_inference_steps']} steps, guidance {request['guidance_scale']:g}",
        "tokens: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()),
        "",
        *(f"{name:>12} {value:10.3f} s" for name, value in seconds.items()),
        "",
        f"{'per step':>12} {work['per_step'] / 1e12:10.4f} TFLOP"
        f" = {work['denoise'] / 1e12 / seconds['denoise']:.3f} TFLOP/s while denoising",
        f"{'peak memory':>12} {report['peak_memory_bytes'] / 2**30:10.3f} GiB",
    ]
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", help="checkpoint folder or repository")
    parser.add_argument("--size", default="320x192")
    parser.add_argument("--num-frames", type=int, default=25)
    parser.add_argument("--num-inference-steps", type=int, default=8)
    parser.add_argument("--guidance-scale", type=float, default=6.0)
    parser.add_argument("--sound", action="store_true")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--repeat", type=int, default=3, help="runs after the first")
    parser.add_argument("--json", type=Path, help="write the report here")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
