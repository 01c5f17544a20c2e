"""Runners of requests: in this process, in this process as one rank of several, or in a stage.

All runners take the plan of a request and give its output. Which one is a question of the mesh and
of who starts the ranks; nothing above has to know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from threading import Event, Lock
from typing import Any, Protocol

import torch

from vllm_cosmos3.checkpoint.config import ModelConfig
from vllm_cosmos3.checkpoint.load_progress import told
from vllm_cosmos3.engine_options import EngineConfig
from vllm_cosmos3.errors import InvalidRequest, Unsupported
from vllm_cosmos3.generator.memory.reservation import lift_limit
from vllm_cosmos3.generator.movable import MovableWeights
from vllm_cosmos3.generator.output import Output, Sample
from vllm_cosmos3.generator.pipeline import Pipeline
from vllm_cosmos3.generator.world import WorldPipeline
from vllm_cosmos3.media import Clip
from vllm_cosmos3.parallel.checks import check_degrees
from vllm_cosmos3.parallel.host_copy import free_caches
from vllm_cosmos3.parallel.mesh import close_mesh, init_mesh
from vllm_cosmos3.progress import Progress, Report
from vllm_cosmos3.request.plan import Plan
from vllm_cosmos3.request.world import ChunkPlan
from vllm_cosmos3.stage.batching import BatchedRequest, PendingBatches, RunAlone, cancelled_after
from vllm_cosmos3.stage.call_sequence import CallSequence
from vllm_cosmos3.stage.config import StageConfig
from vllm_cosmos3.stage.executor import StageExecutor
from vllm_cosmos3.stage.launcher import EXTERNAL, executor_backend, launched
from vllm_cosmos3.stage.maintenance import FOLLOWED_BY, UNDO
from vllm_cosmos3.stage.placement import Placement, placements_of, visible_devices
from vllm_cosmos3.stage.replicas import check_sessions, start_stages
from vllm_cosmos3.stage.scheduler import QueueConfig
from vllm_cosmos3.stage.worker import is_conflict, is_out_of_memory, public_error

PATIENCE = 30.0  # seconds until ranks that nobody can replace are given up
LOOK_SECONDS = 0.2  # between two looks at how far a stage has loaded
CANCEL_SECONDS = 0.2  # until somebody is heard who cancels what a stage makes
AnyPlan = Plan | ChunkPlan


class Runner(Protocol):
    """Runs one request at a time on each replica, or those of one batch, with the weights loaded.

    Safe to use from several threads.
    """

    replicas: int
    max_batch_size: int  # of requests that share their steps on a replica

    def run(
        self, plan: AnyPlan, report: Report, cancelled: Event, clip: Clip | None = None
    ) -> Output: ...

    def release(self, name: str) -> None:
        """Close a session of a simulator, or do nothing if there is none of this name."""

    def maintain(self, method: str, *args: Any) -> None:
        """Call a method of the pipeline on all ranks between two requests."""

    def raising_together(self, what: str) -> AbstractContextManager[object]:
        """A block in which all ranks, of which the caller may be one, raise what one of them raises."""

    def close(self) -> None: ...


def make_runner(
    config: EngineConfig,
    loaded: Callable[[int], None],
    indices: Sequence[int] = (),
    memory: int | None = None,
) -> Runner:
    """Load the checkpoint on every rank of the mesh.

    ``loaded`` is told how many values of the weights are in place, those of the slowest rank.
    Who starts the ranks is decided by `executor_backend`; they take the devices with these ``indices``
    in order, if there are any. ``memory`` is in bytes for each device, None on a CPU.

    Raises:
        InvalidRequest: the mesh does not suit the checkpoint or the machine.
        CheckpointError: the checkpoint is missing, incomplete or of another kind.
    """
    replicas, ranks = config.data_parallel_size, config.parallel.world_size
    if replicas > 1 and launched() is not None:
        possible = "1 under torchrun, where --parallelism-preset throughput makes replicas"
        raise InvalidRequest("data_parallel_size", replicas, possible, "conflict")
    # A rank of a replica does not compute in the stage's own process, which would hear nothing meanwhile.
    wanted = config.distributed_executor_backend or ("mp" if replicas > 1 else None)
    backend = executor_backend(wanted, ranks)
    here = backend in ("uni", "mp") and torch.device(config.device).type != "cpu"
    devices = torch.accelerator.device_count() if here else None
    model = config.read_model()
    check_degrees(config.parallel, model.transformer, guided=not model.distilled, devices=devices)
    check_sessions(model, config)
    placements = _placements(config, indices, devices, memory)
    config = config.limited(memory)
    if backend == "uni" and ranks == replicas == 1:
        with told(loaded):
            return LocalRunner(config, pipeline_of(model))
    if torch.device(config.device).index:
        possible = f"with a number for each of {replicas * ranks} ranks, or without any"
        raise InvalidRequest("device", config.device, possible)
    if backend == EXTERNAL:
        with told(loaded):
            return LauncherRunner(
                StageConfig(engine=config, stage=stage_name(model), backend=backend, grace=PATIENCE)
            )
    stage = StageConfig(engine=config, stage=stage_name(model), backend=backend)
    return StageRunner(stage, placements, loaded)


def _placements(
    config: EngineConfig, indices: Sequence[int], count: int | None, memory: int | None
) -> tuple[Placement, ...] | None:
    """The placements of the replicas, None for the default devices.

    ``count`` devices are visible, None if this process does not choose: on a CPU, with Ray, under torchrun.
    """
    replicas, ranks = config.data_parallel_size, config.parallel.world_size
    if not indices:
        if count is None or replicas == 1:
            return None
        return placements_of(config, visible_devices(count), memory, field="device")
    given = f"{config.device}:{','.join(map(str, indices))}"
    if count is None:
        possible = "without indices on a CPU, with Ray and under torchrun"
        raise InvalidRequest("device", given, possible)
    if len(indices) != replicas * ranks or max(indices) >= count:
        possible = f"given with {replicas * ranks} indices below {count}, one for each rank"
        raise InvalidRequest("device", given, possible)
    seen = visible_devices(count)
    return placements_of(config, [seen[index] for index in indices], memory, field="device")


def pipeline_of(model: ModelConfig) -> type[Pipeline] | type[WorldPipeline]:
    """What a rank runs of a checkpoint: requests, or the sessions of a simulator."""
    return Pipeline if model.causal is None else WorldPipeline


def stage_name(model: ModelConfig) -> str:
    """The same as `StageConfig` has it."""
    pipeline = pipeline_of(model)
    return f"{pipeline.__module__}:{pipeline.__qualname__}"


class LocalRunner:
    """One rank: the pipeline itself. Starts nothing."""

    replicas = 1

    def __init__(
        self, config: EngineConfig, pipeline: type[Pipeline] | type[WorldPipeline]
    ) -> None:
        self.max_batch_size = config.batch_size(exact=False)
        self._batches = PendingBatches()
        self._device = Lock()  # held by one request or batch at a time
        # One rank makes no collective: vLLM's layers look their group up while they are built, and
        # closing it at once lets several models live in one process.
        if torch.distributed.is_initialized():  # whose groups would be used, and then closed
            raise Unsupported(
                "torch.distributed is initialised in this process, for others; start the generator "
                'before, or with distributed_executor_backend="mp"'
            )
        mesh = init_mesh(config.parallel)
        try:
            with current(config.device):
                self._pipeline: Pipeline | WorldPipeline | None = pipeline.load(
                    config, mesh, config.device
                )
        except BaseException:
            if config.memory_limit is not None:
                lift_limit(torch.device(config.device))
            raise
        finally:
            close_mesh(mesh)

    def run(
        self, plan: AnyPlan, report: Report, cancelled: Event, clip: Clip | None = None
    ) -> Output:
        batch = None if isinstance(plan, ChunkPlan) else plan.batch
        if batch is None:
            return self._run_alone(plan, report, cancelled, clip)
        request = BatchedRequest(CallSequence(plan, clip), report, cancelled)
        requests = self._batches.add(batch, request)
        if requests is not None:
            pipeline = self._pipeline
            assert pipeline is not None
            with self._device, current(pipeline.device):
                self._batches.run(batch, requests, pipeline)
        try:
            return request.future.result()
        except RunAlone:
            free_caches()
            return self._run_alone(plan, report, cancelled, clip)

    def _run_alone(
        self, plan: AnyPlan, report: Report, cancelled: Event, clip: Clip | None
    ) -> Output:
        pipeline: Any = self._pipeline
        assert pipeline is not None
        state = None

        def call(method: str, *args: Any) -> Any:
            nonlocal state
            if method == "encode":
                state = pipeline.encode(*args)
                return None
            return getattr(pipeline, method)(state, *args)

        with self._device:
            try:
                with current(pipeline.device):
                    return _run_calls(call, plan, report, cancelled, clip)
            except Exception as raised:
                if not is_out_of_memory(raised):
                    raise
                error = public_error(raised, "the request")
            # Raised here, where nothing refers to the tensors of the failed call any more.
            state = None
            free_caches()
        raise error

    def release(self, name: str) -> None:
        with self._device:
            if self._pipeline is not None:
                self._pipeline.release(name)

    def maintain(self, method: str, *args: Any) -> None:
        assert self._pipeline is not None
        with current(self._pipeline.device):
            _maintain(partial(_call, self._pipeline), method, *args)

    def raising_together(self, what: str) -> AbstractContextManager[object]:
        return nullcontext()

    def close(self) -> None:
        pipeline, self._pipeline = self._pipeline, None
        if pipeline is not None and pipeline.config.memory_limit is not None:
            lift_limit(pipeline.device)
        del pipeline
        free_caches()


def current(device: str | torch.device) -> AbstractContextManager[object]:
    """Kernels and CUDA graphs go to the current device, of which each thread has its own idea."""
    device = torch.device(device)
    index = None if device.type == "cpu" else device.index
    return nullcontext() if index is None else torch.accelerator.device_index(index)


class LauncherRunner:
    """This process is a rank; a launcher has started all, and all make the same calls.

    Rank 0 gets the results, the others outputs whose samples are empty. What ends a request on one
    rank ends it on all. Requests are neither cancelled nor batched: the ranks would have to agree on when
    and on which.
    """

    replicas = max_batch_size = 1

    def __init__(self, stage: StageConfig) -> None:
        self._executor = StageExecutor(stage)
        self._executor.start()

    def run(
        self, plan: AnyPlan, report: Report, cancelled: Event, clip: Clip | None = None
    ) -> Output:
        rank = torch.distributed.get_rank()

        def call(method: str, *args: Any) -> Any:
            return self._executor.call(method, "request", *args)[rank]

        def report_together(progress: Progress) -> None:
            with self.raising_together("progress"):
                report(progress)

        try:
            output = _run_calls(call, plan, report_together, Event(), clip)
        except BaseException:
            if self._executor.healthy:
                call("drop")
            raise
        if rank == 0:
            return output
        return replace(output, samples=tuple(Sample(seed=s.seed) for s in output.samples))

    def release(self, name: str) -> None:
        if self._executor.healthy:
            self._executor.call("release", name)

    def maintain(self, method: str, *args: Any) -> None:
        _maintain(self._executor.call, method, *args)

    @contextmanager
    def raising_together(self, what: str) -> Iterator[None]:
        try:
            yield
        except BaseException as error:  # of whatever kind: the others wait for the consensus
            self._executor.consensus(public_error(error, what))
            raise
        error_of_another = self._executor.consensus(None)
        if error_of_another is not None:
            raise error_of_another

    def close(self) -> None:
        self._executor.close()


class StageRunner:
    """Ranks in processes of their own, behind the stage process of each replica."""

    def __init__(
        self,
        stage: StageConfig,
        placements: tuple[Placement, ...] | None,
        loaded: Callable[[int], None],
    ) -> None:
        self.replicas = stage.engine.data_parallel_size
        self.max_batch_size = stage.engine.batch_size(exact=False)
        # In fifo one request is made at a time, or a batch.
        queue = QueueConfig(policy="fifo", max_waiting=self.replicas * self.max_batch_size)
        self._client = start_stages(stage, queue, placements=placements)
        try:
            while not self._ready():
                loaded(self._client.status(LOOK_SECONDS).loaded)
        except BaseException:
            self._client.close()
            raise

    def _ready(self) -> bool:
        try:
            self._client.wait_ready(LOOK_SECONDS)
        except TimeoutError:
            return False
        return True

    def run(
        self, plan: AnyPlan, report: Report, cancelled: Event, clip: Clip | None = None
    ) -> Output:
        batch = None if isinstance(plan, ChunkPlan) else plan.batch
        job = self._client.submit(plan, report=report, clip=clip, batch=batch)
        try:
            while not (cancelled.is_set() or wait([job.future], CANCEL_SECONDS).done):
                pass
            if cancelled.is_set():
                job.cancel()
            output: Output = job.result()
            return output
        except BaseException:
            job.cancel()
            raise

    def release(self, name: str) -> None:
        self._client.release(name)

    def maintain(self, method: str, *args: Any) -> None:
        self._client.maintain(method, *args)

    def raising_together(self, what: str) -> AbstractContextManager[object]:
        return nullcontext()

    def close(self) -> None:
        self._client.close()


def _run_calls(
    call: Callable[..., Any], plan: AnyPlan, report: Report, cancelled: Event, clip: Clip | None
) -> Output:
    """Make the pipeline's calls one after the other; a cancelled request ends between two steps."""
    calls = CallSequence(plan, clip)
    while not calls.advance(call, report):
        if cancelled.is_set() and calls.phase == "denoise":
            raise cancelled_after(calls)
    output: Output = call("finish")
    return output


def _call(pipeline: MovableWeights, method: str, *args: Any) -> None:
    getattr(pipeline, method)(*args)


def _maintain(call: Callable[..., object], method: str, *args: Any) -> None:
    """A call between requests, which all ranks have made in the end or none."""
    try:
        call(method, *args)
    except Exception as error:
        if method in UNDO and not is_conflict(error):
            call(UNDO[method])
        raise
    if method in FOLLOWED_BY:
        call(FOLLOWED_BY[method])
