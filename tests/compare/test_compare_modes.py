"""The yardstick on a tiny random checkpoint: its numbers, its table and its page."""

from __future__ import annotations

import json
import re
from math import inf
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.models import alexnet

from vllm_cosmos3.cli import main
from vllm_cosmos3.compare.likeness import Likeness, likeness, lpips_weights
from vllm_cosmos3.compare.measuring import Measured
from vllm_cosmos3.compare.modes import read_modes
from vllm_cosmos3.compare.page import rows
from vllm_cosmos3.errors import InvalidRequest

SMALL = ["--size", "64x64", "--num-frames", "5", "--num-inference-steps", "7", "--dtype", "float32"]


def bright(prompt: str, clip: np.ndarray) -> bool:
    """A judge: of the two prompts one is found shown."""
    assert clip.dtype == np.uint8
    assert clip.shape == (5, 64, 64, 3)
    return prompt.startswith("a boat")


def test_modes_are_compared_with_the_exact_one(
    tiny_checkpoint_fp32: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # without LPIPS
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a boat\n\na <house> & a tree\n")
    out = tmp_path / "page"
    arguments = [str(tiny_checkpoint_fp32), "--prompts", str(prompts), "--out", str(out), *SMALL]
    arguments += ["--modes", "fp8", "sea", "fp8+sea", "--step-cache-threshold", "2"]
    arguments += ["--device", "cpu", "--judge", f"{__name__}:bright"]
    assert main(["compare", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:6]]
    assert [row[0] for row in cells] == ["exact", "fp8", "sea", "fp8+sea"]
    assert [row[3] for row in cells] == ["7.0", "7.0", "3.0", "3.0"]  # steps computed
    assert cells[0][4:9] == ["equal", "1.0000", "", "0.00e+00", "0.00e+00"]
    assert all(row[10] == "1 of 2" for row in cells)
    found = json.loads((out / "compare.json").read_text(), parse_constant=pytest.fail)
    assert len(found) == 8
    assert {each["psnr"] is None for each in found if each["mode"] == "exact"} == {True}
    errors = {(each["mode"], each["prompt"]): each["errors"] for each in found}
    for (mode, _), by_step in errors.items():
        assert len(by_step) == 7
        if mode == "sea":  # the first step is computed
            assert by_step[0] == 0
        if mode != "exact":
            assert 0 < by_step[-1] < 2
            assert 0 < next(e["psnr"] for e in found if e["mode"] == mode) < 100
    html = (out / "index.html").read_text()
    files = re.findall(r'<video src="([^"]+)"', html)
    assert len(files) == 8
    assert all((out / file).stat().st_size for file in files)
    assert "a &lt;house&gt; &amp; a tree" in html
    made = {"index.html", "compare.json", *files}
    assert {path.name for path in out.iterdir()} == made


def test_one_equal_clip_does_not_make_a_mode_equal() -> None:
    def measured(mode: str, psnr: float) -> Measured:
        return Measured(
            mode=mode, prompt="a boat", file=Path("a.mp4"), seconds=1.0, reused=0, steps=4, peak=0,
            psnr=psnr, ssim=1.0, lpips=None, errors=(0.0,), shown=None,
        )  # fmt: skip

    exact = measured("exact", inf)
    sea = [measured("sea", psnr) for psnr in (inf, 30.0, 40.0)]
    assert [row.cells[4] for row in rows([exact, *sea])] == ["equal", "35.0"]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["tea"], "modes is 'tea', must be exact, or joined by"),
        (["exact+sea"], "modes is 'exact\\+sea'"),
        (["fp8+fp8-native"], "must be with one kind of fp8"),
    ],
)
def test_modes_that_are_none(names: list[str], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        read_modes(names)


def test_the_exact_mode_comes_first_and_once() -> None:
    assert [mode.name for mode in read_modes(["sea", "exact", "sea"])] == ["exact", "sea"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompts", "missing.txt"], "--prompts is 'missing.txt', must be a text file"),
        (["--prompts", "empty.txt"], "at least one prompt"),
        (["--prompts", "one.txt", "--judge", "nowhere:judge"], "--judge is 'nowhere:judge'"),
        (["--prompts", "one.txt", "--modes", "slow"], "--modes is 'slow'"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n \n")
    Path("one.txt").write_text("a boat\n")
    assert main(["compare", "demo", "--out", "page", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_an_fp8_checkpoint_has_no_exact_mode(
    tiny_checkpoint_fp8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one.txt").write_text("a boat\n")
    arguments = ["--prompts", str(tmp_path / "one.txt"), "--out", str(tmp_path / "page"), *SMALL]
    assert main(["compare", str(tiny_checkpoint_fp8), *arguments, "--device", "cpu"]) == 2
    assert "this checkpoint holds FP8 weights" in capsys.readouterr().err


def test_lpips_where_its_weights_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On AlexNet of random weights, which tells frames apart as well, if not as people do."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    clip = np.random.default_rng(0).integers(0, 256, (2, 64, 96, 3), dtype=np.uint8)
    near, far = (np.where(clip < 256 - by, clip + by, clip).astype(np.uint8) for by in (2, 40))
    assert likeness()(near, clip).lpips is None
    lpips_weights().parent.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(alexnet(weights=None).state_dict(), lpips_weights())
    alike = likeness()
    assert alike(clip, clip) == Likeness(psnr=float("inf"), ssim=1.0, lpips=0.0)
    one, other = (alike(each, clip).lpips for each in (near, far))
    assert one is not None
    assert other is not None
    assert 0 < one < other
