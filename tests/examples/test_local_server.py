"""The helper that starts servers for the demo and the benchmarks: readiness, failure, stopping."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from limits import HANG

from local_server import ServerFailed, group_members, local_server

SERVER = """
import argparse, http.server, pathlib, subprocess, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("--host"); parser.add_argument("--port", type=int)
parser.add_argument("--after", type=pathlib.Path)  # there is such a file
args = parser.parse_args()
while args.after and not args.after.exists():
    time.sleep(0.01)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

http.server.HTTPServer((args.host, args.port), Handler).serve_forever()
"""


def test_it_waits_and_stops_the_whole_group(tmp_path: Path) -> None:
    log, answered = tmp_path / "log", tmp_path / "answered"
    waited: list[float] = []

    def waiting(seconds: float) -> None:
        waited.append(seconds)
        answered.touch()

    command = [sys.executable, "-c", SERVER, "--after", str(answered)]
    with local_server(command, log=log, waiting=waiting) as server:
        assert urllib.request.urlopen(f"{server.url}/health").status == 200
        assert server.url.startswith("http://127.0.0.1:")
        assert server.memory() > 2**20
        child = int(log.read_text().split()[1])
        assert child in group_members(server.pid)
    assert waited
    assert waited == sorted(waited)
    assert not group_members(server.pid)


def test_a_server_ends_with_a_killed_starter(tmp_path: Path) -> None:
    starter = (
        "import sys, time; from pathlib import Path; from local_server import local_server\n"
        "with local_server(sys.argv[2:], log=Path(sys.argv[1])) as server:\n"
        "    print(server.pid, flush=True); time.sleep(600)"
    )
    words = [sys.executable, "-c", starter, str(tmp_path / "log"), sys.executable, "-c", SERVER]
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(words, stdout=subprocess.PIPE, env=os.environ | paths) as program:
        assert program.stdout is not None
        server = int(program.stdout.readline())
        assert server in group_members(server)
        program.kill()
    try:
        end = time.monotonic() + HANG
        while server in group_members(server):
            assert time.monotonic() < end, "the server goes on"
            time.sleep(0.05)
    finally:
        os.killpg(server, signal.SIGKILL)  # its child, if nothing else


def test_a_server_that_ends_early_is_reported_with_its_error(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('hello'); raise ValueError('no such key')"]
    with (
        pytest.raises(ServerFailed, match=r"(?s)status 1:\nValueError: no such key$"),
        local_server(command, log=tmp_path / "log"),
    ):
        pass


def test_a_server_that_hangs_is_given_up_and_stopped(tmp_path: Path) -> None:
    log, command = tmp_path / "log", ["sh", "-c", "echo still busy; exec sleep 600"]

    def waiting(_: float) -> None:
        while not log.read_text():
            time.sleep(0.01)

    with (
        pytest.raises(ServerFailed, match=r"(?s)not ready after 2 s:\nstill busy"),
        local_server(command, log=log, timeout=2, waiting=waiting),
    ):
        pass


def test_the_server_is_stopped_when_its_user_fails(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SERVER]
    with pytest.raises(KeyError), local_server(command, log=tmp_path / "log") as server:
        raise KeyError("in the block")
    assert not group_members(server.pid)
