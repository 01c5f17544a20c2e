"""Axis of the mesh of ranks, as one rank sees it. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class Axis:
    """One dimension of the mesh as one rank sees it. ``group`` is None where ``size`` is one."""

    name: str
    size: int
    rank: int  # of this process within the group
    group: dist.ProcessGroup | None


WHOLE = Axis(name="whole", size=1, rank=0, group=None)
