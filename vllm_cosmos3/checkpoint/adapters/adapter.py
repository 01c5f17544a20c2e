"""A LoRA adapter as it is known to a checkpoint: which matrices it changes, and by which factors. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """The change of one matrix: names and files of its tensors. ``magnitude`` is DoRA's, if it is one.

    ``factor`` is what B @ A is multiplied with.
    """

    a: str
    b: str
    magnitude: str | None
    file: Mapping[str, Path]
    rank: int
    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A LoRA adapter of a checkpoint. ``pairs`` are its changes by the tensor that they change.

    ``digest`` stands for all that it adds: two adapters that have the same are the same.
    """

    name: str
    scale: float
    dialect: str
    digest: str
    pairs: Mapping[str, Pair]

    def record(self) -> dict[str, object]:
        """What an answer says of it, as JSON."""
        ranks = {pair.rank for pair in self.pairs.values()}
        return {
            "name": self.name,
            "scale": self.scale,
            "dialect": self.dialect,
            "matrices": len(self.pairs),
            "rank": max(ranks),
            "sha256": self.digest,
        }
