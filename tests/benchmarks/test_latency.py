"""The latency benchmark on a tiny checkpoint, and the work it counts at the real size."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

import latency
from clock import StepClock, percentile, seconds
from floor import Rates, Work, decode_work, measure_rates, step_work, text_work, tokens
from kernel_profile import CATEGORIES, OTHER, by_category, category
from machine import commit, heading, provenance
from vllm_cosmos3.checkpoint.config import ModelConfig, read_config
from vllm_cosmos3.checkpoint.synthetic import write_checkpoint
from vllm_cosmos3.media import VideoWriter
from vllm_cosmos3.progress import Progress
from vllm_cosmos3.request.plan import Plan
from vllm_cosmos3.request.planner import make_plan
from vllm_cosmos3.request.prompts import load_tokenizer
from vllm_cosmos3.request.request import from_fields

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = tmp_path_factory.mktemp("nano") / "nano"
    write_checkpoint(folder, size="nano", weights=False)
    return read_config(folder)


def plan(model: ModelConfig, name: str) -> Plan:
    request = latency.request(latency.ROWS[name], [512, 512], 0)
    return make_plan(from_fields(request), model, load_tokenizer(model.path))


def run(checkpoint: Path, tmp_path: Path, *arguments: str) -> dict[str, Any]:
    file = tmp_path / "report.json"
    assert latency.main([str(checkpoint), "--json", str(file), *arguments]) == 0
    report: dict[str, Any] = json.loads(file.read_text())
    return report


def test_the_robot_waits_for_no_pixels(nano: ModelConfig) -> None:
    robot = plan(nano, "policy-droid")
    assert tokens(robot, 2)["vision"] == 9 * 17 * 20  # as many as 640x540 pixels make
    assert (tokens(robot, 2)["action"], robot.decoded, robot.actions.channels) == (33, False, 8)


def test_a_smooth_clip_is_written_within_the_total(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = []
    close = VideoWriter.close

    def closed(writer: VideoWriter) -> None:
        close(writer)
        files.append(next(Path(tempfile.gettempdir()).glob("*/clip.mp4")).stat().st_size)

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(VideoWriter, "close", closed)
    rows = ("--rows", "t2i-256p", "t2v-480p-4step", "--frames", "9", "--tokens", "20", "30")
    report = run(tiny_checkpoint, tmp_path, *rows, "--repeat", "1", "--mp4")
    assert len(files) == 2  # of the video's two runs
    assert files[0] == files[1]  # whose own frames differ
    assert [row["save"] for row in report["rows"]] == [None, None]


def test_rows_on_a_tiny_checkpoint(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["t2i-256p", "i2v-256p", "sound-256p"]
    report = run(
        tiny_checkpoint,
        tmp_path,
        *("--rows", *names, "--frames", "5", "--tokens", "20", "30", "--repeat", "1"),
        *("--measured-steps", "2", "--measured-rows", *names, "--save", "--profile"),
    )
    rows = report["rows"]
    assert [row["name"] for row in rows] == names
    assert [row["tokens"] for row in rows] == [
        {"vision": 60, "prompt": 20, "negative_prompt": 30},
        {"vision": 120, "prompt": 20, "negative_prompt": 30},
        {"vision": 120, "sound": 6, "prompt": 20, "negative_prompt": 30},
    ]
    for row in rows:
        assert (row["steps"], row["measured_steps"], len(row["runs"])) == (35, 2, 2)
        warm = row["warm"]
        assert warm["denoise"] >= 35 * 0.9 * min(row["step_p50"], warm["per_step"])
        parts = ("text", "vae_encode", "denoise", "vae_decode", "tail")
        assert sum(warm[name] for name in parts) == pytest.approx(warm["total"], rel=0.01)
        assert 0 < row["step_p50"] <= row["step_p99"]
        assert row["save"] > 0
        assert row["rate"] == pytest.approx(35 * row["step_flop"] / warm["denoise"])
    nothing, picture = (min(run["vae_encode"] for run in row["runs"]) for row in rows[:2])
    assert picture > nothing
    assert len(report["profiles"]) == 6
    assert all(each["categories"]["attention"][0] > 0 for each in report["profiles"])
    printed = capsys.readouterr().out
    assert "| t2i-256p | 60, 20, 30 | 35 (2 measured) | ~" in printed
    assert "t2i-256p, 10 steps and the decoder:" in printed


def test_a_request_of_its_own(tiny_checkpoint: Path, tmp_path: Path) -> None:
    report = run(tiny_checkpoint, tmp_path, "--size", "64x64", "--num-frames", "5", "--repeat", "0")
    (row,) = report["rows"]
    assert (row["name"], row["steps"], row["measured_steps"]) == ("custom", 8, None)
    assert row["warm"] == row["cold"]


def test_a_wrong_argument_is_one_sentence(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert latency.main([str(tiny_checkpoint), "--attention-backend", "magic"]) == 2
    assert capsys.readouterr().err.startswith("latency: attention_backend")


def test_runs_differ_in_the_prompt_alone() -> None:
    one, other = (latency.request(latency.ROWS["t2v-256p"], [9, 9], seed) for seed in (0, 1))
    assert one["prompt_token_ids"] != other["prompt_token_ids"]
    assert one["negative_prompt_token_ids"] == other["negative_prompt_token_ids"]


@pytest.mark.parametrize(
    ("row", "vision", "step_tflop", "decode_tflop"),
    [
        ("t2i-720p", 920, 2 * 13.6, 19.7),
        ("t2v-256p", 2880, 2 * 45.8, 198),
        ("t2v-480p", 18720, 2 * 472.5, 1287),
        ("t2v-720p", 44160, 2 * 1777.1, 2971),
    ],
)
def test_work_at_the_real_size(
    nano: ModelConfig, row: str, vision: int, step_tflop: float, decode_tflop: float
) -> None:
    """Against figures that were computed by hand, layer by layer."""
    wanted = plan(nano, row)
    counts = tokens(wanted, nano.transformer.latent_patch_size)
    assert counts == {"vision": vision, "prompt": 512, "negative_prompt": 512}
    step = step_work(nano.transformer, wanted)
    assert step.total / 1e12 == pytest.approx(step_tflop, rel=5e-3)
    assert step.weights == pytest.approx(2 * 6.95e9, rel=2e-3)  # once for both branches
    decode = decode_work(nano, wanted.streams[0].shape)
    assert decode.total / 1e12 == pytest.approx(decode_tflop, rel=5e-3)
    assert text_work(nano.transformer, wanted).total / 1e12 == pytest.approx(2 * 7.2, rel=0.02)


def test_work_of_edge(tmp_path: Path) -> None:
    """An MLP of two matrices, and what its checkpoints make by default."""
    write_checkpoint(tmp_path / "edge", size="edge", kind="edge", weights=False)
    model = read_config(tmp_path / "edge")
    fields = latency.request(latency.EDGE["edge-t2v-default"], [512, 512], 0)
    wanted = make_plan(from_fields(fields), model, load_tokenizer(model.path))
    assert tokens(wanted, model.transformer.latent_patch_size)["vision"] == 31 * 15 * 26
    assert (wanted.parameters.flow_shift, wanted.parameters.guidance_scale) == (3.0, 5.0)
    matrices = 2048 * (2 * 2048 + 2 * 1024 + 2 * 9216)
    assert step_work(model.transformer, wanted).weights == 2 * 28 * matrices


def test_a_floor_is_bound_by_the_slowest_resource() -> None:
    rates = Rates(product=100.0, attention=50.0, read=10.0)
    assert Work(product=200, attention=50, weights=5).floor(rates) == 3
    assert Work(product=200, attention=50, weights=500).floor(rates) == 51


def test_rates_are_of_this_device(nano: ModelConfig) -> None:
    rates = measure_rates(nano.transformer, CPU, torch.float32)
    assert min(rates.product, rates.attention, rates.read) > 1e6


def test_steps_are_the_time_between_callbacks(monkeypatch: pytest.MonkeyPatch) -> None:
    marks = iter([1.0, 1.5, 3.0])
    monkeypatch.setattr("clock.mark", lambda _: next(marks))
    clock = StepClock(CPU)
    for phase, step in (("encode", 0), ("denoise", 0), ("denoise", 1), ("denoise", 2)):
        clock(Progress(phase=phase, step=step, steps=2, elapsed=0, eta=None))
    assert clock.steps() == [0.5, 1.5]


def test_warm_calls_are_not_timed() -> None:
    calls: list[int] = []
    assert seconds(lambda: calls.append(1), CPU, repeat=3, warm=2) >= 0
    assert len(calls) == 5


@pytest.mark.parametrize(("percent", "value"), [(50, 2), (51, 3), (99, 4), (100, 4), (1, 1)])
def test_percentile(percent: float, value: float) -> None:
    assert percentile([4, 1, 3, 2], percent) == value


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90", "attention"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_nhwc", "convolutions"),
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_TNT", "products"),
        ("void vllm::fused_add_rms_norm_kernel<c10::BFloat16, 8>", "norms and rotation"),
        (
            "std::enable_if<vllm::_typeConvert<c10::BFloat16>::exists>::type fused_add_rms_norm",
            "norms and rotation",
        ),
        ("void vllm::act_and_mul_kernel<c10::BFloat16, silu>", "activations"),
        ("void at::native::CatArrayBatchedCopy<at::native::OpaqueType<2>>", "copies"),
        ("Memcpy DtoH (Device -> Pinned)", "copies"),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "collectives"),
        ("void at::native::vectorized_elementwise_kernel<4, AddFunctor>", OTHER),
    ],
)
def test_kernels_are_sorted_by_name(kernel: str, expected: str) -> None:
    assert category(kernel) == expected
    assert expected in {*CATEGORIES, OTHER}


def test_categories_are_sums() -> None:
    kernels = {"flash_a": (1.0, 2), "flash_b": (2.0, 3), "nvjet": (0.5, 1)}
    assert by_category(kernels) == {"attention": (3.0, 5), "products": (0.5, 1)}


def test_a_report_names_where_it_comes_from() -> None:
    facts = provenance(CPU)
    assert {"command", "commit", "torch", "vllm", "device", "date"} <= facts.keys()
    assert f"commit: {commit()}" in heading(facts)
