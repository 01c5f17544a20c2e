"""A stage that adds up ranks, with real collectives on every axis, and fails when it is told to."""

from __future__ import annotations

import errno
import os
import signal
import time
from dataclasses import dataclass, field

import torch
from toy_plan import ToyPlan, ToyResult

from vllm_cosmos3.engine_options import EngineConfig
from vllm_cosmos3.errors import CheckpointError, InvalidRequest, OutOfMemory
from vllm_cosmos3.parallel.mesh import Mesh, all_gather


@dataclass
class ToyState:
    plan: ToyPlan
    index: int = 0
    total: int = 0
    batch_sizes: list[int] = field(default_factory=list)  # of each step


@dataclass(frozen=True)
class Faulty:
    """A result that goes wrong as ``ToyPlan.result`` says."""

    fault: str
    filling: bytes = bytes(2**20)

    def __reduce__(self) -> tuple[object, ...]:
        if self.fault == "unreadable":
            return _refuse, (self.filling,)
        return Faulty, (self.filling, Trap(self.fault))


@dataclass(frozen=True)
class Trap:
    fault: str

    def __reduce__(self) -> tuple[object, ...]:
        if self.fault == "deadly":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.EIO, "Input/output error", "/a/folder")


def _refuse(_: bytes) -> None:
    raise ValueError("these are no frames")


class Toy:
    """Each step adds, over all axes, the ranks' numbers: with one rank 4 zeros."""

    def __init__(self, mesh: Mesh, device: torch.device) -> None:
        self.mesh, self.device = mesh, device
        self.crowded = self.asleep = False
        self.weights = self.updated = 0

    @classmethod
    def load(cls, config: EngineConfig, mesh: Mesh, device: torch.device) -> Toy:
        if not config.model.exists():
            raise CheckpointError(f"{config.model} is missing")
        return cls(mesh, device)

    def encode(self, plan: ToyPlan) -> ToyState:
        assert not self.asleep
        self._moment(plan, "encode")
        return ToyState(plan)

    def step(self, state: ToyState) -> int:
        return self.step_together([state])[0]

    def step_together(self, states: list[ToyState]) -> list[int]:
        (index,) = {state.index for state in states}  # all are as far
        for state in states:
            self._moment(state.plan, f"step {index}")
        time.sleep(max(state.plan.seconds for state in states))
        total = self._sum()
        for state in states:
            state.total += total
            state.index += 1
            state.batch_sizes.append(len(states))
        return [0] * len(states)

    def preview(self, state: ToyState) -> tuple[float, bytes] | None:
        """As with frames, every rank computes a part, and the first one has the picture."""
        self._sum()
        return None if self.mesh.world.rank else (1e-6, bytes([state.index]))

    def decode(self, state: ToyState, clip: object) -> None:
        self._moment(state.plan, "decode")
        self._sum()

    def finish(self, state: ToyState) -> ToyResult | Faulty:
        self._moment(state.plan, "finish")
        pids = all_gather(torch.tensor(os.getpid()), self.mesh.world)
        if state.plan.result != "sound":
            return Faulty(state.plan.result)
        batch_sizes = tuple(state.batch_sizes)
        return ToyResult(state.total, tuple(int(pid) for pid in pids), batch_sizes, self.weights)

    def sleep(self) -> None:
        self._sum()
        self.asleep = True

    def start_weight_update(self) -> None:
        self._sum()
        self.updated = 0

    def update_weights(self, info: dict[str, object]) -> None:
        self._sum()
        last = self.mesh.world.rank == self.mesh.world.size - 1
        if info.get("fault") == "one" and last:
            raise RuntimeError("only the last rank fails")
        self.updated += 1

    def finish_weight_update(self, version: str | None) -> None:
        """A version "fails on 1" does so on the replica with this device."""
        self._sum()
        if version == f"fails on {os.environ.get('CUDA_VISIBLE_DEVICES')}":
            raise RuntimeError("this replica fails")

    def keep_weight_update(self) -> None:
        self._sum()
        self.weights = self.updated

    def abort_weight_update(self) -> None:
        self._sum()
        self.updated = 0

    def wake_up(self) -> None:
        self._sum()
        self.asleep = False

    def _sum(self) -> int:
        axes = (self.mesh.world, self.mesh.cfg, self.mesh.ulysses, self.mesh.tp)
        return sum(int(rank) for axis in axes for rank in all_gather(torch.tensor(axis.rank), axis))

    def _moment(self, plan: ToyPlan, name: str) -> None:
        fault, gate = plan.faults.get(name), plan.gates.get(name)
        last = self.mesh.world.rank == self.mesh.world.size - 1
        if gate is not None and last:
            gate.wait()
        if fault == "all":
            raise RuntimeError(f"all ranks fail, this is {self.mesh.world.rank}")
        if fault == "invalid":
            raise InvalidRequest("prompt", "", "text")
        if fault == "memory" or (fault == "memory one" and last):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        if fault == "crowded" and not self.crowded:
            self.crowded = True
            raise OutOfMemory("there is no room beside the others", crowded=True)
        if fault == "one" and last:
            raise RuntimeError("only the last rank fails")
        if fault == "hang" and last:
            time.sleep(3600)
        if fault == "kill" and last:
            os.kill(os.getpid(), signal.SIGKILL)
