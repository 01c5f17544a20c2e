"""One rank of a mesh on a device by itself: its compute is measured, its communication is counted.

All ranks of a mesh have equal shares of a request, so one of them by itself takes as long as all together,
but for the communication. Here a rank takes its own values for those of the others, which is
as much work and makes nothing that anyone could look at, and keeps how many bytes it would
have sent, in how many calls. Seconds of these are projected by a bandwidth and a latency.

torch's own fake process group receives memory as it happens to be, from which vLLM would read how
many hosts there are, and counts nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from meshes import degrees, leave
from vllm_cosmos3.engine_options import EngineConfig, ParallelConfig
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.generator.pipeline import Pipeline
from vllm_cosmos3.parallel.axis import Axis
from vllm_cosmos3.parallel.mesh import Mesh, init_mesh


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """From one device to all others: bandwidth in bytes/s, and latency of a collective in seconds.

    NVLink of an H100 or H200 has 450 GB/s each way, of which NCCL reaches two thirds to four fifths.
    """

    bandwidth: float
    latency: float


@dataclass(slots=True, kw_only=True)
class Communication:
    """What a rank sends to the others: bytes, in so many calls."""

    sent: float = 0.0
    count: int = 0

    def __add__(self, other: Communication) -> Communication:
        return Communication(sent=self.sent + other.sent, count=self.count + other.count)

    def __mul__(self, times: int) -> Communication:
        return Communication(sent=times * self.sent, count=times * self.count)

    def seconds(self, link: Link) -> float:
        return self.sent / link.bandwidth + self.count * link.latency


@dataclass(frozen=True, slots=True)
class Group:
    """Takes the place of a process group."""

    size: int


class Operation(NamedTuple):
    """Takes the place of `dist.P2POp`."""

    op: Callable[..., Any]
    tensor: Tensor
    peer: int
    group: Group


@dataclass(slots=True)
class Collectives:
    """The collectives of torch.distributed as far as the generator asks them, for a rank without neighbours.

    ``by_call`` has those of the latest first step, and of what comes before and after the steps: later steps
    are alike, and those that CUDA graphs replay do not come here.
    """

    by_call: dict[str, Communication] = field(default_factory=dict)
    _now: Communication = field(default_factory=Communication)

    @contextmanager
    def within(self, call: str) -> Iterator[None]:
        """Count what a call of the pipeline sends, unless it is a later step."""
        self._now = Communication()
        yield
        if call == "encode":
            self.by_call.clear()
        self.by_call.setdefault(call, self._now)

    def of_request(self, steps: int) -> Communication:
        """Those of a whole request like the last one, of so many steps."""
        each = {call: one * (steps if call == "step" else 1) for call, one in self.by_call.items()}
        return sum(each.values(), Communication())

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Take the place of torch.distributed's."""
        names = ("all_to_all_single", "all_gather", "all_reduce", "batch_isend_irecv", "barrier")
        ours = {name: getattr(self, name) for name in names}
        with patch.multiple(dist, **ours, P2POp=Operation, get_global_rank=lambda _, rank: rank):
            yield

    def all_to_all_single(self, out: Tensor, x: Tensor, group: Group) -> None:
        self._count(x.nbytes * (group.size - 1) / group.size)
        out.copy_(x)

    def all_gather(self, parts: Sequence[Tensor], x: Tensor, group: Group) -> None:
        self._count(x.nbytes * (group.size - 1))
        for part in parts:
            part.copy_(x)

    def all_reduce(self, x: Tensor, group: Group) -> None:
        """As a ring does it: every share is sent to be added, and once more when it is complete."""
        self._count(2 * x.nbytes * (group.size - 1) / group.size)

    def batch_isend_irecv(self, operations: Sequence[Operation]) -> list[dist.Work]:
        self._count(sum(each.tensor.nbytes for each in operations if each.op is dist.isend))
        for each in operations:
            if each.op is dist.irecv:
                each.tensor.zero_()
        return []

    def barrier(self, group: Group) -> None:
        pass

    def _count(self, sent: float) -> None:
        self._now.sent += sent
        self._now.count += 1


def check_one_rank(mesh: str) -> None:
    """Refuse meshes whose layers have collectives of vLLM.

    Raises:
        InvalidRequest: replicas, or a mesh of tensor parallelism.
    """
    if not re.fullmatch(r"\d+x\d+x1", mesh):
        raise InvalidRequest("layouts", mesh, "cfg x ulysses x 1 where one rank is asked for")


def on_one_rank(
    mesh: str,
    device: torch.device,
    collectives: Collectives,
    work: Callable[[Pipeline], None],
    **options: Any,
) -> None:
    """Load a checkpoint as the first rank of a mesh, do its work, and leave nothing on the device."""
    config = EngineConfig(device=str(device), **degrees(mesh), **options)
    alone = init_mesh(ParallelConfig())
    with collectives.in_place():
        work(Pipeline.load(config, first_rank(alone, config.parallel), device))
    leave(alone, device)


def first_rank(alone: Mesh, parallel: ParallelConfig) -> Mesh:
    """The mesh as its first rank would see it."""
    sizes = parallel.degrees | {"world": parallel.world_size}
    axes = {
        name: Axis(name, size, 0, cast("dist.ProcessGroup", Group(size)))
        for name, size in sizes.items()
        if size > 1
    }
    return replace(alone, **axes)
