"""Ranks under torchrun: each learns from its own data, and all end with the same weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys, torch
from pathlib import Path
from training import ranks
from training.optimisation import Kind, Plan, train
ranks.join()
weight = torch.nn.Parameter(torch.full((3,), 5.0 + ranks.rank()))
wanted = 2.0 * ranks.rank()
plan = Plan(seconds=600, steps=300, rate=0.1, warmup=10, decay=0.0, ema=0.9, every=100)
train([("weight", weight)], [Kind(lambda: (weight - wanted).square().sum())], plan)
torch.save(weight.detach(), f"{sys.argv[1]}/{ranks.rank()}.pt")
ranks.leave()
threads = [file.read_text() for file in Path("/proc/self/task").glob("*/comm")]
assert not [name for name in threads if "gloo" in name]
"""


def test_two_ranks_learn_from_both_halves_of_the_data(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(SCRIPT)
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    done = subprocess.run(
        [*torchrun, str(tmp_path / "job.py"), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, torch.full((3,), 1.0), atol=0.3, rtol=0)  # of 0 and 2
