"""`Cosmos3`: images and videos from Python.

Loads a checkpoint once and runs requests one after the other: in the calling process, or with
several ranks in processes that import nothing of the caller, so scripts need no ``__main__`` guard
and notebooks work.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import torch

from vllm_cosmos3.checkpoint.config import EngineConfig, ParallelConfig, read_config
from vllm_cosmos3.checkpoint.hub import resolve
from vllm_cosmos3.closing import Closing
from vllm_cosmos3.errors import Cosmos3Error, InvalidRequest
from vllm_cosmos3.generator.output import Output, Progress, Report, Sample
from vllm_cosmos3.media import Clip
from vllm_cosmos3.parallel.attention import BACKENDS
from vllm_cosmos3.parallel.halo import VAE_PARALLEL
from vllm_cosmos3.request.plan import Plan
from vllm_cosmos3.request.planner import make_plan
from vllm_cosmos3.request.prompts import load_tokenizer
from vllm_cosmos3.request.request import GenerateRequest, from_fields
from vllm_cosmos3.stage.runners import Runner, make_runner

__all__ = ["Cosmos3", "Output", "Progress", "Sample"]

DTYPES = ("bfloat16", "float16", "float32")
LOAD_FORMATS = ("auto", "dummy")
RESIDENCIES = ("gpu", "host", "auto")
Request = GenerateRequest | Mapping[str, Any]


class Cosmos3(Closing):
    """A Cosmos 3 generator.

        with Cosmos3("nvidia/Cosmos3-Nano") as model:
            model.generate(prompt="A paper boat on a stream").save("boat.mp4")

    Args:
        model: a checkpoint folder in the published layout, or a Hugging Face repository.
        revision: branch, tag or commit of the repository.
        dtype: of weights and activations: bfloat16, float16 or float32. The solver's state is
            always float32.
        device: such as "cuda", "cuda:1" or "cpu"; omitted: what the installed vLLM is built for.
        tensor_parallel_size: ranks that share each layer; divides the key-value heads.
        cfg_parallel_size: 2 computes the two branches of guidance side by side.
        ulysses_degree: ranks that share the tokens. The product of the three is the number of
            devices used.
        vae_parallel: "halo", "tile" (less memory, not exact) or "off".
        distributed_executor_backend: who starts the ranks: "mp" (the default for several), "ray"
            for several hosts, or "external_launcher" in a script that runs under torchrun, where
            only rank 0 gets results.
        attention_backend: one of `parallel.attention.BACKENDS`, or "auto".
        load_format: "auto", or "dummy" for random weights where only the time matters.
        und_residency: where the text tower rests: "gpu", "host" (it visits the device to read the
            texts of a request) or "auto": the host only if a default video would not fit otherwise.
        enable_layerwise_offload: generation layers rest on the host and are copied to the device at
            every step, each while the one before it computes.
        memory_limit: GiB of its device that each rank may use; omitted: what is free.
        checkpoint_kind: one of `kinds.KINDS`, where the files do not tell it.

    Raises:
        CheckpointError: the checkpoint is missing, incomplete or of another kind.
        InvalidRequest: an argument has none of these values.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        revision: str | None = None,
        dtype: str = "bfloat16",
        device: str | None = None,
        tensor_parallel_size: int = 1,
        cfg_parallel_size: int = 1,
        ulysses_degree: int = 1,
        vae_parallel: str = "halo",
        distributed_executor_backend: str | None = None,
        attention_backend: str = "auto",
        load_format: str = "auto",
        und_residency: str = "auto",
        enable_layerwise_offload: bool = False,
        memory_limit: float | None = None,
        checkpoint_kind: str | None = None,
    ) -> None:
        start = time.perf_counter()
        _check_choice("dtype", dtype, DTYPES)
        _check_choice("vae_parallel", vae_parallel, VAE_PARALLEL)
        _check_choice("attention_backend", attention_backend, ("auto", *BACKENDS))
        _check_choice("load_format", load_format, LOAD_FORMATS)
        _check_choice("und_residency", und_residency, RESIDENCIES)
        if memory_limit is not None and not memory_limit > 0:
            raise InvalidRequest("memory_limit", memory_limit, "above 0 GiB")
        self.device = _device(device)
        config = EngineConfig(
            model=resolve(model, revision),
            dtype=dtype,
            device=str(self.device),
            load_format=load_format,
            attention_backend=attention_backend,
            checkpoint_kind=checkpoint_kind,
            parallel=ParallelConfig(
                tensor_parallel_size=tensor_parallel_size,
                cfg_parallel_size=cfg_parallel_size,
                ulysses_degree=ulysses_degree,
                vae_parallel=vae_parallel,
            ),
            und_residency=und_residency,
            layerwise_offload=enable_layerwise_offload,
            memory_limit=memory_limit,
        )
        self._model = read_config(config.model, checkpoint_kind)
        self._tokenizer = load_tokenizer(config.model)
        self._runner: Runner | None = make_runner(config, distributed_executor_backend)
        self._lock = threading.Lock()  # one request at a time, also from several threads
        self.load_seconds = time.perf_counter() - start

    @overload
    def generate(
        self, requests: Sequence[Request], *, progress: Report | None = None
    ) -> list[Output]: ...

    @overload
    def generate(
        self,
        requests: Request | str | None = None,
        *,
        progress: Report | None = None,
        clip: Clip | None = None,
        **fields: Any,
    ) -> Output: ...

    def generate(
        self,
        requests: Request | str | Sequence[Request] | None = None,
        *,
        progress: Report | None = None,
        clip: Clip | None = None,
        **fields: Any,
    ) -> Output | list[Output]:
        """Run one request, given by its fields, or a list of requests.

        ``requests`` is a `GenerateRequest`, a mapping of its fields, a prompt, or a list of the
        first two. All of a list are checked before the first one runs. ``progress`` is called
        after every step; what it raises ends the request. The video of a single request is written
        to ``clip`` while it is decoded; `Output.save` to the same path then has nothing to do, as
        long as the file is there.

        Raises:
            InvalidRequest: a field has a value that cannot be served.
        """
        return self._generate(requests, fields, progress or _ignore, threading.Event(), clip)

    async def agenerate(
        self,
        requests: Request | str | Sequence[Request] | None = None,
        *,
        progress: Report | None = None,
        **fields: Any,
    ) -> Output | list[Output]:
        """`generate` without blocking the event loop; cancelling it stops at the next step.

        ``progress`` is called in another thread.
        """
        cancelled = threading.Event()
        work = asyncio.to_thread(self._generate, requests, fields, progress or _ignore, cancelled)
        try:
            return await work
        finally:
            cancelled.set()

    def plan(self, requests: Request | str | None = None, /, **fields: Any) -> Plan:
        """What a request comes to, without running it: checks it whole."""
        self._open()
        return make_plan(_request(requests, fields), self._model, self._tokenizer)

    def close(self) -> None:
        """Free the models and their memory, and end their processes. Waits for a running request."""
        with self._lock:
            runner, self._runner = self._runner, None
        if runner is not None:
            runner.close()

    def _open(self) -> Runner:
        if self._runner is None:
            raise Cosmos3Error("this Cosmos3 is closed; make a new one")
        return self._runner

    def _generate(
        self,
        requests: Request | str | Sequence[Request] | None,
        fields: Mapping[str, Any],
        report: Report,
        cancelled: threading.Event,
        clip: Clip | None = None,
    ) -> Output | list[Output]:
        several = isinstance(requests, Sequence) and not isinstance(requests, str)
        if several and fields:
            name = next(iter(fields))
            raise InvalidRequest(name, fields[name], "part of each request, as a list was given")
        if several and clip is not None:
            raise InvalidRequest("clip", str(clip.path), "for a single request")
        if clip is not None:  # another process writes it, in a working directory of its own
            clip = replace(clip, path=Path(clip.path).resolve())
        given = list(requests) if several else [_request(requests, fields)]  # type: ignore[arg-type]
        with self._lock:
            runner = self._open()
            with runner.raising_together("the request"):
                plans = [self.plan(_request(item, {})) for item in given]
            outputs = [self._run(runner, plan, report, cancelled, clip) for plan in plans]
        return outputs if several else outputs[0]

    def _run(
        self,
        runner: Runner,
        plan: Plan,
        report: Report,
        cancelled: threading.Event,
        clip: Clip | None,
    ) -> Output:
        start = time.perf_counter()
        output = runner.run(plan, report, cancelled, clip)
        total = time.perf_counter() - start
        timings = {"model_load": self.load_seconds, **output.timings, "total": total}
        return replace(output, timings=timings)


def _request(given: Request | str | None, fields: Mapping[str, Any]) -> GenerateRequest:
    if isinstance(given, GenerateRequest):
        return replace(given, **fields) if fields else given
    if isinstance(given, str):
        return from_fields({"prompt": given, **fields})
    return from_fields({**(given or {}), **fields})


def _device(name: str | None) -> torch.device:
    """The device to run on; vLLM's layers run on the kind of device vLLM was built for."""
    from vllm.platforms import current_platform

    built_for = current_platform.device_type
    device: torch.device | None
    try:
        device = torch.device(built_for if name is None else str(name))
    except RuntimeError:
        device = None
    if device is None or device.type != built_for:
        raise InvalidRequest("device", name, f"{built_for}, for the vLLM installed here")
    return device


def _check_choice(name: str, value: str, possible: Sequence[str]) -> None:
    if value not in possible:
        raise InvalidRequest(name, value, f"one of {', '.join(possible)}")


def _ignore(_: Progress) -> None:
    return None
