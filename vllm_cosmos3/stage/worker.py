"""The worker: one rank of the mesh, as a vLLM worker without a model runner or a KV cache.

vLLM's executor makes one per device. It holds a stage (the models of this rank) and the states of
the requests in flight, and makes the stage's calls on them. All ranks get the same calls in the
same order. It knows nothing of what the stage computes.
"""

from __future__ import annotations

import gc
import importlib
import logging
import multiprocessing
import os
import pickle
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from vllm.config import VllmConfig
from vllm.v1.worker.worker_base import WorkerBase

from vllm_cosmos3.checkpoint.load_progress import counted
from vllm_cosmos3.compat import device_index
from vllm_cosmos3.engine_options import EngineConfig
from vllm_cosmos3.errors import Cosmos3Error, InvalidRequest, OutOfMemory, file_error
from vllm_cosmos3.parallel.mesh import Mesh, barrier, close_mesh, from_first, init_mesh
from vllm_cosmos3.stage.config import StageConfig
from vllm_cosmos3.stage.heartbeat import Heartbeat
from vllm_cosmos3.stage.parcels import Files, Parcel, saved_elsewhere


class Stage(Protocol):
    """Interface of what a rank runs. ``load`` makes it; the others are called for one request after another.

    ``encode`` makes the state of a request from its plan, which says in ``steps`` how often
    ``step`` follows, which returns how many of them were reused so far; then ``decode``, then ``finish``, whose value on rank 0 is the result, which ``save(path)`` writes to files. What
    ``decode`` makes may go to ``clip`` meanwhile, if the request has one. Between two steps ``preview``
    may be called, whose value on rank 0 is a JPEG of what is coming and the seconds that it took.
    ``step_together`` makes a step of several requests that were submitted with the same batch.

    What outlives a request has a name, by which ``release`` gives it up: the sessions of a simulator.
    While there are no states its other methods may be called, such as ``sleep`` and ``wake_up``.
    """

    @classmethod
    def load(cls, config: EngineConfig, mesh: Mesh, device: torch.device) -> Stage: ...

    def encode(self, plan: Any) -> Any: ...

    def step(self, state: Any) -> int: ...

    def step_together(self, states: Sequence[Any]) -> Sequence[int]: ...

    def preview(self, state: Any) -> tuple[float, bytes] | None: ...

    def decode(self, state: Any, clip: Any) -> None: ...

    def finish(self, state: Any) -> Any: ...

    def release(self, name: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Reply:
    """A rank's answer to call number ``number``: a value, or the error and where it was raised."""

    number: int
    value: Any = None
    error: Cosmos3Error | None = None
    trace: str = ""


class NoModel:
    """Stands for the absent model where vLLM asks a worker's configuration about it.

    vLLM 0.21 to 0.28 read the second attribute and later ones the first, before the worker exists;
    afterwards None is understood.
    """

    supports_multimodal_inputs = False
    is_multimodal_model = False

    def __bool__(self) -> bool:
        return False


class DiffusionWorker(WorkerBase):
    """One rank. vLLM calls ``init_device`` and ``load_model``; all else goes through ``call``."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        local_rank: int,
        rank: int,
        distributed_init_method: str,
        is_driver_worker: bool = False,  # noqa: FBT001, FBT002 - vLLM's signature
        **_: object,  # arguments that some versions add
    ) -> None:
        set_log_level()
        vllm_config.model_config = None
        super().__init__(vllm_config, local_rank, rank, distributed_init_method, is_driver_worker)
        self._config: StageConfig = vllm_config.additional_config["cosmos3"]
        self._states: dict[str, Any] = {}
        folder = self._config.scratch  # None on another host than the stage's
        self._folder = folder if folder is not None and folder.is_dir() else None

    def init_device(self) -> None:
        """Choose the device and meet the other ranks."""
        if self._config.backend == "mp":
            end_with_parent()
        if self._folder is not None:
            Heartbeat(self._folder, str(self.rank)).start()
        parallel = self._config.engine.parallel
        # The executor counts its workers as tensor parallel; from here on the layers count.
        self.parallel_config.tensor_parallel_size = parallel.tensor_parallel_size
        self.device = torch.device("cpu")
        kind = torch.device(self._config.engine.device).type
        if kind != "cpu":
            self.device = torch.device(kind, device_index(self.parallel_config, self.local_rank))
            torch.accelerator.set_device_index(self.device)
        elif self._config.backend == "mp" and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // parallel.world_size))
        self._mesh = init_mesh(
            parallel,
            rank=self.rank,
            local_rank=self.local_rank,
            init_method=self.distributed_init_method if parallel.world_size > 1 else None,
        )

    def load_model(self, **_: object) -> None:
        """Nothing: weights are loaded by the call ``load``, which can report what is wrong."""

    def shutdown(self) -> None:
        self._states.clear()
        close_mesh(self._mesh)

    def call(self, number: int, method: str, args: tuple[Any, ...]) -> Reply:
        """The one remote call. Never raises: a raise would leave vLLM's queues out of step."""
        try:
            owner = self if hasattr(self, method) else self._stage
            return Reply(number, getattr(owner, method)(*args))
        except Exception as error:  # noqa: BLE001 - the process boundary
            return Reply(number, error=public_error(error, method), trace=traceback.format_exc())

    # What ``call`` can call, beside the stage's methods of other names.

    def load(self) -> None:
        module, name = self._config.stage.split(":")
        stage: type[Stage] = getattr(importlib.import_module(module), name)
        with nullcontext() if self._folder is None else counted(self._folder, self.rank):
            self._stage = stage.load(self._config.engine, self._mesh, self.device)

    def ping(self, number: int, seconds: float) -> None:
        """Raise Cosmos3Error unless all ranks of every axis are at the same collective in time."""
        for axis in self._mesh.axes:
            if not barrier(number, axis, self.device, seconds):
                raise Cosmos3Error(f"the ranks of {axis.name} are out of step")

    def encode(self, job: str, plan: Any) -> None:
        if self._config.backend == "external_launcher":
            plan = from_first(plan)  # each rank has made its own, perhaps with a random seed
        self._states[job] = self._stage.encode(plan)

    def step(self, job: str, *others: str) -> int | Sequence[int]:
        """A step of a request, or of several, which gives a value for each."""
        if not others:
            return self._stage.step(self._states[job])
        return self._stage.step_together([self._states[name] for name in (job, *others)])

    def preview(self, job: str) -> tuple[float, bytes] | None:
        return self._stage.preview(self._states[job])

    def decode(self, job: str, clip: Any = None) -> None:
        self._stage.decode(self._states[job], clip)

    def finish(self, job: str, save: Path | None = None, spool: Path | None = None) -> Any:
        """The result of this rank, unless rank 0 is to leave it in a file.

        With ``save`` it is written to the files it makes, whose names are returned; with ``spool``
        it is pickled there: frames are too many bytes for the queue between the processes.
        """
        result = self._stage.finish(self._states.pop(job))
        if save is None and spool is None:
            return result
        if self.rank != 0:
            return None
        if save is not None:
            return result.save(save)
        assert spool is not None
        try:
            with spool.open("wb") as file:
                pickle.dump(result, file, protocol=pickle.HIGHEST_PROTOCOL)
        except BaseException:  # what a full disk holds of it is in the way of the next request
            spool.unlink(missing_ok=True)
            raise
        return None

    def send(self, job: str, save: Path | None, before: Files) -> Parcel | bytes | None:
        """As `finish` where the files would be on another host: they are in the answer, or the pickled result is.

        ``before`` is what is at ``save`` there.
        """
        result = self._stage.finish(self._states.pop(job))
        if self.rank != 0:
            return None
        if save is None:
            return pickle.dumps(result, protocol=pickle.HIGHEST_PROTOCOL)
        return saved_elsewhere(result.save, save, before)

    def drop(self, job: str) -> None:
        """Forget a request at any point, and give back what it held on the device."""
        self._states.pop(job, None)
        gc.collect()
        if self.device.type != "cpu":
            torch.accelerator.empty_cache()

    def release(self, name: str) -> None:
        """Give up what the stage keeps under this name between requests."""
        self._stage.release(name)


def set_log_level() -> None:
    """VLLM_LOGGING_LEVEL for this process: from 0.32 vLLM reads it only where its own commands start."""
    if level := os.environ.get("VLLM_LOGGING_LEVEL"):
        logging.getLogger("vllm").setLevel(level.upper())


def public_error(error: BaseException, method: str) -> Cosmos3Error:
    """An error that can cross to another process and be shown to a user."""
    if isinstance(error, Cosmos3Error):
        return error
    if is_out_of_memory(error):
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return OutOfMemory(
            f"out of memory in {method} ({reason}); ask for fewer frames or a smaller size, or "
            "start with more ranks or --enable-layerwise-offload"
        )
    if isinstance(error, OSError):
        return file_error(error)
    return Cosmos3Error(f"{method} failed: {type(error).__name__}: {error}")


def is_conflict(error: BaseException) -> bool:
    """Whether a call was refused at a time that is not its own: on every rank, and nothing was done."""
    return isinstance(error, InvalidRequest) and error.code == "conflict"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator has refused, on any kind of device."""
    return isinstance(
        error, (torch.OutOfMemoryError, MemoryError)
    ) or "can't allocate memory" in str(error)


def end_with_parent(
    parent: int | None = None, *, patience: float = 0.0, last: Callable[[], None] | None = None
) -> None:
    """End this process soon after process ``parent`` is no longer its parent, whatever it does.

    By default that is the process of multiprocessing that has started it, which may have ended by now.
    After ``patience`` seconds for an orderly end ``last`` is called. Signals would not do: a rank
    may wait for ever in a collective.
    """
    starter = multiprocessing.parent_process()
    if parent is None:
        parent = os.getppid() if starter is None else starter.pid

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        time.sleep(patience)
        if last is not None:
            last()
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
