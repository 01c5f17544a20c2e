"""Real servers for the tests: started once, on a free port of the loopback address, always stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path

import httpx
import torch
from limits import HANG
from openai import AsyncOpenAI, OpenAI

from ports import free_port

BIN = Path(sys.executable).parent
ARCHITECTURE = '{"architectures": ["Cosmos3ReasonerForConditionalGeneration"]}'
# Of the tests, not of the recipes: eager because compiling takes longer than all tests, float32 because
# vLLM would otherwise halve the precision of float32 checkpoints.
SMALL = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "4096", "--max-num-seqs", "64"]
# Where both surfaces are served, vLLM loads only what is named: with the plugin of `forking`.
BOTH = {"VLLM_PLUGINS": "cosmos3,forking_platform"}
SMALL += [
    "--num-gpu-blocks-override",
    "512",
]  # vLLM takes no less than 1 GiB for its cache otherwise


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A running server."""

    url: str
    model: str
    log: Path
    pid: int  # of its process, which leads a group
    clients: list[OpenAI] = field(default_factory=list)  # closed with it

    def client(self) -> OpenAI:
        new = OpenAI(base_url=f"{self.url}/v1", api_key="EMPTY", max_retries=0, timeout=HANG)
        self.clients.append(new)
        return new

    def connection(self) -> closing[HTTPConnection]:
        """One that the client may leave before it has read the answer."""
        return closing(HTTPConnection(self.url.removeprefix("http://")))

    def async_client(self) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key="EMPTY", max_retries=0, timeout=HANG)


def environment(cache: Path) -> dict[str, str]:
    """For servers on a shared CPU; ``cache`` is shared by the servers of a session."""
    return os.environ | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CACHE_ROOT": str(cache),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }


def forking(cache: Path) -> dict[str, str]:
    """The same where vLLM's engines and workers are forked on a CPU, and need not import it again."""
    if torch.cuda.is_available():
        return environment(cache)
    path = [str(Path(__file__).parent / "forking"), os.environ.get("PYTHONPATH", "")]
    return environment(cache) | {
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "VLLM_WORKER_MULTIPROC_METHOD": "fork",
    }


RUNNING: list[subprocess.Popen[bytes]] = []


@contextmanager
def running(
    command: list[str],
    folder: Path,
    cache: Path,
    while_starting: Callable[[Server], object] = lambda _: None,
    variables: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Run ``command`` (checkpoint third) with a port of its own until the block ends.

    ``while_starting`` is called again and again until the server is ready. ``variables`` are those of
    its environment.
    """
    port = free_port()
    log = folder / f"server-{port}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            # it ends with the tests, however they end
            [
                "setpriv",
                "--pdeathsig",
                "TERM",
                *command,
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=forking(cache) | dict(variables or {}),
            start_new_session=True,
        )
    server = Server(url=f"http://127.0.0.1:{port}", model=command[2], log=log, pid=process.pid)
    RUNNING.append(process)
    try:
        _wait_until_ready(server, process, while_starting)
        yield server
    finally:
        for client in server.clients:
            client.close()
        if process in RUNNING:
            RUNNING.remove(process)
            _stop(process)


def end_servers() -> None:
    """End those of this process that run, as nobody will ask them again."""
    while RUNNING:
        _stop(RUNNING.pop())


def run_to_end(command: list[str], cache: Path) -> tuple[int, str]:
    """Status and output of a command that ought to end by itself."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=forking(cache),
        start_new_session=True,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=HANG)
    finally:
        _stop(process)
    return process.returncode, output


def _wait_until_ready(
    server: Server, process: subprocess.Popen[bytes], while_starting: Callable[[Server], object]
) -> None:
    end = time.monotonic() + HANG
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended: {server.log.read_text()[-3000:]}")
        try:
            if httpx.get(f"{server.url}/health", timeout=5).status_code == 200:
                return
            while_starting(server)
            time.sleep(0.05)
        except httpx.TransportError:
            time.sleep(0.2)
    raise RuntimeError(f"the server did not start: {server.log.read_text()[-3000:]}")


def _stop(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    """Ask the process group to end, then make it."""
    for how, patience in ((signal.SIGINT, 30), (signal.SIGKILL, 30)):
        try:
            os.killpg(process.pid, how)
            process.wait(timeout=patience)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    process.wait(timeout=30)
