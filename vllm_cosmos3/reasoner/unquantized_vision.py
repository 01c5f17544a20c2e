"""A vision tower that stays as it is stored where vLLM quantizes on the fly, as with ``--quantization fp8``.

A mix-in of vLLM's models, before them in the order of base classes. vLLM runs the tower eagerly, where
the scales of a product's inputs are several small kernels: on an H200 FP8 doubles the tower's time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod


class UnquantizedVision:
    """A model that builds its vision tower within ``_mark_tower_model``, as vLLM's do."""

    @contextmanager
    def _mark_tower_model(
        self, vllm_config: VllmConfig, *args: Any, **kwargs: Any
    ) -> Iterator[None]:
        mark: Any = super()._mark_tower_model  # type: ignore[misc]  # of vLLM's model
        with mark(vllm_config, *args, **kwargs), _unquantized(vllm_config):
            yield


@contextmanager
def _unquantized(vllm_config: VllmConfig) -> Iterator[None]:
    """Layers that are made meanwhile are not quantized, unless the checkpoint is stored so."""
    chosen: Any = vllm_config.quant_config
    if chosen is None or hasattr(vllm_config.model_config.hf_config, "quantization_config"):
        yield
        return
    chosen.get_quant_method = _unquantized_method  # of this object, not of its class
    try:
        yield
    finally:
        del chosen.get_quant_method


def _unquantized_method(layer: torch.nn.Module, prefix: str) -> UnquantizedLinearMethod | None:
    return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
