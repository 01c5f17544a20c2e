"""Devices that vLLM runs on here, for processes that do not import it.

A vLLM that is built for CPUs says so in its version. Any other has to look for its devices, and a process
of its own does that: importing it takes seconds and hundreds of megabytes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, entry_points, version

from vllm_cosmos3.errors import Unsupported

PLATFORMS = "vllm.platform_plugins"  # entry points of packages that bring other devices
PROGRAM = (  # vLLM may log to the same output before
    "import json, sys; sys.path[:] = json.load(sys.stdin); "
    "from vllm_cosmos3.devices import tell; tell()"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """Devices of one kind, ``type`` as torch calls it and ``name`` as vLLM does.

    ``count`` is how many this process may use, ``memory`` the bytes of the first; None on a CPU, where
    nobody counts. ``ray_key`` is what Ray calls them, empty where vLLM's Ray executor has no use for them.
    """

    type: str
    name: str
    ray_key: str = ""
    count: int | None = None
    memory: int | None = None


def devices() -> Devices:
    """The devices here. Uses none, and imports vLLM in no process that has not.

    Raises:
        Unsupported: vLLM cannot be imported.
    """
    return look() if "vllm" in sys.modules else _asked()


def look() -> Devices:
    """The devices by vLLM's own word."""
    from vllm.platforms import current_platform

    counted = current_platform.device_type != "cpu"
    return Devices(
        type=current_platform.device_type,
        name=current_platform.device_name,
        ray_key=current_platform.ray_device_key or "",
        count=int(current_platform.device_count()) if counted else None,
        # Asked of the driver: a context on a device would be in the way of processes to come.
        memory=int(current_platform.get_device_total_memory()) if counted else None,
    )


def tell() -> None:
    """Print them as the last line of the output."""
    sys.stdout.write(f"\n{json.dumps(asdict(look()))}\n")


@cache
def _asked() -> Devices:
    if not entry_points(group=PLATFORMS) and "cpu" in _vllm_version():
        return Devices(type="cpu", name="cpu")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(sys.path),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise Unsupported(f"vLLM does not find its devices ({reason}); see `vllm-cosmos3 doctor`")
    return Devices(**json.loads(done.stdout.splitlines()[-1]))


def _vllm_version() -> str:
    """Its version, as vLLM reads it to know what it is built for; empty where it is not installed."""
    try:
        return version("vllm")
    except PackageNotFoundError:
        return ""
