"""Keys and values of a session: its text, the clean frames that are remembered, and the frames at work.

Keys have their absolute positions, so frames may lie in any order, and forgetting one moves no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vllm_cosmos3.generator.models.transformer import Extend, TextKV


@dataclass(frozen=True, slots=True)
class Before:
    """What lies before the tokens of one forward: see `transformer.Past`."""

    extends: tuple[Extend, ...]
    nbytes: int


class HistoryKV:
    """A buffer for each layer, [text | remembered frames | frames at work, 2, h, D], this rank's heads.

    The first ``sinks`` frames and the latest ``window`` others are remembered. A frame takes
    ``tokens``; up to ``chunk`` frames are at work at once. ``committed`` counts all that were added.
    """

    def __init__(self, text: TextKV, *, tokens: int, sinks: int, window: int, chunk: int) -> None:
        self._tokens, self._sinks, self._window = tokens, sinks, window
        self._texts: int = text.layers[0].shape[0]
        length = self._texts + tokens * (sinks + window + chunk)
        self._layers = tuple(layer.new_empty(length, *layer.shape[1:]) for layer in text.layers)
        for buffer, layer in zip(self._layers, text.layers, strict=True):
            buffer[: self._texts] = layer
        self.committed = 0

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self._layers)

    def before(self, silent: int) -> Before:
        """The text and what is remembered, before tokens of which the first ``silent`` have values of 0."""
        extends = tuple(partial(self._extend, layer, silent) for layer in self._layers)
        return Before(extends=extends, nbytes=self.nbytes)

    def commit(self, order: Sequence[Tensor]) -> None:
        """Remember the tokens of the last forward; ``order`` has the places of those of each frame.

        Called when every layer has computed them: nothing was changed before.
        """
        for layer in self._layers:
            made = [layer[self._end + places] for places in order]  # copies
            for frame, own in enumerate(made, self.committed):
                start = self._texts + self._tokens * self._slot(frame)
                layer[start : start + self._tokens] = own
        self.committed += len(order)

    def _slot(self, frame: int) -> int:
        """Where a frame lies: that of the oldest one beside the sinks, once all are taken."""
        if frame < self._sinks + self._window:
            return frame
        return self._sinks + (frame - self._sinks) % self._window

    @property
    def _end(self) -> int:
        """Where the frames at work begin."""
        return self._texts + self._tokens * min(self.committed, self._sinks + self._window)

    def _extend(self, layer: Tensor, silent: int, own_S2hD: Tensor) -> Tensor:
        end = self._end
        stop = end + own_S2hD.shape[0]
        # In words of eight bytes: see `transformer._appended`.
        layer[end:stop].view(torch.int64).copy_(own_S2hD.view(torch.int64))
        layer[end : end + silent, 1] = 0
        return layer[:stop]
