"""The benchmarks of sleep and of sessions on tiny checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import sessions
import sleep
from vllm_cosmos3.checkpoint.synthetic import write_checkpoint

ON_CPU = ("--device", "cpu", "--dtype", "float32")


def test_rounds_of_sleep(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, few = tmp_path / "sleep.json", '{"num_inference_steps": 2, "size": "64x64"}'
    arguments = ["--row", "t2i-256p", "--fields", few, "--rounds", "2", "--json", str(file)]
    assert sleep.main([str(tiny_checkpoint), *ON_CPU, *arguments]) == 0
    report = json.loads(file.read_text())
    assert [each["equal"] for each in report["rounds"]] == [True, True]
    assert (report["request"]["size"], report["request"]["num_inference_steps"]) == ("64x64", 2)
    assert all(min(each["sleep_s"], each["first_s"]) > 0 for each in report["rounds"])
    assert "| 2 | " in capsys.readouterr().out


def test_sessions_of_a_simulator(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = tmp_path / "sim", tmp_path / "sessions.json"
    write_checkpoint(folder, kind="sim-bimanual-camera", dtype="float32")
    arguments = ["--size", "64x64", "--steps", "2", "--history", "6", "--json", str(file)]
    assert sessions.main([str(folder), *ON_CPU, *arguments]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["session"] for row in rows] == [
        "first of the process",
        "generated frame",
        "picture",
    ]
    for row in rows:
        assert (row["chunk"], row["frames"], row["history"]) == (4, 16, 6)
        assert row["frames_per_second"] == pytest.approx(16 * len(row["steps"]) / sum(row["steps"]))
        phases = ("commit", "denoise", "vae_decode")
        assert sum(row["phases"][name] for name in phases) > 0
        assert row["planned"] > 0
    assert len(rows[1]["steps"]) == 2
    assert "| sim | picture | 4 (16 frames) | " in capsys.readouterr().out
