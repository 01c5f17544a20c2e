"""Which kernels a call spends its time in, by category, from torch's profiler."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from clock import synchronize

CATEGORIES = {  # the first that matches a kernel's name
    "collectives": r"nccl|cross_device_reduce",  # the wait for the slowest rank is in them
    "attention": r"flash|fmha|attention|sdpa|FlashAttn|cudnn.*sdpa",
    "convolutions": r"convolution|conv[123]d|implicit|fprop|cudnn",
    "products": r"gemm|nvjet|cutlass|cublas|addmm|\bmm\b|splitK|gemv|linear",
    "norms and rotation": r"norm|rope|rotary",
    "activations": r"silu|act_and_mul|sigmoid|gelu",
    "copies": r"memcpy|memset|copy|cat|direct_copy|index|gather|scatter|upsample|pad|fill",
}
OTHER = "other"
MOST = 12  # kernels listed by name


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Seconds on the device by category and by kernel, and of the whole call by the host's clock.

    ``wall`` includes what the profiler itself costs, so the share of idle time is an upper bound.
    """

    name: str
    wall: float
    categories: dict[str, tuple[float, int]]  # seconds and launches
    kernels: dict[str, tuple[float, int]]

    def table(self) -> str:
        """Markdown."""
        busy = sum(seconds for seconds, _ in self.categories.values())
        lines = [
            "",
            f"{self.name}: {1000 * busy:.1f} ms of kernels in {1000 * self.wall:.1f} ms",
            "",
            "| kernels | ms | launches |",
            "|---|---|---|",
        ]
        for name, (seconds, count) in {**self.categories, **self.kernels}.items():
            shown = f"**{name}**" if name in self.categories else f"`{name[:80]}`"
            lines.append(f"| {shown} | {1000 * seconds:.2f} | {count:,} |")
        return "\n".join(lines)


def profile_table(name: str, call: Callable[[], object], device: torch.device) -> Profile:
    """``call`` once under the profiler, after it was warmed up elsewhere."""
    on_gpu = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    synchronize(device)
    with profile(activities=[activity]) as recorded:
        start = time.perf_counter()
        call()
        synchronize(device)
        wall = time.perf_counter() - start
    kernels: dict[str, tuple[float, int]] = {}
    for event in recorded.key_averages():
        micros = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if micros > 0:
            kernels[event.key] = (micros / 1e6, event.count)
    ordered = sorted(kernels.items(), key=lambda item: -item[1][0])
    return Profile(
        name=name, wall=wall, categories=by_category(kernels), kernels=dict(ordered[:MOST])
    )


def by_category(kernels: dict[str, tuple[float, int]]) -> dict[str, tuple[float, int]]:
    """Sums over the kernels of each category, the largest first."""
    seconds: dict[str, float] = defaultdict(float)
    launches: dict[str, int] = defaultdict(int)
    for name, (spent, count) in kernels.items():
        found = category(name)
        seconds[found] += spent
        launches[found] += count
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    return {name: (spent, launches[name]) for name, spent in ordered}


def category(kernel: str) -> str:
    for name, pattern in CATEGORIES.items():
        if re.search(pattern, kernel, re.IGNORECASE):
            return name
    return OTHER
