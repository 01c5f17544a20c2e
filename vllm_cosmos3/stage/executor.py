"""The stage executor: makes one call at a time on all ranks, through any of vLLM's executors.

vLLM starts the workers, moves messages and notices deaths. What it leaves open is closed here: a
rank that fails or falls silent is seen while others still compute, late answers are recognised by
their number, and a group of ranks that may be out of step is replaced.
"""

from __future__ import annotations

import atexit
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vllm_cosmos3.compat import let_sleep
from vllm_cosmos3.errors import Cosmos3Error, DeadlineExceeded, WorkerDied
from vllm_cosmos3.stage import ray_cluster
from vllm_cosmos3.stage.config import StageConfig
from vllm_cosmos3.stage.launcher import check_backend
from vllm_cosmos3.stage.launcher_sync import FailureConsensus, end_with_failure
from vllm_cosmos3.stage.worker import NoModel, Reply

logger = logging.getLogger(__name__)

SLICE = 0.02  # seconds to wait for one rank before looking at the others
PING_SECONDS = 10.0
START_AGAIN = "start all of them again"
METHOD = "VLLM_WORKER_MULTIPROC_METHOD"


class StageExecutor:
    """Workers with a loaded stage, from ``start`` to ``close``.

    ``call`` raises what the ranks raised. If the ranks may be out of step afterwards, ``healthy``
    is false and only ``restart`` helps: the weights are read again and all request states are gone.

    Where a launcher has started the ranks, each has an executor and makes the same calls. They
    agree after every call on whether it has failed; ranks that are out of step stay so, and the
    processes then end with status 1.
    """

    def __init__(self, config: StageConfig) -> None:
        check_backend(config)
        self._config = config
        self._executor: Any = None
        self._places: Any = None  # of the ranks on a Ray cluster
        self.nodes: tuple[str, ...] = ()  # of it, by rank
        self.away = False  # whether the first rank is on another one than this process
        self._number = 0
        self._consensus: FailureConsensus | None = None
        self.healthy = False

    def start(self) -> None:
        """Start the workers and load the stage on each.

        Raises:
            Cosmos3Error: what ``load`` raised, e.g. CheckpointError.
            WorkerDied: the workers did not come up.
        """
        try:
            if self._config.backend == "ray":
                ranks = self._config.engine.parallel.world_size
                self._places = ray_cluster.reserve(ranks, here=not self._config.anywhere)
            self._executor = _make_executor(self._config, self._places)
            if self._places is not None:
                workers = self._executor.ray_worker_handles
                self.nodes, self.away = ray_cluster.places_of(workers)
            if torch.device(self._config.engine.device).type == "cpu":  # whose cores the ranks need
                for queue in getattr(self._executor, "response_mqs", ()):
                    let_sleep(queue)
            if self._config.backend == "external_launcher":
                self._consensus = FailureConsensus()
        except Exception as error:
            self._give_back()
            raise WorkerDied(
                f"the workers did not start ({error}); the log has the cause"
            ) from error
        self.healthy = True
        try:
            self.call("load")
        except Cosmos3Error:
            self.close()
            raise

    def restart(self) -> None:
        """Replace the workers by new ones."""
        self.close()
        self.start()

    def close(self) -> None:
        """End all workers and remove what they shared. Can be repeated."""
        executor, self._executor = self._executor, None
        if executor is None or (self._consensus is not None and not self.healthy):
            return
        segments = _shared_segments(executor)
        if not self.healthy:
            # A rank that waits in a collective hears no request to end.
            for worker in getattr(executor, "workers", ()):
                worker.proc.kill()
        self.healthy = False
        self.nodes = ()
        executor.shutdown()
        if hasattr(executor, "_finalizer"):
            executor._finalizer.detach()  # it would keep the executor for ever
        for segment in segments:
            segment.unlink(missing_ok=True)
        self._give_back()

    @property
    def lost(self) -> bool:
        """Whether a worker process has ended, also while nothing was called.

        vLLM has a thread that notices it, which may be late: ranks whose collective fails with the death
        of another have answered by then.
        """
        if getattr(self._executor, "is_failed", False):
            return True
        return any(not worker.proc.is_alive() for worker in getattr(self._executor, "workers", ()))

    def call(
        self,
        method: str,
        *args: Any,
        timeout: float | None = None,
        while_waiting: Callable[[], None] | None = None,
    ) -> list[Any]:
        """Call a method of `DiffusionWorker` on every rank; the values in rank order.

        Ranks that a launcher has started know the values of others as None.
        ``timeout`` seconds replace those of the configuration. ``while_waiting`` is called every few
        milliseconds if the workers are other processes.

        Raises:
            Cosmos3Error: a rank raised it, or anything else whose text it carries.
            DeadlineExceeded: a rank did not answer in time.
            WorkerDied: a worker process ended, or cannot go on.
        """
        self._check()
        seconds = timeout or self._config.call_limits.get(method, self._config.timeout)
        replies = self._send(method, args, seconds, while_waiting)
        errors = {rank: reply for rank, reply in replies.items() if reply.error is not None}
        if not errors:
            return [replies[rank].value for rank in sorted(replies)]
        rank, first = min(errors.items())
        if type(first.error) is Cosmos3Error and first.trace:  # not foreseen: where it was raised
            logger.error("rank %d: %s", rank, first.trace)
        if len(replies) < self._config.engine.parallel.world_size or not self._barrier():
            self._lose()
        assert first.error is not None
        raise first.error

    def consensus(self, error: Cosmos3Error | None) -> Cosmos3Error | None:
        """Failure consensus: the error of the first of the ranks that has failed outside of a call.

        All ranks that a launcher has started come here between the same two calls.

        Raises:
            WorkerDied: not all of them did.
        """
        self._check()
        assert self._consensus is not None, "one process makes the calls for all ranks"
        try:
            errors = self._consensus.errors(error, self._config.timeout)
        except TimeoutError:
            self._lose()
            raise WorkerDied(f"the other ranks do not answer; {START_AGAIN}") from None
        return errors[min(errors)] if errors else None

    def _give_back(self) -> None:
        places, self._places = self._places, None
        if places is not None:
            ray_cluster.give_back(places)

    def _check(self) -> None:
        if self.healthy:
            return
        if self._consensus is not None:
            raise WorkerDied(f"the ranks are out of step after a failure; {START_AGAIN}")
        raise WorkerDied("the workers are gone; restart the stage")

    def _lose(self) -> None:
        self.healthy = False
        if self._consensus is not None:
            atexit.register(end_with_failure)

    def _barrier(self) -> bool:
        """Whether ranks that have all answered still meet each other in collectives."""
        try:
            replies = self._send("ping", (self._number, PING_SECONDS), PING_SECONDS, None)
        except Cosmos3Error:
            return False
        return all(reply.error is None for reply in replies.values())

    def _send(
        self,
        method: str,
        args: tuple[Any, ...],
        seconds: float,
        while_waiting: Callable[[], None] | None,
    ) -> dict[int, Reply]:
        self._number += 1
        try:
            future = self._executor.collective_rpc(
                "call", args=(self._number, method, args), non_block=True
            )
        except Exception as error:
            if not self.lost:
                raise
            # Before this call vLLM has noticed that a worker ended: it refuses, or its queues are gone.
            self.healthy = False
            raise self._death(method, while_waiting) from error
        if future.done():  # the worker is in this process
            (own,) = future.result()
            return (
                {0: own} if self._consensus is None else self._replies_of_all(method, own, seconds)
            )
        self._executor.futures_queue.clear()  # the answers are read here, not by vLLM's future
        try:
            return self._collect(method, time.monotonic() + seconds, while_waiting)
        except Cosmos3Error:
            self.healthy = False
            raise

    def _replies_of_all(self, method: str, own: Reply, seconds: float) -> dict[int, Reply]:
        """The replies of all ranks, as far as this one knows them."""
        assert self._consensus is not None
        try:
            errors = self._consensus.errors(
                own.error, seconds if own.error is None else self._config.grace
            )
        except TimeoutError:
            self._lose()
            reason = f"{method} got no answer in time" if own.error is None else str(own.error)
            raise WorkerDied(f"{reason}; the other ranks cannot go on, {START_AGAIN}") from None
        replies = {
            rank: Reply(own.number, error=errors.get(rank))
            for rank in range(self._config.engine.parallel.world_size)
        }
        rank = dist.get_rank()
        replies[rank] = replace(own, error=errors.get(rank))
        return replies

    def _collect(
        self, method: str, deadline: float, while_waiting: Callable[[], None] | None
    ) -> dict[int, Reply]:
        """The answers of all ranks, or of those that answered soon after the first failure."""
        queues = dict(enumerate(self._executor.response_mqs))  # none if vLLM has just closed them
        ranks = set(range(self._config.engine.parallel.world_size))
        replies: dict[int, Reply] = {}
        failed = False
        while len(replies) < len(ranks):
            slice_ = SLICE
            for rank in queues.keys() - replies.keys():
                reply = self._receive(queues[rank], slice_)
                slice_ = 0.0  # one wait a round
                if reply is not None:
                    replies[rank] = reply
            if not failed and any(reply.error is not None for reply in replies.values()):
                failed = True
                deadline = min(deadline, time.monotonic() + self._grace())
            if self.lost:
                raise self._death(method, while_waiting)
            if time.monotonic() > deadline and len(replies) < len(ranks):
                if failed:
                    break
                silent = ", ".join(map(str, sorted(ranks - replies.keys())))
                raise DeadlineExceeded(f"{method} got no answer in time from rank {silent}")
            if while_waiting is not None:
                while_waiting()
        return replies

    def _grace(self) -> float:
        """Seconds that the other ranks have to answer, or their deaths to be noticed."""
        return self._config.grace if self._places is None else ray_cluster.NOTICE_SECONDS

    def _death(self, method: str, while_waiting: Callable[[], None] | None) -> WorkerDied:
        """The error of a call in which a worker process has ended, with its host if that is gone."""
        hosts = ""
        if self._places is not None:
            workers = self._executor.ray_worker_handles
            hosts = ray_cluster.lost_hosts(workers, while_waiting or (lambda: None))
        return WorkerDied(f"a worker process ended in {method}{hosts}")

    def _receive(self, queue: Any, seconds: float) -> Reply | None:
        try:
            _, reply = queue.dequeue(timeout=seconds)
        except TimeoutError:
            return None
        except RuntimeError:  # vLLM closed the queue because a worker ended
            if self.lost:
                return None
            raise
        if not isinstance(reply, Reply):  # vLLM's text of an error outside of the worker's call
            return Reply(self._number, error=Cosmos3Error(str(reply)))
        return reply if reply.number == self._number else None


def _make_executor(config: StageConfig, places: Any) -> Any:
    from vllm.config import DeviceConfig, ParallelConfig, VllmConfig
    from vllm.v1.executor import Executor

    in_process = config.backend in ("uni", "external_launcher")
    # On the CPU vLLM starts workers afresh, to bind the threads of each; unbound ones can be forked,
    # which takes a tenth of the time.
    bind = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    method = os.environ.get(METHOD, "fork" if bind == "nobind" else "spawn")
    # vLLM asks for the last one where the worker is to live in the calling process.
    with _environment(
        VLLM_CPU_OMP_THREADS_BIND=bind,
        VLLM_WORKER_MULTIPROC_METHOD=method,
        VLLM_ENABLE_V1_MULTIPROCESSING="0" if in_process else "1",
    ):
        vllm_config = VllmConfig(
            parallel_config=ParallelConfig(
                # For vLLM all ranks are tensor parallel; the worker knows better.
                tensor_parallel_size=config.engine.parallel.world_size,
                distributed_executor_backend=config.backend,
                placement_group=places,
                worker_cls="vllm_cosmos3.stage.worker.DiffusionWorker",
            ),
            device_config=DeviceConfig(device=torch.device(config.engine.device).type),
        )
        os.environ[METHOD] = method  # which making the configuration has changed
        object.__setattr__(vllm_config, "model_config", NoModel())
        vllm_config.additional_config = {"cosmos3": config}
        return Executor.get_class(vllm_config)(vllm_config)


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            with suppress(KeyError):
                del os.environ[name]
            if value is not None:
                os.environ[name] = value


def _shared_segments(executor: Any) -> list[Path]:
    """The rings in shared memory that carry answers; their owners may die without removing them."""
    names = []
    for queue in getattr(executor, "response_mqs", ()):
        memory = getattr(getattr(queue, "buffer", None), "shared_memory", None)
        if memory is not None:
            names.append(Path("/dev/shm") / memory.name.lstrip("/"))
    return names
