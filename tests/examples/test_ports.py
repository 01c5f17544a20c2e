"""Ports for servers of tests, of the demo and of benchmarks: nobody else takes them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import ports


def test_no_port_is_given_twice() -> None:
    listened = ports.free_port()
    with socket.create_server(("127.0.0.1", listened)):
        os.close(ports._claims.pop())  # as if a stranger listened
        here = [ports.free_port() for _ in range(5)]
        program = "from ports import free_port; print(*(free_port() for _ in range(5)))"
        paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
        words = [sys.executable, "-c", program]
        done = subprocess.run(words, env=os.environ | paths, stdout=subprocess.PIPE, check=True)
    given = [listened, *here, *map(int, done.stdout.split())]
    assert len(set(given)) == len(given) == 11
    low, high = map(int, ports.EPHEMERAL.read_text().split())
    assert not any(low <= port <= high for port in given)


def test_where_all_ports_are_of_outgoing_connections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "range").write_text("1024\t65535\n")
    monkeypatch.setattr(ports, "EPHEMERAL", tmp_path / "range")
    assert ports.FIRST <= ports.free_port() <= ports.LAST
