"""Commands of other programs' documents: every one is understood, and the ones that matter run."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import pytest
from lines import DOCUMENT, LINES, Line, document, of, replaced, write_inputs

from vllm_cosmos3.cli import main
from vllm_cosmos3.compat import _FRONTEND_ARGS, first_module
from vllm_cosmos3.server.options import Options
from vllm_cosmos3.stage.launcher import VARIABLES

# Divisible into the heads of the tiny checkpoint, which has four.
HEADS = {"--tensor-parallel-size": "4"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment that is put back, whatever a command does to it."""
    for name in (*VARIABLES, "TORCHELASTIC_RUN_ID", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "put back at the end")
        monkeypatch.delenv(name)
    return monkeypatch


def test_every_place_is_known() -> None:
    places = [place for line in LINES for place in line.places if ", line " in place]
    assert len(places) == len(set(places)) == 69
    assert {line.program for line in LINES} == {"generate", "serve", "curl"}


@pytest.mark.parametrize("line", of("generate"), ids=lambda line: line.places[0])
def test_generate_understands(
    line: Line,
    tiny_checkpoint: Path,
    inputs: Path,
    tmp_path: Path,
    process: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in line.environment.items():
        process.setenv(name, value)
    if line.ranks is not None:
        launched = {"RANK": "0", "WORLD_SIZE": str(line.ranks), "TORCHELASTIC_RUN_ID": "x"}
        for name, value in launched.items():
            process.setenv(name, value)
    words = replaced(line, tiny_checkpoint, inputs, tmp_path / "out")
    assert main(["generate", *words, "--dry-run"]) == 0
    printed = capsys.readouterr()
    planned = json.loads(printed.out)
    if "--num-frames 49" in line.command:
        assert (planned["num_frames"], planned["size"]) == (49, "832x480")
        assert (planned["num_inference_steps"], planned["prompt"][:16]) == (10, "A red sports car")
    if isinstance(planned, list) and "--image_size" in words:
        assert {record["image_size"] for record in planned} == {480}


@pytest.mark.parametrize("line", of("serve"), ids=lambda line: line.places[0])
def test_serve_understands(
    line: Line,
    tiny_checkpoint: Path,
    inputs: Path,
    tmp_path: Path,
    process: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    started: dict[str, Any] = {}

    def serve(folder: Path, names: object, options: Options, device: object, listen: object) -> int:
        started.update(names=names, options=options, listen=listen)
        return 0

    process.setattr("vllm_cosmos3.server.command.serve_generator", serve)
    process.setattr(
        "vllm_cosmos3.cli.serve._become", lambda words: started.update(words=words) or 0
    )
    process.setattr("vllm_cosmos3.cli.serve.os.environ", dict(os.environ))
    process.setenv("XDG_STATE_HOME", str(tmp_path))
    process.chdir(inputs)
    words = [{"8000": "0", "8001": "0"}.get(word, word) for word in line.words]
    words = [HEADS.get(before, word) if word == "8" else word for before, word in zip(["", *words], words, strict=False)]  # fmt: skip
    words[0] = str(tiny_checkpoint)
    words = [str(inputs) if "$" in word or word.startswith("/path") else word for word in words]
    status = main(["serve", *words])
    errors = capsys.readouterr().err
    assert "unrecognized" not in errors
    if "--omni" not in words:
        check_vllm_understands(started["words"])
        return
    assert status == 0, errors
    options: Options = started["options"]
    if "--deploy-config" in words or "--no-guardrails" in words:
        assert options.guardrails == "off"
    if "--init-timeout" in words:
        assert options.call_limits == "load=1800"
    for flag, name in (("--cfg-parallel-size", "cfg_parallel_size"), ("--usp", "ulysses_degree")):
        if flag in words:
            assert options.engine[name] == int(words[words.index(flag) + 1])


def check_vllm_understands(words: list[str]) -> None:
    """vLLM's own parser takes the command that ours prints."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    assert words[:2] == ["vllm", "serve"]
    parser = first_module(_FRONTEND_ARGS).make_arg_parser(FlexibleArgumentParser())
    args: argparse.Namespace = parser.parse_args(words[2:])
    assert args.async_scheduling is True


@pytest.mark.parametrize(
    ("environment", "flags", "words"),
    [
        ({"WORLD_SIZE": "4", "RANK": "0"}, [], "WORLD_SIZE is 4, must be 1, the product of --tensor"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, ["--tp", "4"], "start torchrun --nproc_per_node 4, or"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, ["--tp", "2", "--distributed-executor-backend", "mp"], "torchrun has started 2 ranks already"),
        ({"WORLD_SIZE": "1", "RANK": "0", "TORCHELASTIC_RUN_ID": "x"}, ["--tp", "2"], "WORLD_SIZE is 1, must be 2"),
        ({"WORLD_SIZE": "3", "RANK": "0"}, ["--parallelism-preset", "throughput", "--tp", "2"], "WORLD_SIZE is 3, must be a multiple of 2"),
    ],
)  # fmt: skip
def test_ranks_that_do_not_suit_the_mesh(
    environment: dict[str, str],
    flags: list[str],
    words: str,
    tiny_checkpoint: Path,
    process: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environment.items():
        process.setenv(name, value)
    assert main(["generate", str(tiny_checkpoint), "--prompt", "a", "--out", "x", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_a_server_is_not_started_twice(
    process: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    process.setenv("WORLD_SIZE", "2")
    process.setenv("RANK", "1")
    assert main(["serve", "x/y"]) == 2
    assert "WORLD_SIZE is 2, must be unset: serve starts the ranks" in capsys.readouterr().err


def test_the_tables_of_the_document_are_true() -> None:
    """``python tests/seeds/lines.py`` writes them."""
    text = DOCUMENT.read_text()
    assert document(text) == text
