"""Which forwards are recorded as CUDA graphs."""

from __future__ import annotations

import pytest
import torch

from vllm_cosmos3.parallel.axis import Axis
from vllm_cosmos3.parallel.graphs import ON_MESHES, STEPS, TOKENS, launches_matter
from vllm_cosmos3.parallel.mesh import Mesh

GPU = torch.device("cuda")


def mesh(cfg: int, ulysses: int, tp: int) -> Mesh:
    sizes = {"cfg": cfg, "ulysses": ulysses, "tp": tp, "world": cfg * ulysses * tp}
    return Mesh(**{name: Axis(name, size, 0, None) for name, size in sizes.items()})


def test_small_forwards_of_one_gpu_are_recorded() -> None:
    alone = mesh(1, 1, 1)
    assert launches_matter(TOKENS, STEPS, alone, GPU)
    assert not launches_matter(TOKENS + 1, STEPS, alone, GPU)
    assert not launches_matter(TOKENS, STEPS - 1, alone, GPU)
    assert not launches_matter(TOKENS, STEPS, alone, torch.device("cpu"))


@pytest.mark.parametrize(
    ("degrees", "recorded"),
    [
        ((2, 1, 1), True),
        ((1, 4, 1), True),
        ((2, 2, 1), True),
        ((1, 1, 2), False),
        ((1, 2, 2), False),
    ],
)
def test_several_gpus_record_where_they_are_asked_to(
    degrees: tuple[int, int, int], recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ON_MESHES, raising=False)
    assert not launches_matter(60, 35, mesh(*degrees), GPU)
    monkeypatch.setenv(ON_MESHES, "1")
    assert launches_matter(60, 35, mesh(*degrees), GPU) == recorded
    assert not launches_matter(60, 35, mesh(*degrees), torch.device("cpu"))
