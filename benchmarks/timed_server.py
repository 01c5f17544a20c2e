"""A server that writes down when each stage of a request began and ended, for ``front_ends.py``.

    VLLM_COSMOS3_STAGES=FOLDER python benchmarks/timed_server.py vllm serve CKPT ...
    VLLM_COSMOS3_STAGES=FOLDER python benchmarks/timed_server.py vllm-cosmos3 serve CKPT ...

Every process appends lines ``{"stage", "begin", "end"}`` to a file of its own in FOLDER, seconds of the
machine's monotonic clock. On a GPU the model's stages are timed by events, without waiting for it.
Functions of vLLM are wrapped where they are called, so the same program times anybody's processor.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

OURS = "vllm_cosmos3.reasoner.media.media_io"
FRONT = (  # stage, module, class, method
    ("load", "vllm.multimodal.media.video", "VideoMediaIO", "load_base64"),
    ("decode", "vllm.multimodal.media.video", "VideoMediaIO", "load_bytes"),
    ("load", OURS, "ClipIO", "load_base64"),
    ("decode", OURS, "ClipIO", "load_bytes"),
    ("process", "vllm.multimodal.processing", "BaseMultiModalProcessor", "apply"),
    ("pixels", "transformers", "Qwen3VLVideoProcessor", "preprocess"),
    ("arrive", "vllm.v1.engine.core", "EngineCore", "preprocess_add_request"),
)
# The model, in either of vLLM's two runners.
MODEL = (
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", "execute_model"),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", "_execute_mm_encoder"),
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner", "execute_model"),
    ("vllm.v1.worker.gpu.mm.encoder_runner", "EncoderRunner", "execute_mm_encoder"),
)


class Stages:
    """Where the lines of this process go."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pending: deque[tuple[str, Any, Any, float]] = deque()

    def write(self, stage: str, begin: float, end: float) -> None:
        line = json.dumps({"stage": stage, "begin": begin, "end": end})
        with (self._folder / f"{os.getpid()}.jsonl").open("a") as file:
            file.write(line + "\n")

    def on_host(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.monotonic()
            try:
                return function(*args, **kwargs)
            finally:
                self.write(stage, begin, time.monotonic())

        return timed

    def on_device(
        self, name: Callable[[Any], str], function: Callable[..., Any]
    ) -> Callable[..., Any]:
        """Times a method of the model runner whose first argument is the scheduler's output."""

        @functools.wraps(function)
        def timed_on_host(runner: Any, work: Any, *args: Any, **kwargs: Any) -> Any:
            return self.on_host(name(work), function)(runner, work, *args, **kwargs)

        if not torch.cuda.is_available():
            return timed_on_host

        @functools.wraps(function)
        def timed(runner: Any, work: Any, *args: Any, **kwargs: Any) -> Any:
            self._write_finished()
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin = time.monotonic()
            first.record()
            try:
                return function(runner, work, *args, **kwargs)
            finally:
                last.record()
                self._pending.append((name(work), first, last, begin))

        return timed

    def _write_finished(self) -> None:
        while self._pending and self._pending[0][2].query():
            stage, first, last, begin = self._pending.popleft()
            self.write(stage, begin, begin + first.elapsed_time(last) / 1000)


def install(stages: Stages) -> None:
    """Wrap the stages of the front end, and those of the model in the process that gets to hold it."""
    for stage, module, owner, method in FRONT:
        kind = getattr(importlib.import_module(module), owner)
        setattr(kind, method, stages.on_host(stage, getattr(kind, method)))
    wrapper = importlib.import_module("vllm.v1.worker.worker_base").WorkerWrapperBase
    begin_worker = wrapper.__init__

    @functools.wraps(begin_worker)
    def begin(self: Any, *args: Any, **kwargs: Any) -> None:
        for module, owner, method in MODEL:
            kind = getattr(importlib.import_module(module), owner)
            name = _step if method == "execute_model" else _encoded
            setattr(kind, method, stages.on_device(name, getattr(kind, method)))
        begin_worker(self, *args, **kwargs)

    wrapper.__init__ = begin


def _step(work: Any) -> str:
    if work.scheduled_new_reqs:
        return "prefill"
    return "decode step" if work.total_num_scheduled_tokens else "nothing"


def _encoded(work: Any) -> str:
    """``work``: the scheduler's output in the first runner, the pictures in the second."""
    return "vision" if getattr(work, "scheduled_encoder_inputs", work) else "nothing"


def main() -> None:
    program = sys.argv.pop(1)
    if program == "vllm":
        from vllm.entrypoints.cli.main import main as serve

        serve()
    else:
        from vllm_cosmos3.cli import main as serve_cosmos3

        sys.exit(serve_cosmos3(sys.argv[1:]))


# Outside of main(): processes that are spawned load this file again and have stages of their own.
install(Stages(Path(os.environ["VLLM_COSMOS3_STAGES"])))

if __name__ == "__main__":
    main()
