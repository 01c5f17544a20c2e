"""Processes for tests of code that runs on several ranks.

``ranks(parallel, function, *args)`` (a session fixture) calls ``function(mesh, *args)`` on every
rank of the mesh and returns the results in rank order. The processes are forked from one that has
torch and vLLM imported, live as long as the test session, and serve every mesh of their number.
The function must be importable by name: at the top level of a test module.
"""

from __future__ import annotations

import itertools
import multiprocessing
import pickle
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import psutil
from limits import HANG

from vllm_cosmos3.engine_options import ParallelConfig

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    [
        "vllm_cosmos3.stage.executor",
        "vllm.config",
        "vllm.model_executor.layers.linear",
        "vllm.v1.executor.multiproc_executor",
    ]
)


class Ranks:
    """One set of processes for each world size that was asked for.

    Sets do not overlap: vLLM numbers its groups, and ranks that count differently never meet.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._meetings = itertools.count()
        self._processes: dict[int, list[tuple[Any, Connection]]] = defaultdict(list)

    def __call__(
        self, parallel: ParallelConfig, function: Callable[..., Any], *args: Any
    ) -> list[Any]:
        """What ``function(mesh, *args)`` returned on each rank; fails with the first traceback."""
        processes = self._processes[parallel.world_size]
        while len(processes) < parallel.world_size:
            processes.append(_start())
        name = f"{Path(self._folder.name).name}-{next(self._meetings)}"
        meeting = f"file://{Path(self._folder.name) / name}"
        job = pickle.dumps((function, args))
        connections = [pipe for _, pipe in processes]
        for rank, pipe in enumerate(connections):
            pipe.send_bytes(pickle.dumps((sys.path, parallel, rank, meeting, job)))
        results: dict[Connection, Any] = {}
        while len(results) < len(connections):
            ready = wait([pipe for pipe in connections if pipe not in results], HANG)
            if not ready:
                self.stop()
                raise AssertionError(f"{function.__name__} hangs on {parallel}")
            for pipe in ready:
                results[pipe] = self._receive(pipe)
        return [results[pipe] for pipe in connections]

    def stop(self) -> None:
        """End all processes; a later call starts new ones."""
        for process, pipe in itertools.chain.from_iterable(self._processes.values()):
            pipe.close()
            process.kill()
            process.join()
        self._processes.clear()

    def close(self) -> None:
        self.stop()
        self._folder.cleanup()

    def _receive(self, pipe: Any) -> Any:
        try:
            failed, value = pickle.loads(pipe.recv_bytes())
        except EOFError:
            failed, value = True, "the process died"
        if failed:  # the others may wait in a collective for ever
            self.stop()
            raise AssertionError(value)
        return value


def in_new_process(function: Callable[..., Any], *args: Any) -> Any:
    """What ``function(*args)`` returns in a process that has used no thread and no group yet.

    Code that forks must not be tested in the process of pytest, where other tests left threads.
    """
    here, there = FORKSERVER.Pipe()
    process = FORKSERVER.Process(target=_once, args=(there,))
    process.start()
    there.close()
    here.send_bytes(pickle.dumps((sys.path, pickle.dumps((function, args)))))
    try:
        if not here.poll(HANG):
            raise AssertionError(f"{function.__name__} hangs")
        failed, value = pickle.loads(here.recv_bytes())
    except EOFError:
        failed, value = True, "the process died"
    finally:
        process.join(10)
        process.kill()
        here.close()
    if failed:
        raise AssertionError(value)
    return value


def processes_below(pid: int) -> set[int]:
    """Living descendants of a process."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            parents[int(entry.name)] = int(parent)
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def by_age(pids: set[int]) -> list[int]:
    """Processes, the oldest first: their numbers begin again where there are no more."""
    return sorted(pids, key=lambda pid: (psutil.Process(pid).create_time(), pid))


def segments_of(pids: set[int]) -> set[Path]:
    """Files in shared memory that these processes have mapped: other programs have theirs."""
    found = set()
    for pid in pids:
        try:
            maps = Path(f"/proc/{pid}/maps").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        found |= {line.split()[5] for line in maps.splitlines() if " /dev/shm/" in line}
    return {Path(name) for name in found}


def remaining(pids: set[int], files: set[Path], seconds: float = HANG) -> list[object]:
    """Which of these processes and files are still there, after giving them time to go."""
    deadline = time.monotonic() + seconds
    while True:
        alive: list[object] = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
        alive += [file for file in files if file.exists()]
        if not alive or time.monotonic() > deadline:
            return alive
        time.sleep(0.1)


def _once(pipe: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    path, job = pickle.loads(pipe.recv_bytes())
    sys.path[:] = path
    try:
        function, args = pickle.loads(job)
        answer = pickle.dumps((False, function(*args)))
    except BaseException:  # noqa: BLE001 - the test reports it
        answer = pickle.dumps((True, traceback.format_exc()))
    pipe.send_bytes(answer)


def _start() -> tuple[Any, Connection]:
    here, there = FORKSERVER.Pipe()
    process = FORKSERVER.Process(target=_serve, args=(there,), daemon=True)
    process.start()
    there.close()
    return process, here


def _serve(pipe: Connection) -> None:
    import torch

    from vllm_cosmos3.parallel.mesh import close_mesh, init_mesh

    torch.set_num_threads(1)
    current, mesh = None, None
    while True:
        try:
            path, parallel, rank, meeting, job = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            sys.path[:] = path
            if current != parallel:
                if mesh is not None:
                    close_mesh(mesh)
                mesh = init_mesh(parallel, rank=rank, local_rank=rank, init_method=meeting)
                current = parallel
            function, args = pickle.loads(job)
            answer = pickle.dumps((False, function(mesh, *args)))
        except BaseException:  # noqa: BLE001 - the test reports it
            answer = pickle.dumps((True, f"rank {rank}: {traceback.format_exc()}"))
        pipe.send_bytes(answer)
