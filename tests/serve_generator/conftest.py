"""Servers that many tests share. Each is started once and left able to serve."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from generators import delete_all, generator, idle
from limits import HANG
from lora_files import adapter
from robots import KEY
from servers import Server

from vllm_cosmos3.checkpoint.synthetic import write_checkpoint

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture(autouse=True)
def nothing_runs(request: pytest.FixtureRequest) -> None:
    """The server that most tests share has nothing to do when one begins, even after one that failed."""
    if "generator_server" in request.fixturenames:
        server = request.getfixturevalue("generator_server")
        delete_all(server)
        idle(server)


@pytest.fixture(scope="session")
def generator_server(
    tiny_checkpoint: Path,
    media_folder: Path,
    vllm_cache: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    """The generator alone, with small limits, of a checkpoint of its own: a test holds a file of it."""
    flags = ["--max-queue", "8", "--max-upload", str(4 * 2**20), "--upload-idle", "8"]
    flags += ["--allowed-local-media-path", str(media_folder), "--fetch-seconds", "3"]
    folder = tmp_path_factory.mktemp("generator")
    checkpoint = shutil.copytree(tiny_checkpoint, folder / "tiny")
    with generator(checkpoint, folder, vllm_cache, *flags) as server:
        yield server


@pytest.fixture(scope="session")
def distilled_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint that turns a picture into a video in four steps."""
    folder = tmp_path_factory.mktemp("distilled") / "tiny"
    write_checkpoint(folder, kind="distilled-i2v")
    return folder


@pytest.fixture(scope="session")
def guarded_server(
    distilled_checkpoint: Path, vllm_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A distilled checkpoint with an adapter, behind an API key and a guardrail."""
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    flags = ["--api-key", "secret", "other", "--guardrail-checker", "checkers:Words"]
    flags += [
        "--disable-uvicorn-access-log",
        "--allowed-origins",
        "http://a.example",
        "--no-playground",
    ]
    flags += ["--presets", "exact"]
    flags += [
        "--allow-private-media",
        "--allowed-media-domains",
        "127.0.0.1",
        "--max-upload",
        "100000",
    ]
    folder = tmp_path_factory.mktemp("guarded")
    flags += ["--lora", f"{adapter(folder / 'snow', distilled_checkpoint)}:0.5"]
    flags += ["--weight-transfer", "files"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        with generator(distilled_checkpoint, folder, vllm_cache, *flags) as server:
            yield server


@pytest.fixture(scope="module")
def robot_server(vllm_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A policy for DROID robots, behind an API key."""
    folder = tmp_path_factory.mktemp("robots")
    write_checkpoint(folder / "tiny", kind="policy-droid")
    flags = ["--api-key", KEY, "--robot-openpi-idle-timeout", "12", "--max-queue", "2"]
    flags += ["--root-path", "/studio"]
    flags += ["--weight-transfer", "files", "--weight-update-timeout", "1"]
    with generator(folder / "tiny", folder, vllm_cache, *flags) as server:
        yield server


@pytest.fixture(scope="session")
def openpi_python() -> Path:
    """The Python of an environment with openpi-client, which later sessions find again."""
    folder = ROOT / ".venv-openpi"
    command = [sys.executable, str(ROOT / "tools" / "setup.py"), "--device", "openpi"]
    subprocess.run([*command, "--folder", str(folder)], check=True, timeout=HANG)
    return folder / "bin" / "python"
