"""Every position of a plane is computed once, or blended with weights that sum to one."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from ranks import Ranks
from torch import Tensor

from vllm_cosmos3.engine_options import ParallelConfig
from vllm_cosmos3.parallel.axis import WHOLE, Axis
from vllm_cosmos3.parallel.halo import add_to, gather_strips, ramp, surround, take_strip
from vllm_cosmos3.parallel.mesh import Mesh
from vllm_cosmos3.parallel.plane import (
    OVERLAP,
    VAE_PARALLEL,
    Part,
    Strips,
    divide,
    even,
    overlapping,
)

extents = st.integers(1, 200)
CPU = torch.device("cpu")


def all_parts(height: int, width: int, ranks: int, mode: str, tile: int) -> list[Part]:
    axes = [Axis("world", ranks, rank, None) for rank in range(ranks)]
    return [part for axis in axes for part in divide(height, width, axis, mode, tile)]


@given(extents, st.integers(1, 16))
def test_even_spans_cover_and_differ_by_one(extent: int, parts: int) -> None:
    spans = even(extent, parts)
    lengths = [stop - start for start, stop in spans]
    assert [position for start, stop in spans for position in range(start, stop)] == list(
        range(extent)
    )
    assert max(lengths) - min(lengths) <= 1


@given(extents, st.sampled_from([16, 20, 32, 64]))
def test_tiles_are_balanced_and_share_the_overlap(extent: int, tile: int) -> None:
    spans = [span for span, _ in overlapping(extent, tile)]
    lengths = [stop - start for start, stop in spans]
    assert (spans[0][0], spans[-1][1]) == (0, extent)
    assert max(lengths) <= tile
    assert max(lengths) - min(lengths) <= 1
    for (_, stop), (start, _) in pairwise(spans):
        assert stop - start == OVERLAP
    for (_, stop), (start, _) in zip(spans, spans[2:], strict=False):
        assert stop <= start


@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    ranks=st.integers(1, 8),
    mode=st.sampled_from(VAE_PARALLEL),
    tile=st.sampled_from([16, 32]),
    scale=st.sampled_from([1, 2, 16]),
)
def test_weights_sum_to_one(
    height: int, width: int, ranks: int, mode: str, tile: int, scale: int
) -> None:
    canvas = torch.zeros(scale * height, scale * width)
    for part in all_parts(height, width, ranks, mode, tile):
        add_to(canvas, part, torch.ones_like(part.cut(canvas, scale)), scale)
    assert torch.allclose(canvas, torch.ones_like(canvas), atol=1e-6)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 8))
def test_strips_lie_along_the_longer_axis(height: int, width: int, ranks: int) -> None:
    parts = all_parts(height, width, ranks, "halo", 32)
    if ranks > max(height, width):
        assert [(part.rows, part.columns) for part in parts] == [((0, height), (0, width))]
        return
    assert len(parts) == ranks
    assert (
        sum((p.rows[1] - p.rows[0]) * (p.columns[1] - p.columns[0]) for p in parts)
        == height * width
    )
    assert len({part.rows if height < width else part.columns for part in parts}) == 1


def test_ramp_is_linear_and_symmetric() -> None:
    weights = ramp((3, 9), (2, 2), 2, CPU)
    assert weights.tolist() == [0.125, 0.375, 0.625, 0.875, 1, 1, 1, 1, 0.875, 0.625, 0.375, 0.125]


def test_one_strip_gets_no_rows_and_leaves_all_borders_to_the_convolution() -> None:
    (part,) = divide(3, 4, WHOLE, "halo")
    x, past = torch.randn(1, 2, 2, 3, 4), torch.randn(1, 2, 1, 3, 4)
    expected = torch.cat([past, x], dim=2)
    assert torch.equal(surround(part.strips, x, 1, 1, 1, past), expected)
    assert torch.equal(surround(part.strips, x, 1, 1, 2), F.pad(x, (0, 0, 0, 0, 2, 0)))
    assert part.strips.padding(1) == (1, 1)
    plane = torch.randn(2, 5, 3, 4)
    assert torch.equal(gather_strips(part.strips, plane), plane)
    assert torch.equal(take_strip(part.strips, plane), plane)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_surrounding_keeps_the_memory_format(layout: torch.memory_format) -> None:
    (part,) = divide(3, 4, WHOLE, "halo")
    x = torch.randn(1, 2, 3, 3, 4).contiguous(memory_format=layout)
    assert surround(part.strips, x, 1, 0).is_contiguous(memory_format=layout)


# Several ranks


def own_strip(mesh: Mesh, x: Tensor, scale: int) -> tuple[Tensor, Strips]:
    (part,) = divide(x.shape[3] // scale, x.shape[4] // scale, mesh.world, "halo")
    return part.cut(x, scale), part.strips


def surrounded(mesh: Mesh, x: Tensor, scale: int, before: int, after: int) -> Tensor:
    own, strips = own_strip(mesh, x, scale)
    return surround(strips, own, before, after)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (0, 1), (2, 0), (0, 0)])
@pytest.mark.parametrize(("height", "width"), [(7, 5), (5, 7)])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_neighbours_rows_are_found(
    ranks: Ranks, size: int, height: int, width: int, before: int, after: int
) -> None:
    x = torch.randn(1, 2, 3, 2 * height, 2 * width)
    dim = 3 if height > width else 4
    pad = (before, after) if dim == 4 else (0, 0, before, after)
    padded = x if size == 1 else F.pad(x, pad)
    added = before + after if size > 1 else 0
    results = ranks(ParallelConfig(ulysses_degree=size), surrounded, x, 2, before, after)
    for (start, stop), result in zip(even(max(height, width), size), results, strict=True):
        expected = padded.narrow(dim, 2 * start, 2 * (stop - start) + added)
        assert torch.equal(result, expected)


def gathered(mesh: Mesh, x: Tensor) -> tuple[Tensor, bool]:
    own, strips = own_strip(mesh, x, 1)
    plane = gather_strips(strips, own[0])
    return plane, torch.equal(take_strip(strips, plane), own[0])


@pytest.mark.parametrize(("height", "width"), [(7, 5), (5, 7)])
def test_gather_gives_the_plane_and_own_the_strip(ranks: Ranks, height: int, width: int) -> None:
    x = torch.arange(2.0 * 3 * height * width).view(1, 2, 3, height, width)
    for plane, again in ranks(ParallelConfig(ulysses_degree=3), gathered, x):
        assert torch.equal(plane, x[0])
        assert again
