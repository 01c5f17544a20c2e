"""How much device memory one rank needs, from the configuration alone: no weight, no device.

Bytes are those that torch's allocator hands out at the same time. On a GPU come on top: the CUDA
context, workspaces of cuBLAS, cuDNN and NCCL, and what fragmentation wastes. `RESERVE` stands for
all of them.
"""

from __future__ import annotations

from vllm_cosmos3.memory.estimate import RESERVE, Memory, Work, estimate, work_of
from vllm_cosmos3.memory.fit import decided, suggestions

__all__ = ["RESERVE", "Memory", "Work", "decided", "estimate", "suggestions", "work_of"]
