"""A rank under torchrun: ``launched.py engine CHECKPOINT OUT`` or ``launched.py stuck / OUT``.

Each rank writes to OUT/RANK.json what it met, one line for each request: "served", or the error.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from test_executor import run, stage
from toy_stage import ToyPlan

from vllm_cosmos3 import Cosmos3
from vllm_cosmos3.media import Clip
from vllm_cosmos3.output import Progress
from vllm_cosmos3.runtime.executor import StageExecutor

RANK = int(os.environ["RANK"])
LAST = int(os.environ["WORLD_SIZE"]) - 1


def engine(checkpoint: Path, out: Path) -> list[str]:
    """Requests that fail on all ranks, on the first one, on the last one; each before a good one."""

    def generate(**fields: Any) -> Callable[[], object]:
        small = {
            "prompt": "a",
            "size": "64x48",
            "num_frames": 5,
            "num_inference_steps": 2,
            "seed": 1,
        }
        return lambda: model.generate(**small | fields)

    def stop(progress: Progress) -> None:
        if RANK == LAST and progress.step == 1:
            raise KeyError("enough")

    (out / "folder.mp4").mkdir(exist_ok=True)
    missing = Path("/nowhere.png") if RANK == LAST else out / "there.png"
    with Cosmos3(
        checkpoint,
        dtype="float32",
        ulysses_degree=2,
        memory_limit=0.05,
        distributed_executor_backend="external_launcher",
    ) as model:
        return heard(
            generate(size="640x480", num_frames=61),
            generate(),
            generate(clip=Clip(path=out / "folder.mp4")),
            generate(),
            generate(progress=stop),
            generate(),
            generate(image=missing),
            generate(),
        )


def stuck(_: Path, out: Path) -> list[str]:
    """The last rank fails before an exchange, in which the first one then waits for ever."""
    executor = StageExecutor(stage(1, 2, 1, backend="external_launcher"))
    executor.start()
    return heard(
        lambda: run(executor, ToyPlan()),
        lambda: run(executor, ToyPlan(faults={"step 1": "all"})),
        lambda: run(executor, ToyPlan()),
        lambda: run(executor, ToyPlan(faults={"step 1": "one"})),
        lambda: run(executor, ToyPlan()),
    )


def heard(*requests: Callable[[], object]) -> list[str]:
    lines = []
    for request in requests:
        try:
            request()
            lines.append("served")
        except Exception as error:  # noqa: BLE001 - the test looks at it
            lines.append(f"{type(error).__name__}: {error}")
    return lines


if __name__ == "__main__":
    name, checkpoint, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    lines = {"engine": engine, "stuck": stuck}[name](checkpoint, out)
    (out / f"{RANK}.json").write_text(json.dumps(lines))
