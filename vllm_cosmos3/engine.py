"""`Cosmos3`: images and videos from Python.

Loads a checkpoint once and runs requests one after the other: in the calling process, or with
several ranks in processes that import nothing of the caller, so scripts need no ``__main__`` guard
and notebooks work.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, overload

import torch

from vllm_cosmos3.checkpoint.config import read_config
from vllm_cosmos3.checkpoint.hub import resolve
from vllm_cosmos3.closing import Closing
from vllm_cosmos3.engine_options import OPTIONS, EngineOptions
from vllm_cosmos3.errors import Cosmos3Error, InvalidRequest
from vllm_cosmos3.generator.output import Output, Progress, Report, Sample
from vllm_cosmos3.media import Clip
from vllm_cosmos3.parallel.attention import check_backend
from vllm_cosmos3.request.plan import Plan
from vllm_cosmos3.request.planner import make_plan
from vllm_cosmos3.request.prompts import load_tokenizer
from vllm_cosmos3.request.request import GenerateRequest, from_fields
from vllm_cosmos3.stage.runners import Runner, make_runner

__all__ = ["Cosmos3", "Output", "Progress", "Sample"]

Request = GenerateRequest | Mapping[str, Any]
P = ParamSpec("P")


def _takes(
    options: Callable[P, EngineOptions],
) -> Callable[[Callable[[Cosmos3, EngineOptions], None]], Callable[Concatenate[Cosmos3, P], None]]:
    """Make an ``__init__`` that takes the arguments of the options of one that takes the options."""

    def decorated(
        init: Callable[[Cosmos3, EngineOptions], None],
    ) -> Callable[Concatenate[Cosmos3, P], None]:
        def load(self: Cosmos3, /, *args: P.args, **arguments: P.kwargs) -> None:
            init(self, options(*args, **arguments))

        signature = inspect.signature(options)
        self_first = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)]
        signature = signature.replace(parameters=[*self_first, *signature.parameters.values()])
        load.__signature__ = signature  # type: ignore[attr-defined]
        lines = [f"    {name}: {option.spec.help}." for name, option in OPTIONS.items()]
        model = (
            "    model: a checkpoint folder in the published layout, a Hugging Face repository, or a"
            " short name such as demo."
        )
        load.__doc__ = "\n".join(["Load a checkpoint.\n", "Args:", model, *lines])
        return load

    return decorated


class Cosmos3(Closing):
    """A Cosmos 3 generator.

        with Cosmos3("nvidia/Cosmos3-Nano") as model:
            model.generate(prompt="A paper boat on a stream").save("boat.mp4")

    It takes what `EngineOptions` takes.

    Raises:
        CheckpointError: the checkpoint is missing, incomplete or of another kind.
        InvalidRequest: an option has a value that cannot be served here.
    """

    @_takes(EngineOptions)
    def __init__(self, options: EngineOptions) -> None:
        start = time.perf_counter()
        check_backend(options.attention_backend)
        self.device = _device(options.device)
        config = options.on(resolve(options.model, options.revision), str(self.device))
        self._model = read_config(config.model, config.checkpoint_kind)
        self._tokenizer = load_tokenizer(config.model)
        self._runner: Runner | None = make_runner(config)
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


def _ignore(_: Progress) -> None:
    return None
