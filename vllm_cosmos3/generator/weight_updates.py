"""Updates of the transformer's weights by a trainer: received in parts, and put in place or taken back.

Tensors have the names, shapes and values of a checkpoint's ``transformer/``, whole; what was loaded with
them, such as adapters and FP8, is made of the new ones as well. What is not sent stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vllm_cosmos3.checkpoint.shards import is_ignored, tensor_name
from vllm_cosmos3.checkpoint.weights import Prepare, choose_kernels, fill
from vllm_cosmos3.compat import weight_transfer_engine
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.generator.models.components import Component
from vllm_cosmos3.generator.models.transformer import Transformer
from vllm_cosmos3.parallel.axis import Axis
from vllm_cosmos3.parallel.host_copy import HostCopy, tensors_of

Load = Callable[[Iterable[tuple[str, Tensor]]], None]
Info = Mapping[str, Any]
START = "start_weight_update called before"


class Receiver(Protocol):
    """How tensors come here. ``init`` meets the trainer; ``receive`` hands what an ``info`` tells of to ``load``."""

    def init(self, info: Info) -> None: ...

    def receive(self, info: Info, load: Load) -> None: ...


class WeightUpdates:
    """The updates of one rank, one session at a time, during which no request may run.

    Whatever goes wrong in a session, `abort` leaves the weights of before it. ``copy`` is that of all
    weights on devices.
    """

    def __init__(
        self,
        transformer: Transformer,
        part: Component,
        prepare: Prepare,
        receiver: Receiver,
        copy: HostCopy,
        world: Axis,
    ) -> None:
        self.world = world  # the ranks that a trainer counts
        self._transformer, self._part, self._prepare = transformer, part, prepare
        self._receiver, self._copy = receiver, copy
        # Those that rest on the host, and their copies.
        self._resting: list[tuple[Tensor, Tensor]] = []
        self.begun = False  # whether there is a session

    def init(self, info: Info) -> None:
        """Meet the trainer."""
        self._receiver.init(info)

    def start(self) -> None:
        """Begin a session, with a copy of the weights in the host's memory.

        Raises:
            InvalidRequest: there is one.
        """
        if self.begun:
            possible = "followed by finish_weight_update first"
            raise InvalidRequest("start_weight_update", "called again", possible, "conflict")
        self._copy.save()
        resting = (t for t in tensors_of([self._transformer]) if t.device.type == "cpu")
        self._resting = [(tensor, tensor.clone()) for tensor in resting]
        self.begun = True

    def update(self, info: Info) -> None:
        """Receive some tensors.

        Raises:
            InvalidRequest: no session has begun, or a tensor is unknown or misshapen.
        """
        self._check_begun("update_weights")
        for name, shape in zip(info.get("names", ()), info.get("shapes", ()), strict=False):
            self._check(name, tuple(shape))
        self._receiver.receive(info, self._load)

    def finish(self) -> None:
        """Make what was received ready for use. Until `keep` it can be aborted: another rank may fail here.

        Raises:
            InvalidRequest: no session has begun.
        """
        self._check_begun("finish_weight_update")
        choose_kernels(self._transformer, keep=True)

    def keep(self) -> None:
        """End the session with what was received, once it is finished on all ranks.

        Raises:
            InvalidRequest: no session has begun.
        """
        self._check_begun("keep_weight_update")
        self._copy.changed()
        self._end()

    def abort(self) -> None:
        """Put the weights of before the session back, if there is one."""
        if self.begun:
            self._copy.put_back()
            for tensor, copy in self._resting:
                tensor.data.copy_(copy)
            choose_kernels(self._transformer, keep=True)
            self._end()

    def _check_begun(self, method: str) -> None:
        if not self.begun:
            raise InvalidRequest(method, "called", f"with {START}", "conflict")

    def _end(self) -> None:
        self._resting.clear()
        self.begun = False

    def _load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        fill(self._transformer, self._part.table, self._needed(tensors), self._prepare)

    def _needed(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Those that the generator uses, by the names of the checkpoint."""
        for name, tensor in tensors:
            self._check(name, tuple(tensor.shape))
            if _our_name(name) in self._part.table:
                yield _our_name(name), tensor

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        wanted = shape if is_ignored(name) else self._part.shapes.get(_our_name(name))
        if wanted is None:
            possible = "a tensor of transformer/, by its name in the checkpoint"
            raise InvalidRequest("update_info.names", name, possible)
        if shape != tuple(wanted):
            possible = f"{list(wanted)} of {name}"
            raise InvalidRequest("update_info.shapes", list(shape), possible)


def _our_name(name: str) -> str:
    """The name of the inventory for a tensor as a trainer or a checkpoint calls it."""
    return tensor_name(name.removeprefix("transformer."))


def make_receiver(backend: str, world: Axis, device: torch.device) -> Receiver:
    """The receiver of this rank."""
    return Files() if backend == "files" else OfVllm(backend, world, device)


class Files:
    """Tensors from files that every rank can read: ``{"path": FILE or FOLDER}``."""

    def init(self, info: Info) -> None:
        """Nobody to meet."""

    def receive(self, info: Info, load: Load) -> None:
        path = info.get("path")
        found = Path(path) if isinstance(path, str) else None
        files: list[Path] = []
        if found is not None:
            files = sorted(found.glob("*.safetensors")) if found.is_dir() else [found]
        if not files or not all(file.is_file() for file in files):
            possible = "a safetensors file, or a folder with some, that every rank can read"
            raise InvalidRequest("update_info.path", path, possible)
        for file in files:
            try:
                with safe_open(file, framework="pt") as opened:
                    names = list(opened.keys())
                    load((name, opened.get_tensor(name)) for name in names)
            except (SafetensorError, OSError) as error:
                possible = f"a safetensors file ({error})"
                raise InvalidRequest("update_info.path", str(file), possible) from None


class OfVllm:
    """vLLM's own engines for weight transfer, which hand checkpoint tensors to a model's ``load_weights``."""

    def __init__(self, backend: str, world: Axis, device: torch.device) -> None:
        self._device = device
        self._load: Load | None = None
        self._engine = weight_transfer_engine(backend, world.rank, world.size, device, self)

    def init(self, info: Info) -> None:
        try:
            parsed = self._engine.parse_init_info(dict(info))
        except (TypeError, ValueError) as error:
            raise InvalidRequest("init_info", str(error), "as vLLM's backend has it") from None
        self._engine.init_transfer_engine(parsed)

    def receive(self, info: Info, load: Load) -> None:
        try:
            parsed = self._engine.parse_update_info(dict(info))
        except (TypeError, ValueError) as error:
            raise InvalidRequest("update_info", str(error), "as vLLM's backend has it") from None
        self._load = load
        self._engine.receive_weights(parsed)
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """What the engine calls."""
        assert self._load is not None
        self._load(weights)
