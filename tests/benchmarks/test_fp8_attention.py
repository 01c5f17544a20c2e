"""The benchmark of FP8 attention on a CPU, where its only kernel is arithmetic with FP8 values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from limits import HANG

import attention
from vllm_cosmos3.parallel.attention import make_attend

CPU = torch.device("cpu")
PLAIN = "FP8 values in float32"


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "attention.json"
    assert attention.main(["--device", "cpu", "--shapes", "8x64", "--json", str(file)]) == 0
    figures = json.loads(file.read_text())["figures"]
    assert [figure["kernel"] for figure in figures] == list(attention.KERNELS)
    errors = {figure["kernel"]: figure["errors"] for figure in figures}
    assert all(figure["obstacle"] for figure in figures if not figure["errors"])
    assert set(errors[PLAIN]) == set(attention.CASES)
    assert errors[PLAIN]["means, K smoothed"] < 0.7 * errors[PLAIN]["means"]
    assert 0.01 < errors[PLAIN]["means, K and V smoothed"] < 0.1
    assert f"| 8x64 | {PLAIN} |" in capsys.readouterr().out


def test_a_process_for_each_kernel() -> None:
    """One that cannot start costs its own row."""
    names, shapes = ["cuDNN", PLAIN], ["8x64", "8x128"]
    figures = list(attention.measured_apart(names, shapes, CPU, HANG))
    assert {(figure.kernel, figure.shape) for figure in figures} == {
        (name, shape) for name in names for shape in shapes
    }
    for figure in figures:
        assert bool(figure.errors) == (figure.kernel == PLAIN) == (not figure.obstacle)


def test_the_reference_is_attention() -> None:
    q, k, v = attention.drawn("means", 5, 9, CPU)
    attend = make_attend(device=CPU, dtype=torch.float32, head_dim=attention.HEAD)
    expected = attend(q.float(), k.float(), v.float(), causal=False)
    torch.testing.assert_close(attention.exact(q, k, v), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("smooth", [False, True])
def test_scales_undo_themselves(smooth: bool) -> None:
    """Half a step of E4M3's three bits is a sixteenth, and of its smallest numbers a thousandth."""
    q, k, v = attention.drawn("means", 16, 32, CPU)
    means = attention.Means.of(k, v, keys=smooth, values=smooth)
    x = attention.per_head(q, k, v, means)
    for original, mean, fp8, scale in (
        (q, None, x.q, x.q_scale.repeat_interleave(attention.GROUP)),
        (k, means.k, x.k, x.k_scale),
        (v, means.v, x.v, x.v_scale),
    ):
        expected = original.float() if mean is None else original.float() - mean
        actual = fp8.float() * scale[:, None]
        step = scale[:, None] * 2**-10
        assert ((actual - expected).abs() <= expected.abs() / 16 + step).all()
        assert fp8.float().abs().amax() == attention.LARGEST
