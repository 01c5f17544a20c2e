"""The comparison of front ends: its loads, its servers, and the sums that it makes of timers."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE

import pytest

from front_ends import Row, cpu_seconds, parse_row, server_kinds, stages_of


def test_rows_are_five_numbers() -> None:
    row = Row(fps=0.5, output_tokens=100, concurrency=64, requests=256, warmup=32, again=False)
    assert parse_row("0.5:100:64:256:32") == row
    assert parse_row("0.5:100:64:256:32:again") == replace(row, again=True)
    with pytest.raises(ValueError, match="not enough values"):
        parse_row("1:1")


def test_servers_come_in_the_order_asked_and_ours_with_more_flags() -> None:
    also = ["graphs=A=1 --compilation-config '{\"cudagraph_mm_encoder\":true}'"]
    kinds = server_kinds(Namespace(servers=["upstream-4", "reference", "ours"], also=also))
    assert list(kinds) == ["upstream-4", "reference", "ours", "graphs"]
    assert kinds["upstream-4"].flags[-2:] == ("--api-server-count", "4")
    assert kinds["upstream-4"].environment == ("VLLM_PLUGINS=none",)
    assert kinds["reference"].environment == ("VLLM_COSMOS3_PROCESSOR=reference",)
    assert kinds["graphs"].environment == ("A=1",)
    assert json.loads(kinds["graphs"].flags[-1]) == {"cudagraph_mm_encoder": True}


def test_stages_are_milliseconds_a_request_since_the_beginning(tmp_path: Path) -> None:
    lines = {
        "1.jsonl": [
            ("load", 0.0, 9.0),  # of the warm-up
            ("load", 10.0, 10.030),
            ("decode", 10.001, 10.021),
            ("process", 10.030, 10.050),
            ("pixels", 10.032, 10.044),
        ],
        "2.jsonl": [
            ("arrive", 10.053, 10.054),
            ("prefill", 10.1, 10.2),
            ("vision", 10.1, 10.13),
            ("decode step", 10.2, 10.216),
        ],
    }
    for name, found in lines.items():
        text = [json.dumps({"stage": s, "begin": b, "end": e}) for s, b, e in found]
        (tmp_path / name).write_text("\n".join(text) + "\n")
    assert stages_of(tmp_path, since=10.0, requests=2) == {
        "base64": 5.0,
        "decode the clip": 10.0,
        "processor: pixels": 6.0,
        "processor: the rest": 4.0,
        "to the engine": 1.5,
        "vision tower": 15.0,
        "language model": 35.0,
        "steps without a new request": 8.0,
    }


def test_processor_time_is_that_of_the_group() -> None:
    work = "import os, time\nwhile time.process_time() < 0.3: pass\nos.write(1, b'.')\ninput()"
    with subprocess.Popen(
        [sys.executable, "-c", work], stdin=PIPE, stdout=PIPE, process_group=0
    ) as group:
        assert group.stdout is not None
        assert group.stdout.read(1) == b"."
        assert 0.25 <= cpu_seconds(group.pid) < 5
        group.communicate(b"\n")
