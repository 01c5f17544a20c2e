"""Admission by memory: refusals with numbers, requests that count together, ranks that agree."""

from __future__ import annotations

import gc
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import Ranks

from vllm_cosmos3 import Cosmos3
from vllm_cosmos3.checkpoint.config import read_config
from vllm_cosmos3.cli import main
from vllm_cosmos3.engine_options import EngineConfig, ParallelConfig
from vllm_cosmos3.errors import InvalidRequest, OutOfMemory
from vllm_cosmos3.generator.memory import WORKSPACES, Work, estimate
from vllm_cosmos3.generator.memory.reservation import GIB, MemoryBudget
from vllm_cosmos3.generator.pipeline import Pipeline
from vllm_cosmos3.parallel.axis import Axis
from vllm_cosmos3.parallel.mesh import Mesh

SMALL = Work(streams=(("vision", (1, 48, 1, 4, 4)),), text=(50, 50), branches=2)
LARGE = Work(streams=(("vision", (1, 48, 7, 12, 20)),), text=(50, 50), branches=2)
ALONE = Axis("world", 1, 0, None)
CPU = torch.device("cpu")


def engine(folder: Path, limit: int | None) -> EngineConfig:
    gib = None if limit is None else limit / GIB
    return EngineConfig(model=folder, und_residency="gpu", memory_limit=gib)


def none_to_give_up() -> None:
    raise AssertionError("nothing is cached")


def test_what_fits_to_the_byte_is_admitted(tiny_checkpoint: Path) -> None:
    model = read_config(tiny_checkpoint)
    memory = estimate(model, engine(tiny_checkpoint, None), LARGE)
    enough = memory.resident + memory.request
    MemoryBudget(model, engine(tiny_checkpoint, enough), ALONE, CPU).reserve(
        LARGE, 0, none_to_give_up
    )
    short = MemoryBudget(model, engine(tiny_checkpoint, enough - 1), ALONE, CPU)
    with pytest.raises(OutOfMemory) as refused:
        short.reserve(LARGE, 0, lambda: None)
    assert refused.value.code == "out_of_memory"
    needed, free = (int(n.replace(",", "")) for n in re.findall(r"[\d,]{5,}", str(refused.value)))
    assert (needed, free) == (memory.request, memory.request - 1)
    assert "fewer frames or a smaller size" in str(refused.value)


def test_requests_in_flight_count(tiny_checkpoint: Path) -> None:
    model = read_config(tiny_checkpoint)
    large, small = (estimate(model, engine(tiny_checkpoint, None), work) for work in (LARGE, SMALL))
    limit = large.resident + large.request + small.held
    budget = MemoryBudget(model, engine(tiny_checkpoint, limit), ALONE, CPU)
    first = budget.reserve(SMALL, 0, none_to_give_up)
    second = budget.reserve(LARGE, 0, none_to_give_up)
    with pytest.raises(OutOfMemory, match="wait for 2 other requests, or ask for fewer"):
        budget.reserve(SMALL, 0, lambda: None)
    del first
    gc.collect()
    third = budget.reserve(SMALL, 0, none_to_give_up)  # in the place of the first
    assert second.held > third.held


def test_what_others_have_not_allocated_yet_is_not_free(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, which is asked for its memory: a request grows for some steps after its first call."""
    model, own = read_config(tiny_checkpoint), engine(tiny_checkpoint, None)
    large, small = (estimate(model, own, work) for work in (LARGE, SMALL))
    total = large.resident + large.request + small.held + WORKSPACES
    grown: list[int] = []  # beside the weights

    def taken(_: torch.device) -> int:
        return large.resident + sum(grown)

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (total - taken(_), total))
    monkeypatch.setattr(torch.cuda, "memory_allocated", taken)
    monkeypatch.setattr(torch.cuda, "memory_reserved", taken)
    monkeypatch.setattr(torch.accelerator, "reset_peak_memory_stats", lambda _: None)
    budget = MemoryBudget(model, own, ALONE, torch.device("cuda", 0))
    kept = [budget.reserve(work, 0, none_to_give_up) for work in (SMALL, LARGE)]
    for one in kept:
        with pytest.raises(OutOfMemory, match="wait for 2 other requests"):
            budget.reserve(SMALL, 0, lambda: None)
        grown.append(one.held)
    del one
    kept.clear()
    grown.clear()
    gc.collect()
    assert budget.reserve(LARGE, 0, none_to_give_up).held == large.held


def test_what_is_cached_is_given_up_first(tiny_checkpoint: Path) -> None:
    model = read_config(tiny_checkpoint)
    memory = estimate(model, engine(tiny_checkpoint, None), LARGE)
    limit = memory.resident + memory.request
    budget = MemoryBudget(model, engine(tiny_checkpoint, limit), ALONE, CPU)
    given_up: list[bool] = []
    budget.reserve(LARGE, 1000, lambda: given_up.append(True))
    assert given_up == [True]


def promised(mesh: Mesh, folder: Path, limits: tuple[int, ...]) -> str | None:
    own = engine(folder, limits[mesh.world.rank])
    budget = MemoryBudget(read_config(folder), own, mesh.world, CPU)
    try:
        budget.reserve(LARGE, 0, lambda: None)
    except OutOfMemory as error:
        return str(error)
    return None


def test_all_ranks_refuse_what_does_not_fit_on_one(tiny_checkpoint: Path, ranks: Ranks) -> None:
    two = ParallelConfig(ulysses_degree=2)
    answers = ranks(two, promised, tiny_checkpoint, (GIB, 5_000_000))
    assert answers[0] == answers[1]
    assert answers[0] is not None
    assert ranks(two, promised, tiny_checkpoint, (GIB, GIB)) == [None, None]


REQUEST = {
    "prompt": "A boat",
    "num_frames": 5,
    "size": "64x64",
    "num_inference_steps": 2,
    "seed": 1,
}


def test_a_request_over_the_limit_is_refused_and_the_next_one_served(tiny_checkpoint: Path) -> None:
    plain = {"device": "cpu", "und_residency": "gpu"}
    with Cosmos3(tiny_checkpoint, **plain) as model:
        expected = model.generate(**REQUEST).video
    steps: list[int] = []
    with Cosmos3(tiny_checkpoint, **plain, memory_limit=0.012) as model:
        with pytest.raises(OutOfMemory, match=r"needs [\d,]+ bytes .* are free"):
            model.generate(
                **(REQUEST | {"size": "320x192", "num_frames": 49}),
                progress=lambda p: steps.append(p.step) if p.phase == "denoise" else None,
            )
        assert steps == []
        assert np.array_equal(model.generate(**REQUEST).video, expected)


def test_a_limit_is_a_positive_number(tiny_checkpoint: Path) -> None:
    for wrong in (0, -1.0, float("nan")):
        with pytest.raises(InvalidRequest, match="memory_limit"):
            Cosmos3(tiny_checkpoint, device="cpu", memory_limit=wrong)


def test_weights_that_do_not_fit_are_refused_before_they_are_read(tiny_checkpoint: Path) -> None:
    with pytest.raises(OutOfMemory, match=r"the weights need [\d,]+ bytes .* may be used$"):
        Cosmos3(tiny_checkpoint, device="cpu", und_residency="gpu", memory_limit=0.0005)


def residencies(mesh: Mesh, folder: Path) -> list[str]:
    base = EngineConfig(model=folder, device="cpu")
    return [
        Pipeline.load(replace(base, memory_limit=limit), mesh, "cpu").config.und_residency
        for limit in (None, 4.0, 0.01)
    ]


def test_auto_moves_the_text_tower_where_it_must(tiny_checkpoint: Path, ranks: Ranks) -> None:
    assert ranks(ParallelConfig(), residencies, tiny_checkpoint) == [["gpu", "gpu", "host"]]


def test_the_command_line_says_it_in_one_line(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", str(tiny_checkpoint), "--prompt", "boat", "--out", str(tmp_path)]
    command += ["--size", "320x192", "--num-frames", "49", "--memory-limit", "0.01"]
    assert main(command) == 2
    assert "vllm-cosmos3 generate: the request needs" in capsys.readouterr().err
