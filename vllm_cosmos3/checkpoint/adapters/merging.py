"""Merging of LoRA adapters into matrices: in float32, rounded once to the type of the matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_cosmos3.checkpoint.adapters.adapter import Adapter, Pair
from vllm_cosmos3.checkpoint.adapters.reading import load_tensor


@dataclass(frozen=True, slots=True)
class Merging:
    """What the tensors of ``transformer/`` become with these adapters, which add up.

    Whole matrices are merged, on ``device``, before they are shared among ranks.
    """

    adapters: Sequence[Adapter]
    device: torch.device

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor by its name in the checkpoint, itself where nothing changes it."""
        pairs = [adapter.pairs[name] for adapter in self.adapters if name in adapter.pairs]
        if not pairs:
            return tensor
        base = tensor.to(self.device, torch.float32)
        merged = base.clone()
        for pair in pairs:
            merged += self._change(pair, base)
        return merged.to(tensor.dtype)

    def _change(self, pair: Pair, base: Tensor) -> Tensor:
        """What an adapter adds to a matrix [out, in]."""
        change = (self._read(pair, pair.b) @ self._read(pair, pair.a)).mul_(pair.factor)
        if pair.magnitude is None:
            return change
        # DoRA: the rows of the sum get the lengths that were trained.
        rows = change.add_(base)
        lengths = self._read(pair, pair.magnitude) / torch.linalg.vector_norm(rows, dim=1)
        return rows.mul_(lengths.unsqueeze(1)).sub_(base)

    def _read(self, pair: Pair, name: str) -> Tensor:
        value: Tensor = load_tensor(pair.file[name], name)
        return value.to(self.device, torch.float32)
