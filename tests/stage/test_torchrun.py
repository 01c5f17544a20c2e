"""Ranks that torchrun has started: the engine and the command on meshes and replicas of them.

Two are started by torchrun's command and import vLLM, the others are forked by its agent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launched import Said, assert_failed_together, fork, launch, said
from lines import write_inputs
from safetensors.numpy import load_file
from servers import forking

from vllm_cosmos3 import Cosmos3
from vllm_cosmos3.media import read_video

REQUEST = {"prompt": "A paper boat", "num_frames": 5, "height": 64, "width": 64, "seed": 3}
REQUEST |= {"num_inference_steps": 3}
SMALL = ("--size", "64x64", "--num-frames", "5", "--num-steps", "1", "--seed", "0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    """What became of a launch: its status, what each rank met, and what each command said."""

    folder: Path
    status: int
    met: dict[int, list[str]]
    commands: list[list[Said]]


def launched(
    how: Callable[..., tuple[int, dict[int, list[str]]]],
    name: str,
    checkpoint: Path,
    folder: Path,
    cache: Path,
    ranks: int,
    *commands: tuple[object, ...],
) -> Launched:
    status, met = how(
        name, checkpoint, folder, ranks=ranks, commands=commands, environment=forking(cache)
    )
    heard = [said(folder, number) for number in range(len(commands))]
    assert [len(each) for each in heard] == [ranks] * len(commands)
    return Launched(folder=folder, status=status, met=met, commands=heard)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def two(
    tiny_checkpoint_fp32: Path,
    vllm_cache: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Launched:
    """Eight requests to one generator, one to each of four others, and a command."""
    folder = tmp_path_factory.mktemp("two")
    checkpoint = ("--checkpoint", tiny_checkpoint_fp32)
    phyai = ("generate", "--tp", 2, *checkpoint, "--prompt", "A red sports car")
    phyai += ("--out", folder / ".cache" / "cosmos3_t2v_wn", *SMALL)
    return launched(launch, "two_ranks", tiny_checkpoint_fp32, folder, vllm_cache, 2, phyai)


@pytest.fixture(scope="module")
def two_of_reasoner(
    tiny_checkpoint_fp32: Path,
    inputs: Path,
    vllm_cache: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Launched:
    """A command that makes the first rank an ordinary process, with the engine of vLLM."""
    folder = tmp_path_factory.mktemp("reasoner")
    reasoner = ("generate", "-i", inputs / "reasoner*.json", "-o", folder / "reasoner")
    reasoner += ("--checkpoint-path", tiny_checkpoint_fp32, "--parallelism-preset=latency")
    reasoner += ("--benchmark", "--seed=0", "--max-new-tokens", 4, "--enforce-eager")
    reasoner += ("--load-format", "auto")
    return launched(fork, "only_commands", tiny_checkpoint_fp32, folder, vllm_cache, 2, reasoner)


@pytest.fixture(scope="module")
def four(
    tiny_checkpoint_fp32: Path,
    inputs: Path,
    vllm_cache: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Launched:
    """A command of one mesh, one of four replicas, and requests that leave the ranks out of step."""
    folder = tmp_path_factory.mktemp("four")
    mesh = ["generate", tiny_checkpoint_fp32, "--out", folder / "mesh", "--dtype", "float32"]
    mesh += ["--ulysses-degree", "2", "--tensor-parallel-size", "2"]
    mesh += ["--distributed-executor-backend", "external_launcher", "--output-type", "latent"]
    for name, value in REQUEST.items():
        mesh += [f"--{name.replace('_', '-')}", value]
    records = ("generate", "-i", inputs / "[aitv][c2]*.json", "-o", folder / "records")
    records += ("--checkpoint-path", tiny_checkpoint_fp32, "--parallelism-preset=throughput")
    records += ("--benchmark", "--no_guardrails", "--num_steps", 1, "--size", "64x64", "--seed", 0)
    return launched(
        fork, "four_ranks", tiny_checkpoint_fp32, folder, vllm_cache, 4, tuple(mesh), records
    )


def test_they_fail_a_request_together_and_go_on(two: Launched) -> None:
    assert two.status == 0
    assert_failed_together({rank: lines[:8] for rank, lines in two.met.items()})


def test_they_make_one_generator_after_the_other(two: Launched) -> None:
    assert {rank: lines[8:] for rank, lines in two.met.items()} == {
        0: ["served"] * 4,
        1: ["served"] * 4,
    }


def test_two_ranks_of_phyai_make_one_video(two: Launched) -> None:
    """The command of phyai's documents: the ranks are torchrun's, and there is one result."""
    ranks = two.commands[0]
    assert [rank.status for rank in ranks] == [0, 0], ranks
    assert "".join(rank.out for rank in ranks).count("vision.mp4  64x64") == 1
    assert "".join(rank.err for rank in ranks).count(", loaded in ") == 1
    out = two.folder / ".cache" / "cosmos3_t2v_wn"
    assert read_video(out.with_suffix(".mp4"), frames=5).shape == (5, 64, 64, 3)
    assert [file.name for file in out.iterdir()] == ["sample"]


def test_two_ranks_ask_one_reasoner(two_of_reasoner: Launched) -> None:
    """The framework's inputs/reasoner under torchrun: the first rank has the devices of both."""
    ranks, out = two_of_reasoner.commands[0], two_of_reasoner.folder / "reasoner"
    assert [rank.status for rank in ranks] == [0, 0], ranks
    assert "".join(rank.out for rank in ranks).count("3 of 3 records have their results") == 1
    for name in ("reasoner", "reasoner_image", "reasoner_video"):
        assert (out / name / "reasoner_text.txt").is_file()
    benchmark = json.loads((out / "benchmark.json").read_text())
    assert len(benchmark["all"]["OmniMoTModel.generate_reasoner_text"]) == 3


def test_four_ranks_make_what_one_makes(four: Launched, tiny_checkpoint_fp32: Path) -> None:
    ranks, out = four.commands[0], four.folder / "mesh" / "sample"
    assert [rank.status for rank in ranks] == [0] * 4, ranks
    assert sorted(file.name for file in out.iterdir()) == [
        "latents.safetensors",
        "sample_args.json",
        "sample_outputs.json",
    ]
    latents = load_file(out / "latents.safetensors")["vision"]
    with Cosmos3(tiny_checkpoint_fp32, dtype="float32", device="cpu") as model:
        reference = model.generate(**REQUEST, output_type="latent").latents["vision"]
    assert np.abs(latents - reference).max() < 1e-5 * np.abs(reference).max()


def test_four_ranks_divide_the_records(four: Launched) -> None:
    """The framework's inputs/omni: each record is made once, by one of the replicas."""
    ranks, out = four.commands[1], four.folder / "records"
    assert [rank.status for rank in ranks] == [0] * 4, ranks
    said = r"^(\d) of \1 records have their results"
    shares = [share for rank in ranks for share in re.findall(said, rank.out, re.MULTILINE)]
    names = sorted(folder.name for folder in out.iterdir() if folder.is_dir())
    assert sum(map(int, shares)) == len(names) == 13
    assert len(shares) == 4
    for name in names:
        record = json.loads((out / name / "sample_outputs.json").read_text())
        assert record["status"] == "success"
        assert len(record["outputs"]) == 1
    benchmark: Mapping[str, Any] = json.loads((out / "benchmark.json").read_text())
    assert benchmark.keys() == {"all", "average"}
    assert len(benchmark["all"]["OmniInference.generate_batch"]) == int(max(shares))
    assert "OmniMoTModel.generate_samples_from_batch" in benchmark["average"]


def test_ranks_that_wait_for_each_other_end(four: Launched) -> None:
    assert four.status != 0
    assert four.met.keys() == {3}  # the other ones were ended where they waited
    served, all_fail, again, one_fails, gone = four.met[3]
    assert served == again == "served"
    assert all_fail == "Cosmos3Error: step failed: RuntimeError: all ranks fail, this is 0"
    assert one_fails == (
        "WorkerDied: step failed: RuntimeError: only the last rank fails; "
        "the other ranks cannot go on, start all of them again"
    )
    assert gone.endswith("the ranks are out of step after a failure; start all of them again")
