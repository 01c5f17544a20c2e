"""The mesh: group membership, the collectives against plain slicing, legal degrees."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from limits import HANG
from ranks import Ranks

from vllm_cosmos3.checkpoint.config import TransformerConfig
from vllm_cosmos3.engine_options import ParallelConfig
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.parallel import mesh as m
from vllm_cosmos3.parallel.axis import Axis
from vllm_cosmos3.parallel.checks import check_degrees

HEADS, WIDTH = 4, 3


def parallel(cfg: int, ulysses: int, tp: int) -> ParallelConfig:
    return ParallelConfig(cfg_parallel_size=cfg, ulysses_degree=ulysses, tensor_parallel_size=tp)


def transformer(**changes: int) -> TransformerConfig:
    values = {field.name: None for field in dataclasses.fields(TransformerConfig)}
    values |= {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 128}
    return TransformerConfig(**(values | changes))


def tokens(length: int) -> torch.Tensor:
    return torch.arange(length * HEADS * WIDTH, dtype=torch.float32).view(length, HEADS, WIDTH) + 1


def position(mesh: m.Mesh) -> dict[str, tuple[int, int]]:
    from vllm.distributed import (
        get_tensor_model_parallel_rank,
        get_tensor_model_parallel_world_size,
    )

    seen = {a.name: (a.rank, a.size) for a in (mesh.cfg, mesh.ulysses, mesh.tp, mesh.world)}
    return seen | {
        "vllm": (get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size())
    }


def world_ranks(mesh: m.Mesh) -> dict[str, list[int]]:
    me = torch.tensor(mesh.world.rank)
    return {
        axis.name: [int(rank) for rank in m.all_gather(me, axis)]
        for axis in (mesh.cfg, mesh.ulysses, mesh.tp, mesh.world)
    }


def collectives(mesh: m.Mesh, length: int, dtype: torch.dtype) -> None:
    """Every collective on the Ulysses axis gives what slicing the replicated tensor gives."""
    axis = mesh.ulysses
    x_SHD = tokens(length).to(dtype)
    own = -(-length // axis.size)
    padded = torch.cat([x_SHD, x_SHD.new_zeros(own * axis.size - length, HEADS, WIDTH)])
    x_sHD = m.shard_sequence(x_SHD, axis)
    assert torch.equal(x_sHD, padded[axis.rank * own :][:own])
    assert torch.equal(m.gather_sequence(x_sHD, axis, length), x_SHD)
    x_ShD = m.scatter_heads(x_sHD, axis)
    assert torch.equal(x_ShD, m.own_heads(padded, axis))
    assert torch.equal(m.gather_heads(x_ShD, axis), x_sHD)


def tensor_parallel_layers(mesh: m.Mesh) -> torch.Tensor:
    """A two-layer network cut by vLLM's layers, as far as it gives the same on every rank."""
    from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear

    weights = torch.Generator().manual_seed(0)
    with m.building_layers(mesh):
        up = ColumnParallelLinear(8, 16, bias=False)
        down = RowParallelLinear(16, 8, bias=False)
    for layer, shape in ((up, (16, 8)), (down, (8, 16))):
        layer.weight_loader(layer.weight, torch.randn(shape, generator=weights))
        layer.quant_method.process_weights_after_loading(layer)
    with torch.inference_mode():
        return down(up(torch.linspace(-1, 1, 16).view(2, 8))[0])[0]


def steps(mesh: m.Mesh, folder: Path) -> list[bool]:
    """At one place, at two places, and where the last rank comes too late."""
    last, cpu = mesh.world.rank == mesh.world.size - 1, torch.device("cpu")
    together = m.barrier(1, mesh.world, cpu, HANG)
    apart = m.barrier(2 + last, mesh.world, cpu, HANG)
    gone = folder / "gone"
    while last and not gone.exists():
        time.sleep(0.01)
    late = m.barrier(4, mesh.world, cpu, HANG if last else 0.2)
    gone.touch()
    return [together, apart, late]


@pytest.mark.parametrize("shape", [(1, 1, 2), (1, 2, 1), (2, 1, 1), (1, 2, 2), (2, 2, 1)])
def test_rank_is_cfg_then_ulysses_then_tp(shape: tuple[int, int, int], ranks: Ranks) -> None:
    grid = torch.arange(parallel(*shape).world_size).view(shape)
    seen = ranks(parallel(*shape), position)
    lines = ranks(parallel(*shape), world_ranks)
    for rank, (where, line) in enumerate(zip(seen, lines, strict=True)):
        cfg, ulysses, tp = ((grid == rank).nonzero()[0]).tolist()
        assert where == {
            "cfg": (cfg, shape[0]),
            "ulysses": (ulysses, shape[1]),
            "tp": (tp, shape[2]),
            "world": (rank, grid.numel()),
            "vllm": (tp, shape[2]),
        }
        assert line == {
            "cfg": grid[:, ulysses, tp].tolist(),
            "ulysses": grid[cfg, :, tp].tolist(),
            "tp": grid[cfg, ulysses].tolist(),
            "world": grid.flatten().tolist(),
        }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 3, 8, 13])
@pytest.mark.parametrize("shape", [(1, 2, 1), (1, 4, 1), (1, 2, 2)])
def test_collectives_equal_slicing(
    shape: tuple[int, int, int], length: int, dtype: torch.dtype, ranks: Ranks
) -> None:
    ranks(parallel(*shape), collectives, length, dtype)


def test_collectives_are_the_identity_at_size_one() -> None:
    alone = Axis("ulysses", 1, 0, None)
    x = tokens(5)
    assert m.shard_sequence(x, alone) is x
    assert m.gather_sequence(x, alone, 5) is x
    assert m.scatter_heads(x, alone) is x
    assert m.gather_heads(x, alone) is x
    assert m.own_heads(x, alone) is x
    assert m.all_gather(x, alone)[0] is x


def test_ranks_know_whether_they_are_in_step(ranks: Ranks, tmp_path: Path) -> None:
    first, last = ranks(parallel(1, 2, 1), steps, tmp_path)
    assert first == [True, False, False]
    assert last == [True, False, True]


def test_vllm_layers_on_a_mesh_equal_one_rank(ranks: Ranks) -> None:
    (reference,) = ranks(parallel(1, 1, 1), tensor_parallel_layers)
    for result in ranks(parallel(1, 2, 2), tensor_parallel_layers):
        assert torch.allclose(result, reference, atol=1e-6)


def test_one_rank_can_close_and_start_again_in_one_process() -> None:
    for _ in range(3):
        mesh = m.init_mesh(ParallelConfig())
        assert mesh.world == Axis("world", 1, 0, None)
        reference = tensor_parallel_layers(mesh)
        m.close_mesh(mesh)
        assert not torch.distributed.is_initialized()
    assert reference.shape == (2, 8)


def test_several_ranks_need_a_meeting_place() -> None:
    with pytest.raises(ValueError, match="init_method"):
        m.init_mesh(parallel(1, 2, 1))


@given(
    st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 2, 4, 6, 8]), st.sampled_from([6, 8])
)
@settings(deadline=None)
def test_a_mesh_is_legal_when_every_rank_has_whole_heads(
    tp: int, ulysses: int, kv_heads: int, intermediate: int
) -> None:
    config = transformer(num_key_value_heads=kv_heads, intermediate_size=intermediate)
    legal = kv_heads % (tp * ulysses) == 0 and intermediate % tp == 0
    degrees = {"tensor_parallel_size": tp, "ulysses_degree": ulysses}
    if legal:
        check_degrees(parallel(1, ulysses, tp), config)
        return
    with pytest.raises(InvalidRequest) as refusal:
        check_degrees(parallel(1, ulysses, tp), config)
    assert refusal.value.value == degrees[refusal.value.field]
    assert "1" in refusal.value.possible


@pytest.mark.parametrize(
    ("shape", "devices", "message"),
    [
        (
            (1, 1, 3),
            None,
            "tensor_parallel_size is 3, must be 1, 2 or 4 (4 key-value heads)",
        ),
        (
            (1, 4, 2),
            None,
            "ulysses_degree is 4, must be 1 or 2 (tensor_parallel_size is 2, 4 key-value heads)",
        ),
        ((3, 1, 1), None, "cfg_parallel_size is 3, must be 1 or 2 (guidance has two branches)"),
        (
            (2, 2, 2),
            4,
            "tensor_parallel_size x cfg_parallel_size x ulysses_degree is 8, "
            "must be at most 4, the number of devices",
        ),
    ],
)
def test_refusals_name_the_legal_values(
    shape: tuple[int, int, int], devices: int | None, message: str
) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        check_degrees(parallel(*shape), transformer(), devices=devices)
    assert str(refusal.value) == message
