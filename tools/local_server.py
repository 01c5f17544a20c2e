"""A real server of one's own on a free port of the loopback address: start, wait, stop.

For the demo and the benchmarks. ``with local_server(command, log=path) as server:`` yields when the
server answers ``/health`` and stops its whole process group at the end, however the block ends.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ports import free_port

# A small share of the machine where vLLM runs on the CPU; what the user has set wins.
CPU_SHARE = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
}

# From util-linux: the server is told to end when the thread that started it is gone, killed included.
ENDS_WITH_US = ("setpriv", "--pdeathsig", "TERM")

ERROR = re.compile(r"\b(\w*(Error|Exception): |error: )\S")


class ServerFailed(RuntimeError):
    """The server ended or did not answer in time. The message holds the lines that matter."""


@dataclass(frozen=True, slots=True)
class LocalServer:
    """A running server. ``pid`` is the process, and the process group, of its launcher."""

    url: str
    pid: int
    seconds_to_start: float

    def memory(self) -> int:
        """Bytes of the whole process tree, shared pages divided among those that share them."""
        total = 0
        for pid in group_members(self.pid):
            try:
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue  # ended since it was listed
            total += next(
                int(line.split()[1]) * 1024
                for line in rollup.splitlines()
                if line.startswith("Pss:")
            )
        return total


def program() -> str:
    """The ``vllm-cosmos3`` command of the environment that runs this."""
    return str(Path(sys.executable).with_name("vllm-cosmos3"))


@contextmanager
def local_server(
    command: list[str],
    *,
    log: Path,
    timeout: float = 300,
    waiting: Callable[[float], object] = lambda seconds: None,
) -> Iterator[LocalServer]:
    """Run ``command`` with ``--host`` and ``--port`` added, its output in the file ``log``.

    ``waiting`` is called with the elapsed seconds about twice a second until the server is ready.
    Raises ServerFailed when it ends before that or takes longer than ``timeout`` seconds.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*ENDS_WITH_US, *command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=CPU_SHARE | dict(os.environ),
            start_new_session=True,
        )
    started = time.monotonic()
    try:
        while not _healthy(url):
            seconds = time.monotonic() - started
            if process.poll() is not None:
                raise ServerFailed(
                    f"the server ended with status {process.returncode}:\n{useful_lines(log)}"
                )
            if seconds > timeout:
                raise ServerFailed(
                    f"the server was not ready after {timeout:.0f} s:\n{useful_lines(log)}"
                )
            waiting(seconds)
            time.sleep(0.5)
        yield LocalServer(url, process.pid, time.monotonic() - started)
    finally:
        _stop(process)


def useful_lines(log: Path, count: int = 12) -> str:
    """The first lines that name an error, else the last lines."""
    lines = [line.rstrip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    named = [line for line in lines if ERROR.search(line) and "WARNING" not in line]
    # the first error is the cause; later ones are processes that end because of it
    return "\n".join(dict.fromkeys(named[:count] or lines[-count:]))


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the group to end, then insist. Workers end with the launcher or with their group."""
    # Not SIGINT, which a shell lets background commands and all that they start ignore.
    for wish, patience in ((signal.SIGTERM, 30), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, wish)
        except ProcessLookupError:
            break
        deadline = time.monotonic() + patience
        while group_members(process.pid) and time.monotonic() < deadline:
            process.poll()
            time.sleep(0.1)
    process.wait()


def group_members(group: int) -> list[int]:
    """Processes of a group that still run. Dead ones may stay listed where nobody reaps them."""
    members = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # pid (name) state parent group ...; the name may hold spaces and brackets
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[2]) == group and fields[0] != "Z":
                members.append(int(entry.name))
    return members
