"""NVIDIA Cosmos 3 on stock vLLM. Public names are imported on first use, so this stays light."""

from __future__ import annotations

import importlib

from vllm_cosmos3.imports import uncollected
from vllm_cosmos3.version import __version__

_PUBLIC = {
    "Cosmos3": "vllm_cosmos3.engine",
    "GenerateRequest": "vllm_cosmos3.request.request",
    "Output": "vllm_cosmos3.generator.output",
    "Question": "vllm_cosmos3.request.questions",
    "Reasoner": "vllm_cosmos3.reasoner.offline",
    "droid": "vllm_cosmos3.robots",
}
__all__ = ["Cosmos3", "GenerateRequest", "Output", "Question", "Reasoner", "__version__", "droid"]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with uncollected():
        return getattr(importlib.import_module(_PUBLIC[name]), name)
