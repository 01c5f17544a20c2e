"""Weights that move: to the host's memory and back, and from a trainer. Every pipeline has them.

All ranks make these calls together, and none while a request is in flight. From the start of an update to
its end there must be none either.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.generator.loading import LoadedModels
from vllm_cosmos3.generator.weight_updates import WeightUpdates
from vllm_cosmos3.parallel.host_copy import free_caches


class MovableWeights(ABC):
    """Base of a pipeline with these ``models``."""

    def __init__(self, models: LoadedModels) -> None:
        self._copy, self._updates = models.copy, models.updates
        self._asleep = False

    @abstractmethod
    def forget(self) -> None:
        """Give up what is kept on the device from one request to the next: it is of these weights."""

    @torch.inference_mode()
    def sleep(self) -> None:
        """Leave the weights in the host's memory."""
        self._check_no_update("sleep")
        if not self._asleep:
            self.forget()
            self._copy.save()
            self._copy.release()
            self._asleep = True
            free_caches()

    @torch.inference_mode()
    def wake_up(self) -> None:
        """Bring the weights back to the device, bit by bit what they were.

        Raises:
            OutOfMemory: others have taken the room meanwhile; it still sleeps then.
        """
        self._check_no_update("wake_up")
        if self._asleep:
            self._copy.bring_back()
            self._asleep = False

    @torch.inference_mode()
    def init_weight_transfer_engine(self, info: Mapping[str, Any]) -> None:
        """Meet a trainer."""
        self._weight_updates().init(info)

    @torch.inference_mode()
    def start_weight_update(self) -> None:
        """Begin an update: see `WeightUpdates`."""
        if self._asleep:
            raise InvalidRequest("start_weight_update", "called", "called after wake_up", "conflict")  # fmt: skip
        self._weight_updates().start()

    @torch.inference_mode()
    def update_weights(self, info: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Receive tensors; ``info`` is that of all ranks, or one for each."""
        updates = self._weight_updates()
        if not isinstance(info, Mapping):
            size = updates.world.size
            if len(info) != size:
                possible = f"an object for all ranks, or a list of {size}, one for each rank"
                raise InvalidRequest("update_info", info, possible)
            info = info[updates.world.rank]
        updates.update(info)

    @torch.inference_mode()
    def finish_weight_update(self, version: str | None = None) -> None:
        """Have what was received ready.

        `keep_weight_update` follows if no rank has failed, else `abort_weight_update`.
        """
        self._weight_updates().finish()

    @torch.inference_mode()
    def keep_weight_update(self) -> None:
        """Keep what was received: there is no way back any more.

        Only now is forgotten what was of the old weights: ranks that differ in the texts they remember
        would wait for each other in the next request.
        """
        self._weight_updates().keep()
        self.forget()

    @torch.inference_mode()
    def abort_weight_update(self) -> None:
        """Put the weights of before the update back, if there is one."""
        if self._updates is not None:
            self._updates.abort()

    def _check_no_update(self, method: str) -> None:
        if self._updates is not None and self._updates.begun:
            raise InvalidRequest(method, "called", "called after finish_weight_update", "conflict")

    def _weight_updates(self) -> WeightUpdates:
        if self._updates is None:
            possible = "given when the generator is loaded"
            raise InvalidRequest("weight_transfer", None, possible, "conflict")
        return self._updates
