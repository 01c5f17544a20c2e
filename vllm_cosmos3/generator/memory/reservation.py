"""Reservations of memory on one rank: requests in flight, and the room for one more.

A request is refused before its first allocation, on all ranks or on none: what counts is the room of
the fullest one. Later estimates can still be wrong, and an error of the allocator then ends that
request alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakSet

import torch

from vllm_cosmos3.checkpoint.config import ModelConfig
from vllm_cosmos3.engine_options import EngineConfig
from vllm_cosmos3.errors import OutOfMemory
from vllm_cosmos3.generator.memory import WORKSPACES, Work, estimate, suggestions
from vllm_cosmos3.parallel.axis import Axis
from vllm_cosmos3.parallel.mesh import all_gather

GIB = 2**30


@dataclass(frozen=True, eq=False)
class Reservation:
    """Bytes that a request may use beside the weights: ``held`` of them between its calls too.

    It holds as long as somebody refers to it. ``shared`` is what it adds to a step with others.
    """

    held: int
    request: int
    shared: int = 0


class MemoryBudget:
    """The memory of one rank. Made when the weights are loaded; ``engine`` is fully decided."""

    def __init__(
        self, model: ModelConfig, engine: EngineConfig, world: Axis, device: torch.device
    ) -> None:
        self._model, self._engine, self._world, self._device = model, engine, world, device
        self._reservations: WeakSet[Reservation] = WeakSet()

    def reserve(self, work: Work, kept: int, give_up: Callable[[], None]) -> Reservation:
        """Memory for ``work``. ``kept`` bytes are cached, which ``give_up`` frees if need be.

        The first of the requests in flight starts the device's peak anew.

        Raises:
            OutOfMemory: there is not enough, with the numbers and what would help.
        """
        memory = estimate(self._model, self._engine, work)
        shared = memory.phases["denoise"] - memory.held if work.packed else 0
        own = Reservation(memory.held, memory.request, shared)
        rooms = self._rooms(memory.resident, kept)
        if rooms is not None:
            all_of_them = (*self._reservations, own)
            calls = [reservation.request - reservation.held for reservation in all_of_them]
            together = sum(reservation.shared for reservation in all_of_them)
            needed = own.held + max(*calls, together)  # one call is made at a time
            if needed > rooms[0]:
                give_up()
                if needed > rooms[1]:
                    raise self._refusal(work, needed, rooms[1], memory.resident)
        if not self._reservations and self._device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats(self._device)
        self._reservations.add(own)
        return own

    def _rooms(self, weights: int, kept: int) -> tuple[int, int] | None:
        """Bytes that are free on the fullest rank: as it is, and without what is cached.

        The ranks may cache different texts, so each of the two has a fullest rank. None where
        nobody counts.
        """
        limit = self._engine.memory_limit
        held = sum(reservation.held for reservation in self._reservations)
        if self._device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self._device)
            allocated = int(torch.cuda.memory_allocated(self._device))
            room = int(free + torch.cuda.memory_reserved(self._device) - allocated)
            if limit is not None:
                room = min(room, round(limit * GIB) - allocated)
            # A request allocates what it holds over several calls: what is still to come is not free.
            room -= WORKSPACES + max(0, held - (allocated - weights))
        elif limit is not None:
            room = round(limit * GIB) - weights - kept - held
        else:
            return None
        if self._world.size == 1:
            return room, room + kept  # without waiting for the device
        own = torch.tensor([room, room + kept], device=self._device)
        now, then = torch.stack(all_gather(own, self._world)).amin(dim=0).tolist()
        return now, then

    def _refusal(self, work: Work, needed: int, room: int, weights: int) -> OutOfMemory:
        others = len(self._reservations)
        what, smaller = (
            ("session", "a shorter history") if work.history else ("request", "fewer frames")
        )
        advice = f"ask for {smaller} or a smaller size"
        found = suggestions(self._model, self._engine, work, max(0, room) + weights + WORKSPACES)
        if others:
            ended = f"{'close' if work.history else 'wait for'} {others} other {what}"
            advice = f"{ended}{'s' if others > 1 else ''}, or {advice}"
        if found:
            advice += f", or start with {found[0][0]}"
        mine = estimate(self._model, self._engine, work).request
        freed = room + sum(reservation.held for reservation in self._reservations)
        return OutOfMemory(
            f"the {what} needs {needed:,} bytes ({needed / GIB:.3g} GiB) of a device beside the "
            f"weights, and {max(0, room):,} ({max(0, room) / GIB:.3g} GiB) are free; {advice}",
            crowded=others > 0 and mine <= freed,
        )


def lift_limit(device: torch.device) -> None:
    """Let torch use the whole device again."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0, _indexed(device))


def memory_of(device: torch.device, limit: float | None) -> int | None:
    """Bytes that may be used of a device; None where that is no question. Holds torch to ``limit``."""
    if device.type != "cuda":
        return None if limit is None else round(limit * GIB)
    free, total = map(int, torch.cuda.mem_get_info(device))
    if limit is None:
        return free
    fraction = min(1.0, limit * GIB / total)
    torch.cuda.set_per_process_memory_fraction(fraction, _indexed(device))
    return min(free, round(limit * GIB) - int(torch.cuda.memory_allocated(device)))


def _indexed(device: torch.device) -> torch.device:
    """ "cuda" alone means the current device nearly everywhere."""
    if device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())
