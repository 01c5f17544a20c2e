"""The reasoner: a vLLM model, its front end, and `Reasoner` to use it offline.

vLLM imports the model from here in every process, so the offline class is imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_cosmos3.reasoner.offline import Answer, Reasoner

__all__ = ["Answer", "Reasoner"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm_cosmos3.reasoner import offline

    return getattr(offline, name)
