"""The memory benchmark on a tiny checkpoint: every placement gives the same bits."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from servers import run_to_end

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "memory.py"


def test_placements_on_a_cpu(tiny_checkpoint: Path, tmp_path: Path, vllm_cache: Path) -> None:
    command = [sys.executable, BENCHMARK, tiny_checkpoint, "--device", "cpu"]
    command += ["--load-format", "auto", "--requests", "64x64x1", "64x64x5+sound"]
    command += ["--tokens", "32", "--json", tmp_path / "report.json"]
    status, said = run_to_end(command, vllm_cache)
    assert status == 0, said[-2000:]
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert len(rows) == 8
    assert [row["equal"] for row in rows] == [None] * 2 + [True] * 6
    assert "| text tower on the host | 64x64x1 |" in said
