"""Division of a plane of positions among ranks: exact strips, or overlapping tiles. Loads no torch.

`divide` is the whole plan: the parts of the plane that this rank computes, each with the weight of
its positions in the sum over all ranks. A strip is exact because a convolution asks its neighbours
for the rows it lacks and attention gathers, see `halo`; a tile knows nothing of its surroundings and is
blended with its neighbours.

Strips lie along the longer axis alone. Against a grid, that needs two neighbours instead of eight
and no corners, the rows sent are the short ones, and 80 latent columns deal out more evenly than
45 rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from vllm_cosmos3.parallel.axis import WHOLE, Axis

if TYPE_CHECKING:
    from torch import Tensor

Span = tuple[int, int]  # start and stop

VAE_PARALLEL = ("halo", "tile", "off")
TILE = 32  # positions along a side. Every tile computes its overlap again: 1.2x at 45 x 80
OVERLAP = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Strips:
    """One strip per rank of ``axis`` along ``dim`` of BCTHW tensors, in rank order.

    ``spans`` cut the coarsest plane. A finer plane is cut at the same places, so the scale is read
    off the tensor, and every strip stays even on the way through factors of two.
    """

    axis: Axis
    dim: int
    spans: tuple[Span, ...]

    def added(self, rows: int) -> int:
        """The number of ``rows`` beyond a border that `surround` adds: none where nothing is divided."""
        return rows if self.axis.size > 1 else 0

    def padding(self, margin: int) -> tuple[int, int]:
        """Zeros that a convolution after `surround` still has to add along height and width."""
        missing = margin - self.added(margin)
        return (missing, margin) if self.dim == 3 else (margin, missing)


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


def _whole(height: int, width: int) -> Strips:
    return Strips(axis=WHOLE, dim=3, spans=((0, height),))
