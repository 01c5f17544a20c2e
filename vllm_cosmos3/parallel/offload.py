"""Layers whose weights rest in the host's memory and visit the device one after the other.

While a layer computes, the next one is copied on a stream of its own: two of them are on the device
at a time. The weights of a layer are one buffer, pinned where the device is a GPU, so that a layer is
one copy at the full speed of the bus. On a CPU the same copies are made, which changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from vllm_cosmos3.parallel.host_copy import padded


class HostLayers:
    """``layers`` in their order. Iterating gives each with its weights on ``device``.

    A layer can be used until the next one is asked for, or the iteration ends. A parameter belongs
    to the host's buffer at all other times, so its values can be read at any time.
    """

    def __init__(self, layers: Iterable[nn.Module], device: torch.device) -> None:
        pinned = device.type == "cuda"
        self._layers = [_Resting(layer, pinned=pinned) for layer in layers]
        self._device = device
        self._stream = torch.cuda.Stream(device) if pinned else None
        self._visiting: _Resting | None = None
        self._iteration = 0

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[nn.Module]:
        self._iteration += 1
        mine = self._iteration
        self._leave()  # an iteration that an error has ended may still be referred to by it
        following = self._fetch(self._layers[0])
        try:
            for index, resting in enumerate(self._layers):
                buffer, event = following
                if index + 1 < len(self._layers):
                    following = self._fetch(self._layers[index + 1])
                if event is not None:
                    torch.cuda.current_stream(self._device).wait_event(event)
                self._visiting = resting
                resting.bind(buffer)
                yield resting.layer
                self._leave()
                del buffer
        finally:
            if mine == self._iteration:
                self._leave()
            if self._stream is not None:  # a copy may be under way if this was left early
                torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def _leave(self) -> None:
        if self._visiting is not None:
            self._visiting.bind(self._visiting.buffer)
            self._visiting = None

    def _fetch(self, resting: _Resting) -> tuple[Tensor, torch.cuda.Event | None]:
        """Begin to copy a layer into memory that was free when the computing stream got here."""
        buffer = torch.empty_like(resting.buffer, device=self._device, pin_memory=False)
        if self._stream is None:
            return buffer.copy_(resting.buffer), None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            buffer.copy_(resting.buffer, non_blocking=True)
        return buffer, self._stream.record_event()


class _Resting:
    """The parameters of one layer as parts of a buffer."""

    def __init__(self, layer: nn.Module, *, pinned: bool) -> None:
        self.layer = layer
        self._places: list[tuple[nn.Parameter, int]] = []
        size = 0
        for parameter in layer.parameters():
            self._places.append((parameter, size))
            size += padded(parameter)
        self.buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        for parameter, start in self._places:
            _part(self.buffer, parameter, start).copy_(parameter)
        self.bind(self.buffer)

    def bind(self, buffer: Tensor) -> None:
        for parameter, start in self._places:
            parameter.data = _part(buffer, parameter, start)


def _part(buffer: Tensor, parameter: nn.Parameter, start: int) -> Tensor:
    own = buffer[start : start + parameter.nbytes]
    return own.view(parameter.dtype).view(parameter.shape)
