"""The memory benchmark on a tiny checkpoint: every placement gives the same bits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from limits import HANG

ROOT = Path(__file__).parents[2]


def test_placements_on_a_cpu(tiny_checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/memory.py", str(tiny_checkpoint), "--device", "cpu"]
    command += ["--load-format", "auto", "--requests", "64x64x1", "64x64x5+sound"]
    command += ["--tokens", "32", "--json", str(tmp_path / "report.json")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=HANG, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert len(rows) == 8
    assert [row["equal"] for row in rows] == [None] * 2 + [True] * 6
    assert "| text tower on the host | 64x64x1 |" in done.stdout
