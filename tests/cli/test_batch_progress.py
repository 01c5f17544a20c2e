"""The progress line of a batch, and what it says of warnings."""

from __future__ import annotations

import pytest

from vllm_cosmos3.cli.batch_progress import WARNINGS, ProgressLine, described


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ((0, 0, 9, 0, 1.0), "0 of 9 done, 0 failed"),
        ((6, 1, 9, 4, 40.0), "6 of 9 done, 1 failed, 360 an hour, ETA 0:00:20"),
        ((1204, 3, 100_000, 412, 3600.0), "1204 of 100000 done, 3 failed, 412 an hour, ETA 9 d 23:47:20"),
        ((9, 0, 9, 9, 0.5), "9 of 9 done, 0 failed, 64,800 an hour, ETA 0:00:00"),
    ],
)  # fmt: skip
def test_the_rate_is_that_of_this_run(values: tuple[int, int, int, int, float], line: str) -> None:
    done, failed, total, made, seconds = values
    shown = described(done=done, failed=failed, total=total, made=made, seconds=seconds)
    assert shown == line


def test_a_log_has_the_last_line_and_not_every_warning(capsys: pytest.CaptureFixture[str]) -> None:
    progress = ProgressLine(50)
    for number in range(50):
        progress.warn(f"record {number}", ["it is small"])
        progress.update(done=number + 1, failed=0, made=True)
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == WARNINGS + 2
    assert lines[0] == "warning: record 0: it is small"
    assert lines[-2].startswith("further warnings are in")
    assert lines[-1].startswith("50 of 50 done, 0 failed, ")
