"""Shares of held-out prompts that clips confirm, by attribute, with 95 % intervals.

    python -m benchmarks.truth checkpoints/demo --count 768 --json truth.json

Each row is a way to make clips: fewer or more steps, guidance, a given first frame, and what may
change bits, such as the attention kernel, the dtype or weights that rest on the host. The clips are
read back by the demo world's checker, which sees pixels alone. The last column is how many seconds a
clip took.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.observing import confirm, observe
from training.pools import held_out
from training.rendering import true_clip
from training.scenes import Canvas
from training.shares import Share, confirmed_shares
from vllm_cosmos3 import Cosmos3

HELD_OUT = 50_000_000  # first seed
COLUMNS = ("colour", "motion", "gripper", "tone", "size", "shape", "all")
FEW = {"num_inference_steps": 16, "guidance_scale": 3.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way to make clips: fields of the request, and settings of the engine."""

    fields: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    given: bool = False


ROWS = {
    "few-steps": Row(fields=FEW),
    "defaults": Row(),
    "image": Row(fields=FEW, given=True),
    "no-guidance": Row(fields=FEW | {"guidance_scale": 1.0}),
    "sdpa": Row(fields=FEW, engine={"attention_backend": "sdpa"}),
    "float32": Row(fields=FEW, engine={"dtype": "float32"}),
    "on-host": Row(fields=FEW, engine={"und_residency": "host", "enable_layerwise_offload": True}),
}


def measured(checkpoint: str, device: str, row: Row, count: int) -> tuple[dict[str, Share], float]:
    """Shares by attribute, and seconds a clip."""
    canvas = Canvas()
    scenes, captions = held_out(HELD_OUT, count, canvas)
    results, spent = [], 0.0
    with Cosmos3(checkpoint, device=device, **row.engine) as model:
        for seed, (scene, caption) in enumerate(zip(scenes, captions, strict=True)):
            given = {"image": true_clip(scene, [0])[0].numpy()} if row.given else {}
            began = time.perf_counter()
            out = model.generate(
                prompt=caption.text, size="320x192", num_frames=canvas.frames,
                fps=scene.canvas.fps, seed=seed, generate_sound=False, **row.fields, **given,
            )  # fmt: skip
            spent += time.perf_counter() - began
            results.append(confirm(scene, caption, observe(out.video)))
    return confirmed_shares(results), spent / count


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("checkpoint")
    p.add_argument("--device", default="cuda")
    p.add_argument("--count", type=int, default=768, help="prompts in each row")
    p.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    p.add_argument("--json", type=Path, help="write the numbers there too")
    a = p.parse_args(argv)
    record: dict[str, Any] = {}
    print(f"| how | {' | '.join(COLUMNS)} | s |\n|{'---|' * (len(COLUMNS) + 2)}")
    for name in a.rows:
        shares, seconds = measured(a.checkpoint, a.device, ROWS[name], a.count)
        cells = [_cell(shares.get(column)) for column in COLUMNS]
        print(f"| {name} | {' | '.join(cells)} | {seconds:.2f} |", flush=True)
        numbers = {n: [s.right, s.asked, *s.interval] for n, s in shares.items()}
        record[name] = {"shares": numbers, "seconds": seconds}
    if a.json:
        a.json.write_text(json.dumps(record, indent=2) + "\n")


def _cell(share: Share | None) -> str:
    if share is None:
        return ""
    low, high = share.interval
    return f"{share.value:.3f} [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    main()
