"""Whole requests on two ranks of the CPU, and their tables beside published records."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

import whole_requests
from floor import Rates
from meshes import Meeting, degrees
from one_rank import Collectives, Communication, Link, first_rank
from published import ELSEWHERE, NVIDIA, records
from vllm_cosmos3.checkpoint.config import read_config
from vllm_cosmos3.engine_options import EngineConfig, ParallelConfig
from vllm_cosmos3.generator.pipeline import Pipeline
from vllm_cosmos3.parallel.axis import Axis
from vllm_cosmos3.parallel.mesh import Mesh
from whole_requests import Process, Rank, usual_layouts
from whole_tables import REPLICAS, beside, line, print_tables

ALONE = Mesh(**{name: Axis(name, 1, 0, None) for name in ("cfg", "ulysses", "tp", "world")})
ROWS = ["t2i-256p", "t2v-256p"]
FOUR_STEPS = {
    "prompt": "a boat", "size": "128x96", "num_frames": 9, "num_inference_steps": 4, "seed": 1,
}  # fmt: skip


def both_layouts(mesh: Mesh, folder: Path, shared: Path, argv: list[str]) -> dict[str, Any]:
    """The report of a rank that makes requests alone, and then as one of a mesh."""
    args = whole_requests.parse([str(folder), *argv])
    args.folder, args.json = shared, shared / "kept.json"
    process = Process(
        rank=mesh.world.rank,
        args=args,
        config=read_config(folder),
        rates=Rates(product=1e12, attention=1e12, read=1e12),
        meeting=Meeting(shared / "meeting", mesh.world.size),
        report={"refused": [], "rows": []},
    )
    for layout, own in zip(args.layouts, (ALONE, mesh), strict=True):
        shared_out = {} if layout == REPLICAS else degrees(layout)
        config = EngineConfig(model=folder, dtype="float32", device="cpu", **shared_out)
        process.measure_layout(layout, Pipeline.load(config, own, "cpu"))
    return process.report


def test_two_replicas_and_a_mesh_of_two(
    ranks: Ranks, tiny_checkpoint_fp32: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = ["--device", "cpu", "--devices", "2", "--layouts", REPLICAS, "1x2x1", "--rows", *ROWS]
    argv += ["--frames", "5", "--tokens", "20", "30", "--num-inference-steps", "8", "--graphs"]
    argv += ["--measured-steps", "2", "--measured-rows", *ROWS, "--in-full", "1x2x1", "--save"]
    argv += ["--profile", "t2i-256p", "--repeat", "2"]
    report, other = ranks(
        ParallelConfig(ulysses_degree=2), both_layouts, tiny_checkpoint_fp32, tmp_path, argv
    )
    assert report == json.loads((tmp_path / "kept.json").read_text())
    assert report["refused"] == other["rows"] == []
    found = [(row["layout"], row["row"]["name"], row["graphs"]) for row in report["rows"]]
    assert found == [
        *((REPLICAS, name, False) for name in ROWS),
        *(("1x2x1", name, graphs) for name in ROWS for graphs in (False, True)),
    ]
    for row in report["rows"]:
        alone, video = row["layout"] == REPLICAS, row["row"]["name"] == "t2v-256p"
        assert (row["model"], row["devices"], len(row["peaks"])) == ("tiny", 2, 2)
        assert row["apart"] == 0 if alone else row["apart"] < 1e-5
        assert row["check"]["steps"] == 8
        assert len(row["row"]["runs"]) == 2
        assert row["row"]["measured_steps"] == (2 if alone else None)
        assert row["recordings"] == 0  # on a CPU, wherever they are allowed
        assert (
            row["gpu_seconds"] <= row["seconds"]
            if alone
            else (row["gpu_seconds"] == 2 * row["seconds"])
        )
        assert ("smooth" in row) == (row["row"]["save"] is not None) == (alone and video)
        assert ("profiles" in row) == (not alone and row["row"]["name"] == "t2i-256p")
        assert ("hand_over" in row) == (not alone and video)
    printed = capfd.readouterr().out
    assert "| t2v-256p | 2 replicas | 8 (2 measured) | ~" in printed
    assert "| t2v-256p | 1x2x1, graphs allowed | 8 | " in printed
    assert "| equal after 8 steps |" in printed


def sent_on(mesh: Mesh, folder: Path, shared: Path) -> Communication:
    """What the rank gives to its neighbours for a request of four steps."""
    asked = list[tuple[float, int]]()

    def counted(name: str, share: Callable[[Any], float]) -> Any:
        function = getattr(dist, name)

        def call(*arguments: Any, **options: Any) -> Any:
            asked.append((share(arguments), 1))
            return function(*arguments, **options)

        return patch.object(dist, name, call)

    with (
        counted("all_to_all_single", lambda given: given[1].nbytes / 2),
        counted("all_gather", lambda given: given[1].nbytes),
        counted("all_reduce", lambda given: given[0].nbytes),
        counted("batch_isend_irecv", lambda given: given[0][0].tensor.nbytes),  # of one neighbour
    ):
        config = EngineConfig(model=folder, dtype="float32", device="cpu", ulysses_degree=2)
        pipeline = Pipeline.load(config, mesh, "cpu")
        asked.clear()
        Rank(pipeline, Meeting(shared / "two", 2), Collectives()).generate(FOUR_STEPS)
    return Communication(sent=sum(sent for sent, _ in asked), count=len(asked))


def counted_alone(mesh: Mesh, folder: Path, shared: Path) -> Communication:
    """The same of a rank without neighbours, in a request of two steps."""
    collectives = Collectives()
    parallel = ParallelConfig(ulysses_degree=2)
    with collectives.in_place():
        config = EngineConfig(model=folder, dtype="float32", device="cpu", ulysses_degree=2)
        pipeline = Pipeline.load(config, first_rank(mesh, parallel), "cpu")
        model = Rank(pipeline, Meeting(shared / "one", 1), collectives)
        output = model.generate({**FOUR_STEPS, "num_inference_steps": 2})
    assert output.video is not None
    assert output.video.shape == (9, 96, 128, 3)
    return collectives.of_request(4)


def test_a_rank_alone_counts_what_it_would_send(
    ranks: Ranks, tiny_checkpoint_fp32: Path, tmp_path: Path
) -> None:
    real, _ = ranks(ParallelConfig(ulysses_degree=2), sent_on, tiny_checkpoint_fp32, tmp_path)
    (alone,) = ranks(ParallelConfig(), counted_alone, tiny_checkpoint_fp32, tmp_path)
    assert alone == real
    assert alone.count > 4 * 2 * 2 * 2  # steps, branches, layers, both ways
    link = Link(bandwidth=alone.sent, latency=0.5)
    assert alone.seconds(link) == 1 + 0.5 * alone.count


def test_one_rank_of_four_on_one_device(
    tiny_checkpoint_fp32: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "report.json"
    argv = [str(tiny_checkpoint_fp32), "--device", "cpu", "--devices", "4", "--one-rank"]
    argv += ["--rows", "t2v-256p", "--frames", "5", "--tokens", "20", "30", "--json", str(file)]
    argv += ["--num-inference-steps", "3", "--dtype", "float32", "--link-us", "1000"]
    assert whole_requests.main(argv) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [(row["layout"], row["devices"]) for row in rows] == [("2x2x1", 4), ("1x4x1", 4)]
    for row in rows:
        own, sent = row["row"]["warm"]["total"], row["communication"]
        assert sent["seconds"] == pytest.approx(sent["sent"] / 300e9 + sent["count"] / 1000)
        assert row["seconds"] == own + sent["seconds"]
        assert row["gpu_seconds"] == 4 * row["seconds"]
    printed = capfd.readouterr().out
    assert "| t2v-256p | one rank of 1x4x1 | 3 | ~" in printed
    assert (
        "| request | layout | compute s | sent GB | calls | communication s | total s |" in printed
    )


def made(layout: str, devices: int, seconds: float, **more: Any) -> dict[str, Any]:
    """A row of a report on Nano."""
    names = ("text", "denoise", "vae_encode", "vae_decode", "tail")
    row = {"name": "t2v-720p", "steps": 35, "step_p50": 1.0, "save": None, "measured_steps": None}
    return {
        "model": "nano", "layout": layout, "devices": devices, "seconds": seconds,
        "gpu_seconds": seconds, "floor": 1.0, "peaks": [2**30] * devices, "apart": 0.08,
        "graphs": False, "recordings": 0, "check": {"steps": 3}, "as_published": True,
        "row": row | {"warm": dict.fromkeys(names, 1.0)}, **more,
    }  # fmt: skip


def test_the_fastest_layout_stands_beside_each_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [made(REPLICAS, 4, 190.0), made("1x4x1", 4, 51.0), made("2x2x1", 4, 50.0, recordings=2)]
    table = beside(rows)
    alone = [text for text in table if "| t2v-720p | 1 | 190.00 | 4 replicas |" in text]
    shared = [text for text in table if "| t2v-720p | 4 | 50.00 | 2x2x1, graphs |" in text]
    assert len(alone) + len(shared) == len(table) - 2
    assert [text.split(" | ")[5] for text in shared] == ["57.8", "62.82", "63.27", "66.94", "67.48"]
    assert "| 57.8 | 1.16 | SGLang | H200 | sgl-project/sglang#27037 |" in shared[0]
    assert "| 1.0, 1.0, 1.0, 1.0 | 8.0e-02 apart after 3 steps |" in line(rows[1])
    file = tmp_path / "report.json"
    file.write_text(json.dumps({"rows": rows[:1]}))
    assert whole_requests.main(["--table", str(file), str(file)]) == 0
    assert capsys.readouterr().out.count("| t2v-720p | 4 replicas |") == 2
    others = [made("1x4x1", 4, 1.0, model="tiny"), made("1x4x1", 4, 1.0, as_published=False)]
    print_tables(others)  # of whose like nobody has published anything
    assert "published" not in capsys.readouterr().out


def test_records_are_of_rows_that_can_be_measured() -> None:
    found = {
        (each.model, each.row, each.gpus, each.gpu, each.engine): each.seconds
        for each in records()
        if each.source == NVIDIA
    }
    assert len(found) == len(records()) - len(ELSEWHERE)
    assert found["nano", "t2v-256p", 8, "H200", "vLLM-Omni"] == 3.42
    assert found["super", "t2v-720p", 4, "H200", "PyTorch"] == 224.43
    assert set(whole_requests.WHOLE) < {each.row for each in records()}


def test_layouts_of_a_machine() -> None:
    assert usual_layouts(4, guided=True) == [REPLICAS, "2x2x1", "1x4x1"]
    assert usual_layouts(4, guided=False) == [REPLICAS, "1x4x1"]
    assert usual_layouts(1, guided=True) == [REPLICAS]


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ("2x1x1", "layouts is '2x1x1', must be replicas, or cfg x ulysses x tp of 4 ranks"),
        ("2x2", "layouts is '2x2', must be replicas, or cfg x ulysses x tp"),
        ("2x2x1 --in-full 1x4x1", "in-full is '1x4x1', must be one of 2x2x1"),
        ("4x1x1", "cfg_parallel_size is 4, must be 1 or 2 (guidance has two branches)"),
        ("1x1x4 --one-rank", "must be cfg x ulysses x 1 where one rank is asked for"),
        (f"{REPLICAS} --one-rank", "must be cfg x ulysses x 1 where one rank is asked for"),
    ],
)
def test_a_layout_that_cannot_be_is_refused_before_anything_starts(
    tiny_checkpoint_fp32: Path, capsys: pytest.CaptureFixture[str], layout: str, words: str
) -> None:
    argv = [str(tiny_checkpoint_fp32), "--device", "cpu", "--devices", "4"]
    argv += ["--layouts", *layout.split()]
    assert whole_requests.main(argv) == 2
    assert words in capsys.readouterr().err
    assert torch.distributed.is_initialized() is False
