"""Division of a plane of positions among ranks: exact strips, or overlapping tiles.

`divide` is the whole plan: the parts of the plane that this rank computes, each with the weight of
its positions in the sum over all ranks. A strip is exact because a convolution asks its neighbours
for the rows it lacks (`Strips.surround`) and attention gathers (`Strips.gather`); a tile knows
nothing of its surroundings and is blended with its neighbours.

Strips lie along the longer axis alone. Against a grid, that needs two neighbours instead of eight
and no corners, the rows sent are the short ones, and 80 latent columns deal out more evenly than
45 rows.

Shape suffixes: B batch, C channels, T frames, H height, W width, S positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vllm_cosmos3.parallel.mesh import Axis, all_gather

Span = tuple[int, int]  # start and stop
Fill = Callable[
    [Tensor, Tensor], object
]  # writes into its first argument what it makes of the second

VAE_PARALLEL = ("halo", "tile", "off")
TILE = 32  # positions along a side. Every tile computes its overlap again: 1.2x at 45 x 80
OVERLAP = 4

WHOLE = Axis(name="whole", size=1, rank=0, group=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Strips:
    """One strip per rank of ``axis`` along ``dim`` of BCTHW tensors, in rank order.

    ``spans`` cut the coarsest plane. A finer plane is cut at the same places, so the scale is read
    off the tensor, and every strip stays even on the way through factors of two.
    """

    axis: Axis
    dim: int
    spans: tuple[Span, ...]

    def surround(
        self,
        x: Tensor,
        before: int,
        after: int,
        past: Tensor | None = None,
        through: Fill = Tensor.copy_,
    ) -> Tensor:
        """``x`` with rows of the neighbouring strips on both sides and ``past`` frames in front.

        Rows beyond the true border are zero; an undivided plane gets none, see `padding`. ``past``
        has its rows already. ``through`` writes what it makes of ``x`` into one new buffer, since
        convolutions would otherwise be preceded by two copies.
        """
        before, after = self.added(before), self.added(after)
        frames = 0 if past is None else past.shape[2]
        shape = list(x.shape)
        shape[2] += frames
        shape[self.dim] += before + after
        layout = _memory_format(x)
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
        if past is not None:
            out.narrow(2, 0, frames).copy_(past)
        present = out.narrow(2, frames, x.shape[2])
        rows = x.shape[self.dim]
        own = present.narrow(self.dim, before, rows)
        through(own, x)
        above, below = exchange_halo(own, self.dim, before, after, self.axis)
        _fill(present.narrow(self.dim, 0, before), above)
        _fill(present.narrow(self.dim, before + rows, after), below)
        return out

    def added(self, rows: int) -> int:
        """The number of ``rows`` beyond a border that `surround` adds: none where nothing is divided."""
        return rows if self.axis.size > 1 else 0

    def padding(self, margin: int) -> tuple[int, int]:
        """Zeros that a convolution after `surround` still has to add along height and width."""
        missing = margin - self.added(margin)
        return (missing, margin) if self.dim == 3 else (margin, missing)

    def gather(self, x_BChw: Tensor) -> Tensor:
        """The coarsest plane [B, C, H, W], of which every rank has its strip."""
        if self.axis.size == 1:
            return x_BChw
        dim, sizes = self.dim - 1, [stop - start for start, stop in self.spans]
        missing = max(sizes) - x_BChw.shape[dim]
        padded = F.pad(x_BChw, (0, missing) if dim == 3 else (0, 0, 0, missing))
        parts = zip(all_gather(padded, self.axis), sizes, strict=True)
        return torch.cat([part.narrow(dim, 0, size) for part, size in parts], dim=dim)

    def own(self, x_BCHW: Tensor) -> Tensor:
        """This rank's strip of the coarsest plane: the inverse of `gather`."""
        if self.axis.size == 1:
            return x_BCHW
        start, stop = self.spans[self.axis.rank]
        return x_BCHW.narrow(self.dim - 1, start, stop - start)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A rectangle of the plane that this rank computes, and how it joins the others.

    ``rows`` and ``columns`` in positions of the coarsest plane; ``fade_*`` how many positions at
    either end are shared with another part.
    """

    rows: Span
    columns: Span
    fade_rows: Span = (0, 0)
    fade_columns: Span = (0, 0)
    strips: Strips

    def cut(self, x: Tensor, scale: int = 1) -> Tensor:
        """This part of a plane [..., H, W] that is ``scale`` times finer than the coarsest."""
        (top, bottom), (left, right) = self.rows, self.columns
        return x[..., top * scale : bottom * scale, left * scale : right * scale]

    def add_to(self, canvas: Tensor, x: Tensor, scale: int = 1) -> None:
        """Blend ``x`` into ``canvas``. Over all parts of all ranks the weights of a position sum to one."""
        down = ramp(self.rows, self.fade_rows, scale, x.device)
        across = ramp(self.columns, self.fade_columns, scale, x.device)
        self.cut(canvas, scale).addcmul_(x.to(canvas.dtype), down[:, None] * across)


def divide(height: int, width: int, axis: Axis, mode: str, tile: int = TILE) -> list[Part]:
    """The parts of a plane that this rank of ``axis`` computes. ``mode`` is one of `VAE_PARALLEL`.

    ``halo``: one strip per rank, equal to computing the whole plane. A plane with fewer rows than
    ranks is computed whole on rank 0, as with ``off``. ``tile``: overlapping tiles of at most
    ``tile`` positions a side, dealt out in turn; approximate, with the memory of one tile.
    """
    if mode == "tile":
        tiles = [
            Part(
                rows=rows,
                columns=columns,
                fade_rows=fade_rows,
                fade_columns=fade_columns,
                strips=_whole(height, width),
            )
            for rows, fade_rows in overlapping(height, tile)
            for columns, fade_columns in overlapping(width, tile)
        ]
        return tiles[axis.rank :: axis.size]
    if mode == "halo" and axis.size <= max(height, width):
        dim = 3 if height >= width else 4
        strips = Strips(axis=axis, dim=dim, spans=tuple(even(max(height, width), axis.size)))
        own = strips.spans[axis.rank]
        rows, columns = (own, (0, width)) if dim == 3 else ((0, height), own)
        return [Part(rows=rows, columns=columns, strips=strips)]
    whole = Part(rows=(0, height), columns=(0, width), strips=_whole(height, width))
    return [whole] if axis.rank == 0 else []


def even(extent: int, parts: int) -> list[Span]:
    """``parts`` consecutive spans of 0..extent whose lengths differ by at most one."""
    cuts = [extent * index // parts for index in range(parts + 1)]
    return list(pairwise(cuts))


def overlapping(extent: int, tile: int, overlap: int = OVERLAP) -> list[tuple[Span, Span]]:
    """Spans of at most ``tile`` that share ``overlap`` positions with the next, and their fades.

    The lengths differ by at most one. No position lies in three spans when tile >= 4 * overlap.
    """
    count = max(1, math.ceil((extent - overlap) / (tile - overlap)))
    if count == 1:
        return [((0, extent), (0, 0))]
    spans = [(start, stop + overlap) for start, stop in even(extent - overlap, count)]
    last = count - 1
    return [
        (span, (overlap * (index > 0), overlap * (index < last)))
        for index, span in enumerate(spans)
    ]


def ramp(span: Span, fade: Span, scale: int, device: torch.device) -> Tensor:
    """Weights of ``span`` at ``scale``: one in the middle, linear over the positions that are shared."""
    start, stop = span
    weights = torch.ones((stop - start) * scale, device=device)
    rise, fall = fade[0] * scale, fade[1] * scale
    weights[:rise] = _rising(rise, device)
    weights[len(weights) - fall :] = 1 - _rising(fall, device)
    return weights


def exchange_halo(
    x: Tensor, dim: int, before: int, after: int, axis: Axis
) -> tuple[Tensor | None, Tensor | None]:
    """The last ``before`` rows of the previous rank and the first ``after`` rows of the next.

    None where there is no such rank or nothing is asked. Each rank must hold that many rows.
    """
    rows = x.shape[dim]
    above = _receive(x, dim, before) if before and axis.rank > 0 else None
    below = _receive(x, dim, after) if after and axis.rank < axis.size - 1 else None
    operations = []
    if axis.rank > 0:
        operations += _talk(axis, axis.rank - 1, x.narrow(dim, 0, after), above)
    if axis.rank < axis.size - 1:
        operations += _talk(axis, axis.rank + 1, x.narrow(dim, rows - before, before), below)
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
    return above, below


def sum_over(canvas: Tensor, axis: Axis) -> Tensor:
    """The sum of every rank's canvas, on every rank."""
    if axis.size > 1:
        dist.all_reduce(canvas, group=axis.group)
    return canvas


def _whole(height: int, width: int) -> Strips:
    return Strips(axis=WHOLE, dim=3, spans=((0, height),))


def _talk(axis: Axis, peer: int, outgoing: Tensor, incoming: Tensor | None) -> list[dist.P2POp]:
    assert axis.group is not None, "an axis of several ranks has a group"
    rank = dist.get_global_rank(axis.group, peer)
    operations = []
    if outgoing.numel():
        operations.append(dist.P2POp(dist.isend, outgoing.contiguous(), rank, axis.group))
    if incoming is not None:
        operations.append(dist.P2POp(dist.irecv, incoming, rank, axis.group))
    return operations


def _receive(x: Tensor, dim: int, rows: int) -> Tensor:
    shape: Sequence[int] = [*x.shape[:dim], rows, *x.shape[dim + 1 :]]
    return x.new_empty(shape)


def _fill(rows: Tensor, values: Tensor | None) -> None:
    if values is None:
        rows.zero_()
    else:
        rows.copy_(values)


def _rising(length: int, device: torch.device) -> Tensor:
    return (torch.arange(length, device=device) + 0.5) / max(length, 1)


def _memory_format(x: Tensor) -> torch.memory_format:
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.channels_last_3d
    return torch.contiguous_format
