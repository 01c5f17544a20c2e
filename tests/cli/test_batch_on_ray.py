"""``vllm-cosmos3 generate --ray``: batch files on a small cluster, of which parts are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from generators import eventually
from limits import HANG
from ray_nodes import cluster

RECORDS = 40
FAST = {"size": "64x64", "num_steps": 1, "guidance": 1, "num_frames": 1, "prompt": "a boat"}


@pytest.fixture
def two_processors(vllm_cache: Path) -> Iterator[dict[str, str]]:
    """The environment of processes that find a cluster of two processors: one actor, and one for Ray's own tasks."""
    with cluster(vllm_cache, "--num-cpus", 2, "--num-gpus", 0) as settings:
        yield settings


def finished(out: Path) -> dict[str, int]:
    """The records that have their results, and when."""
    found = out.glob("*/sample_outputs.json")
    return {path.parent.name: path.stat().st_mtime_ns for path in found}


def wait_for(count: int, out: Path) -> None:
    eventually(lambda: len(finished(out)) >= count)


def makers() -> set[int]:
    """The processes of the actors that make records."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except OSError:
            continue
        if line.startswith(b"ray::") and b"MapBatches(Maker)" in line:
            found.add(int(path.parent.name))
    return found


def test_a_killed_driver_and_a_killed_actor_lose_nothing(
    tiny_checkpoint: Path,
    tmp_path: Path,
    two_processors: dict[str, str],
) -> None:
    file, out = tmp_path / "x.jsonl", tmp_path / "out"
    chain = {"num_frames": 5}
    records = [FAST | {"name": f"r{number}"} for number in range(RECORDS)]
    records[30] |= chain
    records[35] |= chain | {"continue_from": "r30"}
    records[38] |= {"fps": 0}
    file.write_text("\n".join(map(json.dumps, records)))
    # Never in this process: Ray keeps for good how the first cluster of a process is reached.
    command = [sys.executable, "-m", "vllm_cosmos3", "generate", str(tiny_checkpoint)]
    command += ["--input", str(file), "--out", str(out), "--ray", "--keep-going"]
    with subprocess.Popen(command, env=two_processors, start_new_session=True) as driver:
        wait_for(2, out)
        orphans = makers()
        driver.send_signal(signal.SIGKILL)
    eventually(lambda: not orphans & makers())
    first = finished(out)
    assert len(first) < RECORDS

    def kill_an_actor() -> None:
        wait_for(len(first) + 5, out)
        (maker,) = makers()
        os.kill(maker, signal.SIGKILL)

    killer = threading.Thread(target=kill_an_actor, daemon=True)
    killer.start()
    resumed = subprocess.run(
        [*command, "--resume"],
        check=False,
        env=two_processors,
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert resumed.returncode == 1, resumed.stderr
    killer.join()
    assert f"{RECORDS - 1} of {RECORDS} records have their results" in resumed.stdout
    assert "fps is 0" in resumed.stderr
    lines = [json.loads(line) for line in (out / "index.jsonl").read_text().splitlines()]
    assert sorted(line["name"] for line in lines) == sorted(f"r{n}" for n in range(RECORDS))
    assert [line["name"] for line in lines if line["status"] == "error"] == ["r38"]
    last = finished(out)
    later = [name for name, at in first.items() if last[name] != at]
    assert set(later) <= {"r38"}  # nothing is made twice, but what was refused is tried again
    assert not (out / ".cosmos3").exists()
    assert not list(out.rglob("*.part"))
