"""Device memory of one rank, estimated from the configuration alone: no weight, no device.

Bytes are those that torch's allocator hands out at the same time. On a GPU come on top: the CUDA
context, workspaces of cuBLAS, cuDNN and NCCL, and what fragmentation wastes. `RESERVE` stands for
all of them, `WORKSPACES` for all but the context.
"""

from __future__ import annotations

from vllm_cosmos3.generator.memory.estimate import (
    RESERVE,
    WORKSPACES,
    MemoryEstimate,
    Work,
    estimate,
    resolved_parameters,
    session_work,
    usual_work,
    work_of,
    work_with,
)
from vllm_cosmos3.generator.memory.fit import check_weights, resolve_residency, suggestions
from vllm_cosmos3.generator.memory.layouts import Layout, layouts

__all__ = [
    "RESERVE",
    "WORKSPACES",
    "Layout",
    "MemoryEstimate",
    "Work",
    "check_weights",
    "estimate",
    "layouts",
    "resolve_residency",
    "resolved_parameters",
    "session_work",
    "suggestions",
    "usual_work",
    "work_of",
    "work_with",
]
