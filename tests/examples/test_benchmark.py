"""The benchmark measures what it says: its media, its sums, its refusals, and one run for real."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from limits import HANG
from PIL import Image
from servers import Server

from clips import ClipShape, clip, picture
from load import RequestFailed, Timing, summary

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "reasoner.py"
SMALL = ClipShape(width=64, height=48, seconds=2, fps=4)


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=False)


def frames(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data)) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        assert container.streams.video[0].average_rate == 4
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def test_clips_have_the_asked_shape_move_and_differ() -> None:
    one, other = frames(clip(SMALL, 1)), frames(clip(SMALL, 2))
    assert one.shape == (8, 48, 64, 3)
    assert np.abs(one[0].astype(int) - one[-1]).max() > 20
    assert np.abs(one.astype(int) - other).mean() > 10


def test_the_same_number_gives_the_same_media() -> None:
    assert clip(SMALL, 3) == clip(SMALL, 3)
    assert picture(SMALL, 3) == picture(SMALL, 3) != picture(SMALL, 4)
    assert Image.open(io.BytesIO(picture(SMALL, 3))).size == (64, 48)


def test_summary_counts_successes_over_the_whole_time() -> None:
    done = [Timing(0.1, 0.1 + 0.01 * n, 60, 1 + n) for n in range(1, 101)]
    row = summary([*done, RequestFailed("HTTP 400"), RequestFailed("HTTP 400")], 10.0)
    assert row["requests"] == 102
    assert row["errors"] == 2
    assert row["error_messages"] == ["2 x HTTP 400"]
    assert row["requests_per_second"] == 10
    assert row["output_tokens_per_second"] == sum(range(2, 102)) / 10
    assert row["ttft_ms"] == {"mean": 100, "p50": 100, "p90": 100, "p99": 100}
    assert row["itl_ms"]["mean"] == pytest.approx(10)
    assert row["latency_ms"]["p50"] == pytest.approx(605)
    assert row["prompt_tokens"] == 60


def test_one_token_has_no_gap() -> None:
    assert summary([Timing(0.1, 0.1, 60, 1)], 1.0)["itl_ms"] == {}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--url", "http://192.0.2.1:8000"], "is not this machine"),
        (["--url", "http://example.invalid"], "is not this machine"),
        ([], "one of the arguments --url --serve is required"),
        (["--url", "http://127.0.0.1:9"], "does not answer like a vLLM server"),
        (["--url", "http://127.0.0.1:9", "--", "--enforce-eager"], "are for --serve"),
    ],
)
def test_refusals(arguments: list[str], expected: str) -> None:
    done = bench(*arguments)
    assert done.returncode != 0
    assert expected in done.stderr


@pytest.mark.serve
@pytest.mark.parametrize("media", [[], ["--image"], ["--mixed"]])
def test_a_run(media: list[str], reasoner_server: Server, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = bench(
        *("--url", reasoner_server.url, "--quick", "--seconds", "1", "--requests", "6"),
        *("--concurrency", "3", "--output-tokens", "1", "8", "--json", str(report), *media),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(report.read_text())["rows"]
    assert [row["case"]["output_tokens"] for row in rows] == [1, 8]
    for row in rows:
        assert (row["requests"], row["errors"]) == (6, 0)
        assert row["output_tokens"] == row["case"]["output_tokens"]
        assert row["ttft_ms"]["p50"] <= row["latency_ms"]["p50"]
        assert 50 <= row["prompt_tokens"] <= 300
    assert str(tmp_path) not in report.read_text()
