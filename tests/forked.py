"""Stages and commands, forked from a process that has torch and vLLM imported, which takes ten seconds of a core.

`start_stage` is for `vllm_cosmos3.stage.client.start_interpreter`, in the tests' own processes and in the
commands that are forked: each keeps a process for its stages. `start` is for commands that begin with
a console script, or with Python and a script; they run as in an interpreter of their own.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import io
import multiprocessing.process
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, arbitrary_address, wait
from pathlib import Path
from typing import IO, Any

import torch
from preloaded import FORKSERVER, new_process
from setproctitle import setproctitle

STDOUT, STDERR = 1, 2
PDEATHSIG = 1  # of prctl


class Forked:
    """A forked process, in the words of `subprocess.Popen`."""

    def __init__(self, process: Any) -> None:
        self._process, self._lock = process, threading.Lock()  # its status can be read once
        self.pid: int = process.pid

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        with self._lock:
            status: int | None = self._process.exitcode
            return status

    def kill(self) -> None:
        with self._lock:
            self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        if not wait([self._process.sentinel], timeout):
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0.0)
        status = self.poll()
        assert status is not None
        return status


def start_stage(environment: Mapping[str, str], told: bytes) -> Forked:
    """A process that runs a stage."""
    here, there = FORKSERVER.Pipe()
    with Connection(os.dup(STDERR)) as stderr:
        process = _started(_run_stage, there, stderr, dict(environment))
    there.close()
    with here:
        here.send_bytes(told)
    return process


def start(
    words: Sequence[str], environment: Mapping[str, str], output: IO[Any], *, anew: bool = False
) -> Forked | subprocess.Popen[bytes]:
    """A command that leads a session, writes all it says to ``output`` and ends with the tests.

    It starts ``anew``, as it does for users, also where a device might be in use. Else variables that
    imports read are those of the tests.
    """
    if anew or torch.cuda.is_available():
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", *words],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    with Connection(os.dup(output.fileno())) as stream:
        return _started(_run_command, list(words), dict(environment), stream, os.getcwd())


def _started(target: Any, *args: Any) -> Forked:
    process = new_process(target, *args)
    # Whoever has started it ends it, and multiprocessing shall not ask for its status meanwhile.
    multiprocessing.process._children.discard(process)  # type: ignore[attr-defined]
    return Forked(process)


# In the forked process.


def _run_stage(pipe: Connection, stderr: Connection, environment: dict[str, str]) -> None:
    _settle("python -m vllm_cosmos3.stage.process", environment, stderr)
    with pipe, io.BytesIO(pipe.recv_bytes()) as told:
        sys.path[:] = pickle.load(told)
        setup = pickle.load(told)
    # It ends with its parent, which has forked it and ends with this session.
    own = pickle.dumps(replace(setup, parent=os.getppid()))
    sys.stdin = io.TextIOWrapper(io.BytesIO(own))
    from vllm_cosmos3.stage.process import main

    gc.freeze()
    sys.exit(main())


def _run_command(
    words: list[str], environment: dict[str, str], output: Connection, folder: str
) -> None:
    _settle(" ".join(words), environment, output)
    os.chdir(folder)
    ctypes.CDLL(None).prctl(PDEATHSIG, int(signal.SIGTERM))
    multiprocessing.set_start_method(None, force=True)
    _fork_forkserver()
    from vllm.model_executor.models import registry

    from vllm_cosmos3.stage import client

    client.start_interpreter = start_stage  # type: ignore[assignment]
    # vLLM would import itself once more to look at a model, as that might use a device.
    registry._run_in_subprocess = lambda look: look()
    gc.freeze()
    sys.argv[:] = words[1:] if words[0] == sys.executable else words
    paths = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [str(Path(sys.argv[0]).parent), *filter(None, paths)]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.stdout.flush()
        atexit._run_exitfuncs()


def _settle(title: str, environment: dict[str, str], output: Connection) -> None:
    """Make this process what `subprocess` would have made."""
    setproctitle(title)
    os.setsid()
    for stream in (STDOUT, STDERR):
        os.dup2(output.fileno(), stream)
    output.close()
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # which has been asked for in another environment
    os.close(forkserver._forkserver._forkserver_alive_fd)  # as it is to go with whoever asks it
    # One of its own, which removes what it leaves in shared memory.
    resource_tracker._resource_tracker.__init__()  # type: ignore[misc]


def _fork_forkserver() -> None:
    """Keep a process from which stages are forked, while this one has no other thread."""
    server = forkserver._forkserver
    address = arbitrary_address("AF_UNIX")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        alive, own = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(own)
            setproctitle("stages to be")
            try:
                forkserver.main(listener.detach(), alive, [])
            finally:
                os._exit(0)
        os.close(alive)
    server._forkserver_address, server._forkserver_alive_fd = address, own
    server._forkserver_pid = pid
