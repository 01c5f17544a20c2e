"""``vllm-cosmos3 plan``: what it prints, and its status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_cosmos3.checkpoint.synthetic import write_checkpoint
from vllm_cosmos3.cli import main


def test_nano_without_a_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "nano"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "nano, bfloat16, on 1 GPU (cfg x ulysses x tp: 1 x 1 x 1)"
    assert lines[-1] == "fits in 80 GiB"
    needed = next(float(line.split()[-1]) for line in lines if line.startswith("needed"))
    assert 36 < needed < 42


def test_what_to_change_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "super", "--und-residency", "gpu", "--gpu-memory", "80"]) == 1
    said = capsys.readouterr().out
    assert "does not fit in 80 GiB" in said
    assert "would fit with --und-residency host:" in said
    assert main(["plan", "nano", "--gpu-memory", "1"]) == 1
    assert "ask for fewer frames or a smaller size" in capsys.readouterr().out


def test_json_of_a_checkpoint_on_a_mesh(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--device", "cpu", "--size", "320x192", "--num-frames", "24", "--json"]
    mesh = ["--ulysses-degree", "2", "--tensor-parallel-size", "2", "--cfg-parallel-size", "2"]
    assert main(["plan", str(tiny_checkpoint), *flags, *mesh, "--generate-sound"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["fits"]
    assert record["peak"] == max(
        record["loading"], sum(record["weights"].values()) + max(record["phases"].values())
    )
    assert record["phases"].keys() == {"text", "denoise", "decode", "sound"}
    assert [name for name, _ in record["work"]["streams"]] == ["vision", "sound"]


def test_layouts_of_several_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "nano", "--gpus", "8"]) == 0
    latency, throughput = capsys.readouterr().out.splitlines()[-2:]
    assert " 1 replica of 8 GPUs: --cfg-parallel-size 2 --ulysses-degree 4 (" in latency
    assert " 8 replicas of 1 GPU: --data-parallel-size 8 (" in throughput
    assert main(["plan", "super", "--gpus", "8", "--und-residency", "gpu", "--json"]) == 0
    divided = json.loads(capsys.readouterr().out)["layouts"]
    assert divided["latency"]["parallel"]["tensor_parallel_size"] > 1  # its weights are too large
    assert (divided["throughput"]["replicas"], divided["throughput"]["flags"]) == (
        4,
        "--data-parallel-size 4 --tensor-parallel-size 2",
    )
    assert all(layout["needed"] <= 80 * 2**30 for layout in divided.values())
    assert main(["plan", "nano", "--gpus", "4", "--gpu-memory", "1"]) == 1
    assert "4 GPUs of 1 GiB: the request fits in no mesh" in capsys.readouterr().out
    assert main(["plan", "nano", "--gpus", "0"]) == 2


def test_a_request_that_fits_in_a_layout_alone(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "super", "--gpus", "8", "--gpu-memory", "70", "--und-residency", "gpu"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "does not fit in 70 GiB" in said
    assert "would fit with --tensor-parallel-size 2:" in said
    assert "ask for fewer frames" not in said
    assert main([*words, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["fits"], bool(record["would_fit_with"])) == (False, True)


@pytest.mark.parametrize(
    ("kind", "flags", "refused"),
    [
        ("base", ["--history", "5"], "--history is 5, must be left out: "),
        ("base", ["--sessions", "3"], "--sessions is 3, must be left out: "),
        ("sim-bimanual", ["--num-frames", "5"], "--num-frames is 5, must be left out: "),
        ("sim-bimanual", ["--step-cache", "sea"], "--step-cache is 'sea', must be left out: "),
    ],
)
def test_flags_that_have_no_effect_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, flags: list[str], refused: str
) -> None:
    write_checkpoint(tmp_path / "tiny", kind=kind, weights=False)
    assert main(["plan", str(tmp_path / "tiny"), *flags]) == 2
    assert refused in capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "gpus", "latency", "throughput"),
    [
        ("nano", 3, (2, {"cfg_parallel_size": 2}), 3),
        ("nano", 7, (4, {"cfg_parallel_size": 2, "ulysses_degree": 2}), 7),
        ("nano", 4096, (4096, {"cfg_parallel_size": 2, "ulysses_degree": 8}), 256),
        ("super", 7, (4, {"cfg_parallel_size": 2, "tensor_parallel_size": 2}), 6),
    ],
)  # fmt: skip
def test_gpus_may_be_left_over(
    capsys: pytest.CaptureFixture[str],
    size: str,
    gpus: int,
    latency: tuple[int, dict[str, int]],
    throughput: int,
) -> None:
    words = ["plan", size, "--gpus", str(gpus), "--und-residency", "gpu"]
    main([*words, "--json"])
    divided = json.loads(capsys.readouterr().out)["layouts"]
    used, mesh = latency
    assert divided["latency"]["gpus"] == used
    assert divided["latency"]["parallel"].items() >= mesh.items()
    assert divided["throughput"]["gpus"] == throughput
    main(words)
    said = capsys.readouterr().out.splitlines()[-2:]
    for line, count in zip(said, (used, throughput), strict=True):
        assert (f"({count} of {gpus} GPUs, " in line) == (count < gpus)


def test_the_size_that_is_proposed_is_made_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    proposed = "must be multiples of 16, such as 1024x1024\n"
    for words in (["plan", "nano"], ["generate", "demo", "--prompt", "x", "--dry-run"]):
        assert main([*words, "--size", "3000x3000"]) == 2
        assert capsys.readouterr().err.endswith(proposed)
        assert main([*words, "--size", "1024x1024"]) == 0


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "nano", "--tensor-parallel-size", "3"]) == 2
    assert "--tensor-parallel-size is 3, must be 1, 2, 4 or 8" in capsys.readouterr().err
    assert main(["plan", "nano", "--size", "1280x721"]) == 2
    assert "size" in capsys.readouterr().err


def test_what_loading_refuses_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "tiny", kind="distilled-t2i", weights=False)
    assert main(["plan", str(tmp_path / "tiny"), "--cfg-parallel-size", "2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(
        "--cfg-parallel-size is 2, must be 1 (a distilled checkpoint has no guidance)"
    )


@pytest.mark.parametrize(
    ("flag", "value", "possible"),
    [
        *(("--gpu-memory", v, "above 0 up to 100000 GiB") for v in ("nan", "inf", "-1", "0")),
        *(("--text-tokens", v, "from 1 to 32768 tokens") for v in ("-5", "0", "32769")),
        ("--size", "99999984x16", "of sides up to 65536x65536"),
    ],
)
def test_numbers_have_limits(
    capsys: pytest.CaptureFixture[str], flag: str, value: str, possible: str
) -> None:
    assert main(["plan", "nano", flag, value]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f": {flag} is " in line
    assert line.endswith(possible)


def test_what_becomes_of_the_flags_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "nano", "--num-frames", "190", "--size", "320x192", "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == "warning: num_frames 190 is rounded up to 193 (4k+1)\n"
    assert json.loads(printed.out)["work"]["streams"][0][1][2] == 49
    assert main(["plan", "nano", "--num-frames", "193", "--size", "320x192"]) == 0
    assert capsys.readouterr().err == ""
