"""Where requests run: in this process, in this process as one rank of several, or in a stage.

All runners take the plan of a request and give its output. Which one is a question of the mesh and
of who starts the ranks; nothing above has to know.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from concurrent.futures import TimeoutError as StillRunning
from dataclasses import replace
from threading import Event
from typing import Any, Protocol

import torch

from vllm_cosmos3.config import EngineConfig, read_config
from vllm_cosmos3.errors import Cancelled
from vllm_cosmos3.output import Output, Sample
from vllm_cosmos3.pipeline import Pipeline
from vllm_cosmos3.plan import Plan
from vllm_cosmos3.progress import Progress, Report
from vllm_cosmos3.runtime.client import StageClient
from vllm_cosmos3.runtime.executor import StageExecutor
from vllm_cosmos3.runtime.mesh import check_degrees, close_mesh, init_mesh
from vllm_cosmos3.runtime.worker import StageConfig


class Runner(Protocol):
    """Runs one request at a time, with the weights loaded."""

    def run(self, plan: Plan, report: Report, cancelled: Event) -> Output: ...

    def close(self) -> None: ...


def make_runner(config: EngineConfig, backend: str | None = None) -> Runner:
    """Load the checkpoint on every rank of the mesh.

    ``backend`` is what vLLM calls the distributed executor backend: "uni" (default for one rank),
    "mp" (default for several), "ray", or "external_launcher" where torchrun has started the ranks.

    Raises:
        InvalidRequest: the mesh does not suit the checkpoint or the machine.
        CheckpointError: the checkpoint is missing, incomplete or of another kind.
    """
    backend = backend or ("uni" if config.parallel.world_size == 1 else "mp")
    here = backend in ("uni", "mp") and config.device != "cpu"
    devices = torch.accelerator.device_count() if here else None
    check_degrees(config.parallel, read_config(config.model).transformer, devices=devices)
    if backend == "uni" and config.parallel.world_size == 1:
        return InProcess(config)
    stage = StageConfig(engine=config, backend=backend)
    return OneOfMany(stage) if backend == "external_launcher" else Remote(stage)


class InProcess:
    """One rank: the pipeline itself. Starts nothing."""

    def __init__(self, config: EngineConfig) -> None:
        # One rank exchanges nothing: vLLM's layers look their group up while they are built, and
        # closing it at once lets several models live in one process.
        mesh = init_mesh(config.parallel)
        try:
            self._pipeline: Pipeline | None = Pipeline.load(config, mesh, config.device)
        finally:
            close_mesh(mesh)

    def run(self, plan: Plan, report: Report, cancelled: Event) -> Output:
        pipeline = self._pipeline
        assert pipeline is not None
        progress = _Progress(plan, report)
        progress.tell("encode", 0)
        state = pipeline.encode(plan)
        progress.tell("denoise", 0)
        while not state.done:
            if cancelled.is_set():
                raise Cancelled(f"cancelled after {state.index} of {plan.steps} steps")
            pipeline.step(state)
            progress.tell("denoise", state.index)
        progress.tell("decode", plan.steps)
        pipeline.decode(state)
        return pipeline.finish(state)

    def close(self) -> None:
        self._pipeline = None
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()


class OneOfMany:
    """This process is a rank; a launcher has started all, and all make the same calls.

    Rank 0 gets the results, the others outputs whose samples are empty. A request cannot be
    cancelled: the ranks would have to agree on when.
    """

    def __init__(self, stage: StageConfig) -> None:
        self._executor = StageExecutor(stage)
        self._executor.start()

    def run(self, plan: Plan, report: Report, cancelled: Event) -> Output:  # noqa: ARG002
        progress = _Progress(plan, report)
        progress.tell("encode", 0)
        self._call("encode", plan)
        for step in range(plan.steps):
            progress.tell("denoise", step)
            self._call("step")
        progress.tell("denoise", plan.steps)
        progress.tell("decode", plan.steps)
        self._call("decode")
        output: Output = self._call("finish")
        if torch.distributed.get_rank() == 0:
            return output
        return replace(output, samples=tuple(Sample(seed=s.seed) for s in output.samples))

    def close(self) -> None:
        self._executor.close()

    def _call(self, method: str, *args: Any) -> Any:
        return self._executor.call(method, "request", *args)[0]


class Remote:
    """Ranks in processes of their own, behind the stage process."""

    def __init__(self, stage: StageConfig) -> None:
        self._client = StageClient(stage)
        try:
            self._client.wait_ready()
        except BaseException:
            self._client.close()
            raise

    def run(self, plan: Plan, report: Report, cancelled: Event) -> Output:
        job = self._client.submit(plan, report=report)
        try:
            while not cancelled.is_set():
                try:
                    output: Output = job.result(0.2)
                    return output
                except StillRunning:
                    continue
            job.cancel()
            output = job.result()
            return output
        except BaseException:
            job.cancel()
            raise

    def close(self) -> None:
        self._client.close()


class _Progress:
    """Tells how far a request is, with the time that the denoising still takes."""

    def __init__(self, plan: Plan, report: Report) -> None:
        self._plan, self._report = plan, report
        self._start = self._denoising = time.perf_counter()

    def tell(self, phase: str, step: int) -> None:
        now = time.perf_counter()
        eta = None
        if phase == "denoise":
            if step == 0:
                self._denoising = now
            else:
                eta = (now - self._denoising) / step * (self._plan.steps - step)
        self._report(
            Progress(
                phase=phase,
                step=step,
                steps=self._plan.steps,
                elapsed=now - self._start,
                eta=eta,
            )
        )
