"""Failure consensus of ranks that a launcher has started: which of them have failed.

No process of ours watches them. They meet in the store through which torch.distributed was started,
which answers also while another rank waits in a collective for ever.
"""

from __future__ import annotations

import itertools
import os
import pickle
import sys
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from vllm_cosmos3.errors import Cosmos3Error

_made = itertools.count()  # alike on all ranks


class FailureConsensus:
    """Made by every rank once torch.distributed is up; all ranks make the same calls."""

    def __init__(self) -> None:
        # A connection of its own: waiting here must not keep the groups from the store.
        store = _get_default_store().clone()
        self._store = dist.PrefixStore(f"cosmos3/{next(_made)}", store)
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._number = 0

    def errors(self, own: Cosmos3Error | None, seconds: float) -> dict[int, Cosmos3Error]:
        """The errors of all ranks that have one. They refer to no frame or tensor.

        Raises:
            TimeoutError: a rank has not come here after ``seconds``, or never will.
        """
        self._number += 1
        keys = [f"{self._number}/{rank}" for rank in range(self._size)]
        try:
            self._store.set(keys[self._rank], _pickled(own))
            self._store.wait(keys, timedelta(seconds=seconds))
            errors = [pickle.loads(self._store.get(key)) for key in keys]
            # Whoever is here has read all of the last time.
            self._store.delete_key(f"{self._number - 1}/{self._rank}")
        except dist.DistError as error:
            raise TimeoutError(str(error)) from None
        return {rank: error for rank, error in enumerate(errors) if error is not None}


def end_with_failure() -> None:
    """End this process with status 1, at which the launcher ends the other ranks.

    An ordinary end would wait for collectives to which nobody comes.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _pickled(error: Cosmos3Error | None) -> bytes:
    try:
        return pickle.dumps(error)
    except Exception:  # noqa: BLE001 - it carries what its owner gave, which can be anything
        return pickle.dumps(Cosmos3Error(str(error)))
