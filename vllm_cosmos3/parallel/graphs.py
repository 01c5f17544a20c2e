"""CUDA graphs: kernels recorded once and replayed, where launching them takes longer than they do."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vllm_cosmos3.parallel.mesh import Axis

Outputs = Sequence[tuple[Tensor, ...]]

TOKENS = 2048  # in one forward; with more of them the kernels take longer than their launches
STEPS = 8  # of a request; recording takes as long as two or three steps save


def launches_matter(tokens: int, steps: int, world: Axis, device: torch.device) -> bool:
    """Whether a forward of so many tokens, repeated so often, is worth recording."""
    return device.type == "cuda" and world.size == 1 and tokens <= TOKENS and steps >= STEPS


class Recording:
    """A function of tensors that is recorded in its second call and replayed from then on.

    The first call is an ordinary one: libraries choose kernels and allocate workspaces in it. The
    shapes of the arguments must not change, and whatever else the function reads must stay where
    it is. Results are the caller's own.
    """

    def __init__(self, function: Callable[..., Outputs]) -> None:
        self._function = function
        self._warm = False
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *arguments: Tensor) -> Outputs:
        if not self._warm:
            self._warm = True
            return self._function(*arguments)
        if self._graph is None:
            self._record(arguments)
        else:
            for ours, given in zip(self._arguments, arguments, strict=True):
                ours.copy_(given)
        assert self._graph is not None
        self._graph.replay()
        return [tuple(x.clone() for x in some) for some in self._results]

    def _record(self, arguments: tuple[Tensor, ...]) -> None:
        self._arguments = [x.clone() for x in arguments]
        graph = torch.cuda.CUDAGraph()
        # Other threads of this process may use the device meanwhile: only ours must not.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._results = self._function(*self._arguments)
        self._graph = graph
