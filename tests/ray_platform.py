"""A platform plugin of vLLM for the tests: the CPU, but with Ray, whose nodes say that they have GPUs.

vLLM has Ray for accelerators only, as a CPU does not say what Ray calls its devices.
"""

from __future__ import annotations

from pathlib import Path

from vllm.platforms.cpu import CpuPlatform


class CpuWithRay(CpuPlatform):
    ray_device_key = "GPU"


def name() -> str:
    """What vLLM asks a plugin for."""
    return f"{__name__}.{CpuWithRay.__name__}"


def install(folder: Path) -> None:
    """Let processes that have ``folder`` on their path find the plugin."""
    info = folder / "ray_platform-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ray-platform\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[vllm.platform_plugins]\ncosmos3_ray_platform = ray_platform:name\n"
    )
