"""Every example runs against a real server and leaves behind what it promises; so does the load."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from generators import PICTURE, SMALL
from limits import HANG
from media_files import picture, png
from PIL import Image
from servers import Server

pytestmark = pytest.mark.serve
ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "generator"


def run(folder: Path, *command: str) -> str:
    done = subprocess.run(
        command, check=False, cwd=folder, capture_output=True, text=True, timeout=HANG
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def frames(file: Path) -> int:
    with av.open(str(file)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_image(generator_server: Server, tmp_path: Path) -> None:
    script = str(EXAMPLES / "image.py")
    run(tmp_path, sys.executable, script, generator_server.url, "a boat", json.dumps(PICTURE))
    with Image.open(tmp_path / "image.png") as image:
        assert image.size == (64, 64)


def test_video(generator_server: Server, tmp_path: Path) -> None:
    script = str(EXAMPLES / "video.py")
    output = run(
        tmp_path, sys.executable, script, generator_server.url, "a boat", json.dumps(SMALL)
    )
    assert "100 %  done" in output
    assert frames(tmp_path / "video.mp4") == 5


def test_image_to_video(generator_server: Server, tmp_path: Path) -> None:
    (tmp_path / "first.png").write_bytes(png(picture(64, 64)))
    script = str(EXAMPLES / "image_to_video.py")
    arguments = [generator_server.url, "it moves", "first.png", json.dumps(SMALL)]
    run(tmp_path, sys.executable, "-W", "ignore", script, *arguments)
    assert frames(tmp_path / "moved.mp4") == 5


def test_a_story_in_turns(generator_server: Server, tmp_path: Path) -> None:
    script = str(EXAMPLES / "go_on.py")
    fields = json.dumps({k: v for k, v in SMALL.items() if k != "size"} | {"fps": 10})
    turns = ["a boat", "a waterfall", "the sea"]
    output = run(
        tmp_path, sys.executable, "-W", "ignore", script, generator_server.url, *turns, fields
    )
    assert output.splitlines()[-1] == "1.3 s: the sea"
    assert frames(tmp_path / "story.mp4") == 13


def test_sync_with_curl(generator_server: Server, tmp_path: Path) -> None:
    fields = [f"{name}={value}" for name, value in SMALL.items()]
    output = run(
        tmp_path, "sh", str(EXAMPLES / "sync.sh"), generator_server.url, "@a boat", *fields,
        "extra_params[guardrails]=false",
    )  # fmt: skip
    assert "x-stage-durations: {" in output.lower()
    assert frames(tmp_path / "sync.mp4") == 5


def test_a_path_driven_forward_and_found_again(generator_server: Server, tmp_path: Path) -> None:
    (tmp_path / "street.png").write_bytes(png(picture(64, 64)))
    poses = np.tile(np.eye(4), (5, 1, 1))
    poses[:, 2, 3], poses[:, 0, 3] = np.arange(5), np.arange(5) ** 2 / 8  # forward, to the right
    (tmp_path / "poses.json").write_text(json.dumps(poses.tolist()))
    fields = json.dumps({"size": "64x64", "num_inference_steps": 2, "seed": 1})
    command = [sys.executable, str(EXAMPLES / "av_forward.py"), generator_server.url]
    run(tmp_path, *command, "street.png", "poses.json", fields)
    assert frames(tmp_path / "drive.mp4") == 5
    assert np.array(json.loads((tmp_path / "rows.json").read_text())).shape == (4, 9)
    command = [sys.executable, str(EXAMPLES / "av_inverse.py"), generator_server.url]
    output = run(tmp_path, *command, "drive.mp4", "rows.json", fields)
    assert "m apart" in output
    with Image.open(tmp_path / "path.png") as image:
        colours = {colour for _, colour in image.getcolors()}
    assert {(0, 0, 255), (255, 0, 0)} <= colours


def test_examples_are_short() -> None:
    longer = {"world_model.py": 80}  # with its policy and its loop
    for file in EXAMPLES.iterdir():
        assert len(file.read_text().splitlines()) <= longer.get(file.name, 40), file.name


@pytest.mark.parametrize(("kind", "flags"), [("images", []), ("videos", ["--rate", "20"])])
def test_the_load_generator(
    kind: str, flags: list[str], generator_server: Server, tmp_path: Path
) -> None:
    fields = {k: v for k, v in (PICTURE if kind == "images" else SMALL).items() if k != "seed"}
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "serving.py"),
        "--url",
        generator_server.url,
    ]
    command += ["--kind", kind, "--requests", "6", "--concurrency", "3", *flags]
    output = run(tmp_path, *command, "--fields", json.dumps(fields), "--json", "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["requests"], report["errors"]) == (6, 0)
    assert report["latency_s"]["p50"] <= report["latency_s"]["p99"]
    assert report["gpu_seconds_per_output"] > 0
    assert "p99" in output


def test_the_load_of_polls(generator_server: Server, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "serving.py"), "--kind", "polls"]
    command += ["--url", generator_server.url, "--requests", "300", "--concurrency", "50"]
    command += ["--fields", '{"num_chunks": 20}']  # longer than all of them
    output = run(tmp_path, *command, "--json", "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["requests"], report["errors"]) == (300, 0)
    assert 0 < report["latency_s"]["p50"] <= report["latency_s"]["p99"]
    assert "before the last look" not in output
