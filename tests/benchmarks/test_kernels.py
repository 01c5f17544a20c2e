"""The kernel benchmark on a CPU: every kernel that is there is timed, and computes the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import kernels
from vllm_cosmos3.parallel.attention import make_attend

CPU = torch.device("cpu")


def test_a_run(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "kernels.json"
    arguments = ["--device", "cpu", "--rows", "t2i-256p", "--json", str(file)]
    assert kernels.main([str(tiny_checkpoint), *arguments]) == 0
    figures = json.loads(file.read_text())["figures"]
    assert {figure["kind"] for figure in figures} == set(kernels.KINDS)
    for figure in figures:
        assert (figure["seconds"] is None) == bool(figure["obstacle"])
        assert figure["seconds"] is None or figure["seconds"] > 0
    timed = {figure["kernel"] for figure in figures if figure["seconds"]}
    assert {"the package's choice", "sdpa default", "add and norm", "SiLU and multiply"} <= timed
    assert len({name for name in timed if " to " in name}) == 4
    (cudnn,) = (figure for figure in figures if figure["kernel"] == "sdpa cudnn")
    assert "backend" in cudnn["obstacle"]
    assert "| t2i-256p: 60 x 572 | sdpa default |" in capsys.readouterr().out


def test_a_missing_checkpoint_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kernels.main([str(tmp_path), "--device", "cpu"]) == 2
    assert capsys.readouterr().err.startswith("kernels: ")


@pytest.mark.parametrize("repeated", [0, 1])
def test_repeated_keys_give_the_same(repeated: int) -> None:
    q, k, v = torch.randn(5, 8, 16), torch.randn(9, 2, 16), torch.randn(9, 2, 16)
    expected = make_attend(device=CPU, dtype=torch.float32, head_dim=16)(q, k, v, causal=False)
    actual = kernels.sdpa(None, bool(repeated), q, k, v).squeeze(0).movedim(0, 1)
    assert (actual - expected).abs().max() < 1e-5


def test_plain_passes_compute_what_vllm_does(tiny_checkpoint: Path) -> None:
    """Both members of each pair are measured as if they did the same."""
    from vllm_cosmos3.checkpoint.config import read_config

    config = read_config(tiny_checkpoint).transformer
    with torch.inference_mode():
        passes = list(kernels.passes(config, 7, CPU, torch.float32))
        calls = {name: call for name, call, _ in passes}
        work = {name: count for name, _, count in passes}
        name = "join text's keys and values"  # read and written once
        assert work[name] == 2 * calls[name]().numel()  # type: ignore[attr-defined]
        assert calls["SiLU and multiply"]().shape == (7, config.intermediate_size)  # type: ignore[attr-defined]
        torch.testing.assert_close(
            calls["SiLU and multiply"](), calls["SiLU and multiply, torch"]()
        )
        plain = calls["add and norm, torch"]()  # first: vLLM's writes over its arguments
        torch.testing.assert_close(calls["add and norm"](), plain)
