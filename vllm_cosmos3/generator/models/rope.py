"""Rotary tables, and the rotation of queries and keys. Shape suffixes are those of `transformer`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rope:
    """Rotary tables of this rank's tokens, and the length of the whole sequence of one branch.

    ``table`` [B s, 2 F] holds the cosines, then the sines; ``rows`` [B s] counts its rows, as
    vLLM's kernel wants to be told which row each token takes. ``controls`` are tokens and share of
    those streams, first in the sequence, that the others attend to in turn.
    """

    table: Tensor
    rows: Tensor
    length: int
    controls: tuple[tuple[int, float], ...] = ()


def rotate(x_SHD: Tensor, rope: Rope) -> Tensor:
    """Turn each pair (i, i + D/2) of every head by its token's angle."""
    first, second = x_SHD.chunk(2, dim=-1)
    cos, sin = rope.table.unsqueeze(1).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
