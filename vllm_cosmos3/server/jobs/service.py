"""The generator behind the routes: its stage and journal, and the three that work with them.

`Admission` accepts requests, `LiveJobs` keeps them until they end, `Inference` runs those of robots.
One service per API process.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Callable
from typing import Any

from vllm_cosmos3.checkpoint.kinds import KINDS
from vllm_cosmos3.generator.models.components import loaded_values
from vllm_cosmos3.request import prompts
from vllm_cosmos3.request.presets import PresetRule
from vllm_cosmos3.robots import droid
from vllm_cosmos3.server.guardrails import Guardrails
from vllm_cosmos3.server.http.api_errors import ApiError
from vllm_cosmos3.server.http.metrics import metrics
from vllm_cosmos3.server.jobs.admission import Admission
from vllm_cosmos3.server.jobs.clock import Clock
from vllm_cosmos3.server.jobs.estimates import ThroughputEstimate
from vllm_cosmos3.server.jobs.inference import Inference
from vllm_cosmos3.server.jobs.journal import Journal
from vllm_cosmos3.server.jobs.live_jobs import LiveJobs
from vllm_cosmos3.server.jobs.sampling_defaults import read_sampling_defaults
from vllm_cosmos3.server.jobs.upsampling import EngineReasoner
from vllm_cosmos3.server.jobs.worlds import Worlds
from vllm_cosmos3.server.memory_split import Sizing
from vllm_cosmos3.server.options import Options, read_call_limits
from vllm_cosmos3.stage.config import StageConfig
from vllm_cosmos3.stage.job import Stages
from vllm_cosmos3.stage.launcher import DEVICES
from vllm_cosmos3.stage.messages import Status
from vllm_cosmos3.stage.placement import parse_devices
from vllm_cosmos3.stage.replicas import check_sessions, outdated, start_stages
from vllm_cosmos3.stage.scheduler import QueueConfig

# What ranks run of a checkpoint, and of a simulator, as `StageConfig` has it: only they import it.
STAGE = "vllm_cosmos3.server.jobs.artifacts:ServedPipeline"
WORLD_STAGE = "vllm_cosmos3.server.jobs.chunks:ServedWorldPipeline"
# Calls in which ranks wait for a trainer.
TRAINED = ("init_weight_transfer_engine", "update_weights")


class Service:
    """Everything that lives as long as the server. ``start`` it in the event loop."""

    worlds: Worlds | None = None  # of a simulator

    def __init__(
        self,
        sizing: Sizing,
        names: tuple[str, ...],
        options: Options,
        guardrails: Guardrails,
        reasoner: EngineReasoner | None = None,
    ) -> None:
        self.sizing, self.model = sizing, sizing.model
        self.options, self.names, self.guardrails = options, names, guardrails
        self.reasoner = reasoner
        self.draining = False
        self._values = loaded_values(self.model)
        metrics().limit.set(options.max_queue)
        self.journal = Journal(options.storage)
        self.stage = _start_stages(sizing, options)
        ranks = sizing.engine.parallel.world_size
        throughput = ThroughputEstimate(len(self.stage.members))
        self.jobs = LiveJobs(self.journal, self.stage, options, throughput, ranks=ranks)
        self.admission = Admission(
            self.jobs,
            self.model,
            prompts.load_tokenizer(self.model.path),
            names,
            guardrails,
            reasoner,
            PresetRule.read(options.preset, options.presets),
            self.check_open,
            read_sampling_defaults(options.default_sampling_params),
            sizing.engine.batch_size,
        )
        self.inference = Inference(
            self.admission,
            self.jobs,
            self.stage,
            throughput,
            deadline=options.sync_deadline,
            ranks=ranks,
        )
        if self.model.causal is not None:
            self.worlds = Worlds(
                self.model,
                prompts.load_tokenizer(self.model.path),
                self.stage,
                guardrails,
                self.check_open,
                limit=options.max_sessions,
                deadline=options.sync_deadline,
            )
        self._clock = Clock(self._tick, self.jobs.sweep)
        self.when_ready: Callable[[], None] = _nothing  # called once

    async def start(self) -> None:
        """Record what earlier processes left unfinished, and start the clock."""
        await self._clock.start()

    async def drain(self) -> None:
        """Take nothing new and wait for what was accepted, as long as the options say."""
        self.draining = True
        end = time.monotonic() + self.options.drain_seconds
        while self._in_flight() and time.monotonic() < end:
            await asyncio.sleep(0.05)

    async def close(self) -> None:
        """End the stage; what it was still serving is recorded as interrupted."""
        self.draining = self.jobs.closing = True
        await self._clock.stop()
        await asyncio.to_thread(self.stage.close)
        self.journal.close()

    def check_open(self) -> None:
        """Refuse a new request while none can be taken.

        Raises:
            ApiError: the server is stopping, or the generator is not up.
            DiskFull, StorageLost: jobs cannot be kept.
        """
        if self.draining:
            raise ApiError("draining", "the server is stopping", headers={"Retry-After": "30"})
        self.journal.storage.check()
        status = self.stage.status(0)
        if status.state in ("starting", "failed"):
            raise ApiError("loading", self.reason(status), headers={"Retry-After": "10"})
        if status.state == "sleeping":
            message = f"{self.reason(status)}; POST /v1/cosmos3/wake_up wakes it"
            raise ApiError("sleeping", message, headers={"Retry-After": "10"})

    def status(self, timeout: float = 1.0) -> Status:
        """How the stage is, as it says or as it was last heard."""
        status = self.stage.status(timeout)
        metrics().waiting.set(status.waiting)
        metrics().running.set(status.running)
        metrics().waiting_seconds.set(status.waiting_seconds)
        metrics().sleeping.set(status.state == "sleeping")
        metrics().given_up.set(status.given_up)
        return status

    def replicas(self) -> list[dict[str, Any]]:
        """How each replica is, as it was last heard, for /health and /metrics."""
        reports, old = [], outdated(self.stage.members)
        for at, member in enumerate(self.stage.members):
            status = member.status(0)
            state = "failed" if member.error else "silent" if member.silent else status.state
            state = "outdated" if state == "ready" and at in old else state
            report = {
                "replica": at,
                "devices": member.devices,
                "nodes": list(dict.fromkeys(status.nodes)),
                "state": state,
                "running": status.running,
                "restarts": status.restarts + member.process_restarts,
                "last_sign_of_life": round(member.last_sign_of_life(), 3),
                "call": {"name": status.call or None, "seconds": round(status.call_seconds, 3)},
            }
            metrics().replica(report)
            reports.append(report)
        return reports

    def reason(self, status: Status) -> str:
        """Why the generator can take no work, as a sentence."""
        if self.stage.error is not None:
            return f"the generator is down: {self.stage.error}"
        if self.stage.silent:
            seconds = self.stage.last_sign_of_life()
            return f"the generator has given no sign of life for {seconds:.0f} s"
        if status.state == "starting":
            return f"the generator is loading: {self.loaded(status)} % of its weights are in place"
        return f"the generator is {status.state}"

    def loaded(self, status: Status) -> int:
        """Percent of the weights that are in place while the stage starts."""
        return min(99, 100 * status.loaded // self._values)

    def _in_flight(self) -> int:
        return len(self.jobs) + self.admission.upsampling + self.inference.running

    def _tick(self) -> None:
        self.replicas()
        if self.status().state == "ready":
            self.when_ready, tell = _nothing, self.when_ready
            tell()
        self.jobs.write_changes()  # last, as it fails on a full disk


def _nothing() -> None:
    return None


def _start_stages(sizing: Sizing, options: Options) -> Stages:
    check_sessions(sizing.model, sizing.engine)
    if options.generator_devices:
        # This process computes nothing, and the reasoner's processes have started before.
        # CUDA accepts each device once; the devices of a replica are in its placement.
        os.environ[DEVICES] = ",".join(dict.fromkeys(parse_devices(options.generator_devices)))
    limits, update_timeout = read_call_limits(options.call_limits), options.weight_update_timeout
    if update_timeout and sizing.engine.weight_transfer in ("nccl", "ipc"):
        limits |= dict.fromkeys(TRAINED, update_timeout)
    return start_stages(
        StageConfig(
            engine=sizing.engine,
            stage=STAGE if sizing.model.causal is None else WORLD_STAGE,
            backend=sizing.engine.distributed_executor_backend or "mp",
            call_limits=limits,
            update_timeout=update_timeout or math.inf,
        ),
        QueueConfig(
            # Requests of robots are alike: in turns each of them would take as long as all.
            policy="fifo" if KINDS[sizing.model.kind].robot == droid.NAME else "short-first",
            max_waiting=options.max_queue,
            max_waiting_seconds=options.max_queue_gpu_seconds,
        ),
        placements=sizing.placements,
        drain_seconds=options.drain_seconds,
    )
