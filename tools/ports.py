"""Ports for servers of one's own."""

from __future__ import annotations

import socket
from pathlib import Path

EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
FIRST, LAST = 20000, 65535  # well-known servers listen below
_claims: list[int] = []  # open files, one for each port, until this process ends


def free_port() -> int:
    """A TCP port that nobody listens on, and that no process is given again while this one lives.

    It is none of those that the system takes for outgoing connections, as one of them might take it
    before its server does. The claim is the UDP port of the same number.

    Raises:
        OSError: all ports are taken.
    """
    for port in _candidates():
        claim = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            claim.bind(("127.0.0.1", port))
            with socket.socket() as probe:
                probe.bind(("", port))
        except OSError:
            claim.close()
        else:
            _claims.append(claim.detach())
            return port
    raise OSError(f"no port from {FIRST} to {LAST} is free")


def _candidates() -> list[int]:
    """The ports outside of the ephemeral range, or all where it leaves none."""
    low, high = map(int, EPHEMERAL.read_text().split())
    every = range(FIRST, LAST + 1)
    return [port for port in every if not low <= port <= high] or list(every)
