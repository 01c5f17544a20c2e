"""``vllm-cosmos3 generate --ray``: batch files on a small cluster, of which parts are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from generators import eventually
from limits import HANG
from media_files import file_server
from PIL import Image
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


@dataclass(frozen=True)
class Held:
    """A picture that nobody gets until it is free. Who asks for it is stopped at a known place."""

    asked: threading.Event = field(default_factory=threading.Event)
    free: threading.Event = field(default_factory=threading.Event)

    def hold(self) -> None:
        self.asked.set()
        self.free.wait(HANG)


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
    # The third of those that an actor is given together, whichever of them come first.
    held = {f"/{number}.png": Held() for number in (10, 22)}
    # Never in this process: Ray keeps for good how the first cluster of a process is reached.
    command = [sys.executable, "-m", "vllm_cosmos3", "generate", str(tiny_checkpoint)]
    command += ["--input", str(file), "--out", str(out), "--ray", "--keep-going"]
    with file_server(tmp_path, lambda path: held[path].hold()) as url:
        for path in held:
            Image.new("RGB", (64, 64), "teal").save(tmp_path / Path(path).name)
            records[int(Path(path).stem)] |= chain | {"vision_path": url + path}
        file.write_text("\n".join(map(json.dumps, records)))
        with subprocess.Popen(command, env=two_processors, start_new_session=True) as driver:
            eventually(lambda: any(one.asked.is_set() for one in held.values()))
            orphans = makers()
            driver.send_signal(signal.SIGKILL)
        eventually(lambda: not orphans & makers())
        first = finished(out)
        assert 2 <= len(first) < RECORDS

        begun, later = held.values()
        begun.free.set()
        later.asked.clear()
        with subprocess.Popen(
            [*command, "--resume"],
            env=two_processors,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as resumed:
            assert later.asked.wait(HANG)
            (maker,) = makers()
            os.kill(maker, signal.SIGKILL)
            later.free.set()
            printed, said = resumed.communicate(timeout=HANG)
    assert resumed.returncode == 1, said
    assert f"{RECORDS - 1} of {RECORDS} records have their results" in printed
    assert "fps is 0" in said
    lines = [json.loads(line) for line in (out / "index.jsonl").read_text().splitlines()]
    assert sorted(line["name"] for line in lines) == sorted(f"r{n}" for n in range(RECORDS))
    assert [line["name"] for line in lines if line["status"] == "error"] == ["r38"]
    last = finished(out)
    again = [name for name, at in first.items() if last[name] != at]
    assert set(again) <= {"r38"}  # nothing is made twice, but what was refused is tried again
    assert not (out / ".cosmos3").exists()
    assert not list(out.rglob("*.part"))
