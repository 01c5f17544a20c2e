"""The comparison with diffusers: both do the same work, and its sums are right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import compare
from clock import Mark
from vllm_cosmos3.parallel.graphs import Recording


def run(checkpoint: Path, tmp_path: Path, *arguments: str) -> dict[str, Any]:
    file = tmp_path / "compare.json"
    command = [str(checkpoint), "--device", "cpu", "--dtype", "float32", "--json", str(file)]
    command += ["--tokens", "30", "20", "--rounds", "1", "--warm", "0"]
    assert compare.main([*command, *arguments]) == 0
    report: dict[str, Any] = json.loads(file.read_text())
    return report


def test_both_do_the_same_work(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run(
        tiny_checkpoint, tmp_path, "--rows", "t2i-256p", "t2v-256p", "--frames", "5", "--steps", "4"
    )
    assert len(report["pairings"]) == 2 * len(compare.PAIRINGS)
    for each in report["pairings"]:
        assert each["relative_difference"] < 1e-4, each["pairing"]
        assert each["ours"]["evaluations"] == each["diffusers"]["evaluations"] == 8
        assert each["ratio"] == each["diffusers"]["total"] / each["ours"]["total"]
    runs = {(each["row"], each["contender"]): each["runs"] for each in report["contenders"]}
    assert len(runs["t2i-256p", "diffusers"]) == 2  # beside each of our two
    assert len(runs["t2i-256p", "ours"]) == 1
    assert report["decode"].keys() == {"t2i-256p", "t2v-256p"}
    assert "| t2v-256p | our attention in both |" in capsys.readouterr().out


def test_steps_that_were_not_made_are_marked(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run(tiny_checkpoint, tmp_path, "--rows", "t2i-256p", "--measured-steps", "2")
    for each in report["pairings"]:
        assert (each["made_steps"], each["steps"]) == (3, 35)
        assert each["ours"]["evaluations"] == 6
        assert each["ours"]["total"] > 32 * each["ours"]["step"]
    assert "| t2i-256p | as they come | ~" in capsys.readouterr().out


def test_a_run_is_extrapolated_by_its_median_step() -> None:
    case = compare.Case(name="row", row={}, tokens=(1, 1), steps=10, made=4)
    marks: list[Mark] = [0.0, 1.0, 3.0, 8.0]
    done = compare.finished(case, 9.0, marks, 8, torch.zeros(1))
    assert done.steps == [1.0, 2.0, 5.0]
    assert done.total == 9 + 6 * 2


def test_replayed_recordings_are_counted() -> None:
    """A recording that calls the module, one that does not, and a call of the module itself."""
    module = torch.nn.Identity()
    branches = (torch.zeros(1), torch.zeros(1))
    with compare.counted(module) as calls:
        Recording(lambda *_: module(branches))()
        Recording(lambda *_: branches)()
        module(branches[:1])
    assert calls == [2, 2, 1]


def test_a_missing_checkpoint_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main([str(tmp_path), "--device", "cpu"]) == 2
    assert capsys.readouterr().err.startswith("compare: ")
