"""A platform plugin of vLLM for the servers of the tests: the CPU, where engines and workers may be forked.

Elsewhere the user chooses, with VLLM_WORKER_MULTIPROC_METHOD. On a CPU vLLM starts them afresh, to
bind the threads of each, which the tests do not want: each would import vLLM again, ten seconds of a
core.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vllm.platforms.cpu import CpuPlatform

if TYPE_CHECKING:
    from vllm.config import VllmConfig

METHOD = "VLLM_WORKER_MULTIPROC_METHOD"


class ForkingCpu(CpuPlatform):
    """Leaves the user's choice as it is."""

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        method = os.environ.get(METHOD)
        super().check_and_update_config(vllm_config)
        if method is not None:
            os.environ[METHOD] = method


def name() -> str:
    """What vLLM asks a plugin for."""
    return f"{__name__}.{ForkingCpu.__name__}"
