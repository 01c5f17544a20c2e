"""Stages of the tests' own processes, forked from one that has torch and vLLM imported.

`start` is for `vllm_cosmos3.stage.client.start_interpreter`. The servers and programs that tests start have
stages of the ordinary kind.
"""

from __future__ import annotations

import gc
import io
import multiprocessing.process
import os
import pickle
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

from ranks import FORKSERVER

STDERR = 2
METHOD = "VLLM_WORKER_MULTIPROC_METHOD"


class ForkedStage:
    """What a client asks of the process that it has started, in the words of `subprocess.Popen`."""

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

    def wait(self) -> int:
        multiprocessing.connection.wait([self._process.sentinel])
        status = self.poll()
        assert status is not None
        return status


def start(environment: Mapping[str, str], told: bytes) -> ForkedStage:
    """A process that runs a stage, and forks its ranks.

    vLLM asks for new interpreters wherever a configuration was made on a CPU, such as by a fixture.
    """
    inherited = {name: value for name, value in environment.items() if name != METHOD}
    here, there = FORKSERVER.Pipe()
    with Connection(os.dup(STDERR)) as stderr:
        process = FORKSERVER.Process(target=_run, args=(there, stderr, inherited))
        process.start()
    # Its client ends it, and multiprocessing shall not ask for its status meanwhile.
    multiprocessing.process._children.discard(process)  # type: ignore[attr-defined]
    there.close()
    with here:
        here.send_bytes(told)
    return ForkedStage(process)


def _run(pipe: Connection, stderr: Connection, environment: dict[str, str]) -> None:
    os.setsid()
    for stream in (1, STDERR):
        os.dup2(stderr.fileno(), stream)
    stderr.close()
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # which has been asked for in another environment
    # One of its own, which removes what it leaves in shared memory.
    resource_tracker._resource_tracker.__init__()  # type: ignore[misc]
    with pipe, io.BytesIO(pipe.recv_bytes()) as told:
        sys.path[:] = pickle.load(told)
        setup = pickle.load(told)
    # It ends with its parent, which has forked it and ends with this session.
    own = pickle.dumps(replace(setup, parent=os.getppid()))
    sys.stdin = io.TextIOWrapper(io.BytesIO(own))
    from vllm_cosmos3.stage.process import main

    gc.freeze()
    sys.exit(main())
