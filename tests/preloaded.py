"""The process from which those of the tests are forked: it has torch and vLLM imported, ten seconds of a core."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
from contextlib import suppress
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    [
        "vllm_cosmos3.stage.process",
        "vllm_cosmos3.stage.executor",
        "vllm.model_executor.layers.linear",
        "vllm.v1.executor.multiproc_executor",
        # Of commands: servers of both surfaces, and engines offline.
        "vllm.entrypoints.cli.main",
        "vllm.entrypoints.cli.serve",
        "vllm.v1.engine.core",
        "vllm.v1.worker.cpu_worker",
        "vllm_cosmos3.cli.serve",
        "vllm_cosmos3.engine",
        "vllm_cosmos3.plugin",
        "vllm_cosmos3.reasoner.model",
        "vllm_cosmos3.reasoner.offline",
        "vllm_cosmos3.server.endpoint_plugin",
    ]
)
SETTINGS = {  # of servers on a shared CPU
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
FORKING = Path(__file__).parent / "forking"  # vLLM's platform where its engines may be forked

if not torch.cuda.is_available():
    # vLLM would compile small functions in every process, which takes ten seconds each.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
ENVIRONMENT = os.environ | SETTINGS  # that its imports read


def new_process(target: Any, *args: Any, daemon: bool = False) -> Any:
    """A process that is forked, as multiprocessing has it, and started."""
    _start()
    process = FORKSERVER.Process(target=target, args=args, daemon=daemon)
    process.start()
    return process


def forking(environment: dict[str, str]) -> dict[str, str]:
    """The same environment where vLLM's engines and workers are forked on a CPU."""
    if torch.cuda.is_available():
        return environment
    path = [str(FORKING), environment.get("PYTHONPATH", "")]
    return environment | {
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "VLLM_WORKER_MULTIPROC_METHOD": "fork",
    }


@cache
def _start() -> None:
    before = dict(os.environ)
    os.environ.update(forking(ENVIRONMENT))
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    atexit.register(_end)


def _end() -> None:
    """At once: it has nothing to keep, and would take its modules apart for seconds."""
    with suppress(ProcessLookupError):
        os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)  # type: ignore[attr-defined]
