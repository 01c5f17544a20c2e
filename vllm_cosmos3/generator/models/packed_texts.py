"""Texts of several samples in one buffer, with room for the tokens behind each: one attention for all.

A copy for each sample and branch, which saves a launch for each in every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from vllm_cosmos3.generator.models.transformer import Extend, TextKV
from vllm_cosmos3.parallel.attention import Sequences


class PackedTexts:
    """A buffer for each layer, [text | tokens | text | tokens ..., 2, h, D]; see `transformer.Packed`.

    Each of the ``texts`` has ``tokens`` generation tokens behind it.
    """

    def __init__(self, texts: Sequence[TextKV], tokens: int) -> None:
        like = texts[0].layers[0]
        lengths = [text.layers[0].shape[0] + tokens for text in texts]
        ends = list(accumulate(lengths))
        places = torch.arange(tokens)
        rows = torch.cat([end - tokens + places for end in ends])
        self._rows = rows.to(like.device)
        self.sequences = Sequences.of([tokens] * len(texts), lengths, like.device)
        self._layers = []
        for layer in zip(*(text.layers for text in texts), strict=True):
            buffer = layer[0].new_empty(ends[-1], *layer[0].shape[1:])
            for end, length, text in zip(ends, lengths, layer, strict=True):
                buffer[end - length : end - tokens] = text
            self._layers.append(buffer)

    @property
    def extends(self) -> tuple[Extend, ...]:
        return tuple(partial(self._extend, layer) for layer in self._layers)

    def _extend(self, layer: Tensor, own_S2hD: Tensor) -> Tensor:
        # In words of eight bytes: see `transformer._appended`.
        layer.view(torch.int64).index_copy_(0, self._rows, own_S2hD.view(torch.int64))
        return layer
