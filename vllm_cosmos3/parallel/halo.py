"""Planes of positions that ranks have divided: rows of neighbours, planes gathered, tiles blended.

How they are divided is in `plane`.

Shape suffixes: B batch, C channels, T frames, H height, W width, S positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vllm_cosmos3.parallel.axis import Axis
from vllm_cosmos3.parallel.mesh import all_gather
from vllm_cosmos3.parallel.plane import Part, Span, Strips

# Writes into its first argument what it makes of the second.
Fill = Callable[[Tensor, Tensor], object]


def surround(
    strips: Strips,
    x: Tensor,
    before: int,
    after: int,
    frames: int = 0,
    past: Tensor | None = None,
    through: Fill = Tensor.copy_,
) -> Tensor:
    """``x`` with rows of the neighbouring strips on both sides and ``frames`` of ``past`` in front.

    Rows beyond the true border are zero; an undivided plane gets none, see `padding`. ``past``
    has its rows already; frames are zero where there is none. ``through`` writes what it makes of
    ``x`` into one new buffer, since convolutions would otherwise be preceded by two copies.
    """
    before, after = strips.added(before), strips.added(after)
    shape = list(x.shape)
    shape[2] += frames
    shape[strips.dim] += before + after
    layout = memory_format(x)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    _fill(out.narrow(2, 0, frames), past)
    present = out.narrow(2, frames, x.shape[2])
    rows = x.shape[strips.dim]
    own = present.narrow(strips.dim, before, rows)
    through(own, x)
    above, below = exchange_halo(own, strips.dim, before, after, strips.axis)
    _fill(present.narrow(strips.dim, 0, before), above)
    _fill(present.narrow(strips.dim, before + rows, after), below)
    return out


def gather_strips(strips: Strips, x_BChw: Tensor) -> Tensor:
    """The coarsest plane [B, C, H, W], of which every rank has its strip."""
    if strips.axis.size == 1:
        return x_BChw
    dim, sizes = strips.dim - 1, [stop - start for start, stop in strips.spans]
    missing = max(sizes) - x_BChw.shape[dim]
    padded = F.pad(x_BChw, (0, missing) if dim == 3 else (0, 0, 0, missing))
    parts = zip(all_gather(padded, strips.axis), sizes, strict=True)
    return torch.cat([part.narrow(dim, 0, size) for part, size in parts], dim=dim)


def take_strip(strips: Strips, x_BCHW: Tensor) -> Tensor:
    """This rank's strip of the coarsest plane: the inverse of `gather_strips`."""
    if strips.axis.size == 1:
        return x_BCHW
    start, stop = strips.spans[strips.axis.rank]
    return x_BCHW.narrow(strips.dim - 1, start, stop - start)


def add_to(canvas: Tensor, part: Part, x: Tensor, scale: int = 1) -> None:
    """Blend ``x`` into ``canvas``. Over all parts of all ranks the weights of a position sum to one."""
    down = ramp(part.rows, part.fade_rows, scale, x.device)
    across = ramp(part.columns, part.fade_columns, scale, x.device)
    part.cut(canvas, scale).addcmul_(x.to(canvas.dtype), down[:, None] * across)


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


def memory_format(x: Tensor) -> torch.memory_format:
    """Where the channels of ``x`` [B, C, T, H, W] lie: innermost or not."""
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.channels_last_3d
    return torch.contiguous_format


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


def _fill(place: Tensor, values: Tensor | None) -> None:
    if values is None:
        place.zero_()
    else:
        place.copy_(values)


def _rising(length: int, device: torch.device) -> Tensor:
    return (torch.arange(length, device=device) + 0.5) / max(length, 1)
