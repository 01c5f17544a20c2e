"""CUDA graphs: kernels recorded once and replayed, where launching them takes longer than they do."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vllm_cosmos3.parallel.mesh import Mesh

Outputs = Sequence[tuple[Tensor, ...]]

TOKENS = 2048  # in one forward; with more of them the kernels take longer than their launches
STEPS = 8  # of a request; recording takes as long as two or three steps save
ON_MESHES = "VLLM_COSMOS3_GRAPHS_ON_MESHES"


def launches_matter(tokens: int, steps: int, mesh: Mesh, device: torch.device) -> bool:
    """Whether a forward of so many tokens on this rank, repeated so often, is to be recorded."""
    return device.type == "cuda" and few(tokens, steps) and recordable(mesh)


def few(tokens: int, steps: int) -> bool:
    """Whether replaying saves more than recording takes."""
    return tokens <= TOKENS and steps >= STEPS


def recordable(mesh: Mesh) -> bool:
    """Whether the collectives within a forward can be recorded, and on several ranks are to be.

    Ulysses asks NCCL, which records as it launches: the ranks of a group have the same shapes, so they
    record in the same call, and its communicators are connected by the first one. The all-reduce of
    vLLM's tensor-parallel layers writes the addresses of every recording into a table that is
    never emptied, and each request makes recordings of its own: those meshes launch their kernels.
    """
    asked = os.environ.get(ON_MESHES, "0") not in ("", "0")
    return mesh.world.size == 1 or (asked and mesh.tp.size == 1)


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
