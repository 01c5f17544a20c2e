"""The generator on several meshes of one machine: seconds per step and per decode, and equality.

    python benchmarks/scaling.py CHECKPOINT --devices 4 --sizes 320x192 1280x720 --json scaling.json
    python benchmarks/scaling.py --whole CHECKPOINT --devices 4     # whole requests: whole_requests.py

Every mesh denoises the same noise with the same token ids, so the latents after ``--steps`` steps
must agree with those of one device up to rounding; the largest difference is a column of the table.
The checkpoint may hold no weights (``make-checkpoint --size nano --no-weights``): they are random.
Meshes are written cfg x ulysses x tp. One group of processes serves all meshes of its size.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as processes

import whole_requests
from clock import now
from meshes import device_of, on_mesh, ranks
from vllm_cosmos3.generator.pipeline import Pipeline
from vllm_cosmos3.request.planner import make_plan
from vllm_cosmos3.request.request import GenerateRequest

MESHES = {
    1: ["1x1x1"],
    2: ["2x1x1", "1x2x1", "1x1x2"],
    4: ["2x2x1", "1x4x1", "1x1x4", "2x1x2", "1x2x2"],
    8: ["2x4x1", "1x8x1", "1x1x8", "2x2x2"],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one mesh did with one size. Seconds; bytes."""

    mesh: str
    size: str
    frames: int
    text_s: float
    step_s: float
    decode_s: float
    peak_bytes: int
    relative_difference: float | None  # of the latents, from those of one device


def main() -> None:
    if "--whole" in sys.argv[1:]:
        sys.exit(whole_requests.main([word for word in sys.argv[1:] if word != "--whole"]))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--devices", type=int, default=2, choices=sorted(MESHES))
    parser.add_argument("--meshes", nargs="+", help="cfg x ulysses x tp, such as 2x2x1")
    parser.add_argument("--sizes", nargs="+", default=["320x192"])
    parser.add_argument("--frames", type=int, default=189)
    parser.add_argument("--steps", type=int, default=4, help="the first one is not timed")
    parser.add_argument("--tokens", type=int, default=512, help="of the prompt and of the negative")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--load-format", default="dummy", choices=["dummy", "auto"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    meshes = args.meshes or [m for n in MESHES if n <= args.devices for m in MESHES[n]]
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        for world in sorted({ranks(mesh) for mesh in meshes}):
            mine = [mesh for mesh in meshes if ranks(mesh) == world]
            processes.spawn(serve, (world, mine, args), nprocs=world)
        rows = json.loads((args.folder / "rows.json").read_text())
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


def serve(rank: int, world: int, meshes: list[str], args: argparse.Namespace) -> None:
    """One rank of all meshes of one size; rank 0 appends to the rows on disk."""
    device = device_of(args.device, rank)

    def rows(mesh: str, pipeline: Pipeline) -> None:
        for size in args.sizes:
            row = measure(pipeline, mesh, size, args)
            if rank == 0:
                append(row, args.folder / "rows.json")

    for mesh in meshes:
        on_mesh(
            mesh,
            rank,
            device,
            args.folder / f"{world}-{mesh}",
            partial(rows, mesh),
            model=args.checkpoint,
            dtype=args.dtype,
            load_format=args.load_format,
        )


def measure(pipeline: Pipeline, mesh: str, size: str, args: argparse.Namespace) -> Row:
    """Encode, ``--steps`` steps and a decode. The decode is done twice and timed the second time."""
    device = pipeline.device
    request = GenerateRequest(
        prompt_token_ids=list(range(10, 10 + args.tokens)),
        negative_prompt_token_ids=list(range(20, 20 + args.tokens)),
        size=size,
        num_frames=args.frames,
        num_inference_steps=args.steps,
        seed=0,
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = now(device)
    state = pipeline.encode(make_plan(request, pipeline.model, pipeline.tokenizer))
    text = now(device) - start
    steps = []
    while not state.done:
        start = now(device)
        pipeline.step(state)
        steps.append(now(device) - start)
    latents = state.denoised[0]["vision"]
    seconds = []
    for _ in range(2):
        start = now(device)
        for _chunk in pipeline.vae.decode(latents):
            pass
        seconds.append(now(device) - start)
    return Row(
        mesh=mesh,
        size=size,
        frames=args.frames,
        text_s=text,
        step_s=statistics.median(steps[1:]),
        decode_s=seconds[1],
        peak_bytes=torch.cuda.max_memory_allocated() if device.type == "cuda" else 0,
        relative_difference=difference(latents, args.folder / f"{size}.pt", mesh),
    )


def difference(latents: torch.Tensor, path: Path, mesh: str) -> float | None:
    """From the latents of one device, which are kept for the other meshes."""
    if mesh == "1x1x1":
        torch.save(latents.cpu(), path)
    if not path.exists():
        return None
    reference = torch.load(path).to(latents.device)
    return float((latents - reference).norm() / reference.norm())


def append(row: Row, path: Path) -> None:
    rows = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps([*rows, asdict(row)]))
    print(table([asdict(row)]).splitlines()[-1], flush=True)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown. Speed-up is of the step, over the one-device row of the same size."""
    alone = {row["size"]: row["step_s"] for row in rows if row["mesh"] == "1x1x1"}
    lines = [
        "| mesh (cfg x ulysses x tp) | size | step s | speed-up | decode s | peak GiB | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        gain = f"{alone[row['size']] / row['step_s']:.2f}" if row["size"] in alone else ""
        apart = row["relative_difference"]
        lines.append(
            f"| {row['mesh']} | {row['size']} | {row['step_s']:.3f} | {gain} "
            f"| {row['decode_s']:.2f} | {row['peak_bytes'] / 2**30:.1f} "
            f"| {'' if apart is None else f'{apart:.1e}'} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
