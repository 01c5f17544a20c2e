"""Loading of a reasoner's tensors, each of which must come and have its shape.

A mix-in of vLLM's models, before them in the order of base classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from vllm.logger import init_logger

from vllm_cosmos3.reasoner.required_tensors import (
    TEXT,
    VISION,
    expected_tensors,
    is_generator,
    only_expected,
)

logger = init_logger(f"vllm.{__name__}")


class CheckedWeights:
    """A model whose parts are ``language_model`` and ``visual``, and which says what it expects."""

    language_model: torch.nn.Module
    visual: torch.nn.Module

    def expect(self, config: Any) -> None:
        """Note what a checkpoint with this root configuration must hold."""
        # A checkpoint that is stored quantized has tensors of other names and shapes, which
        # vLLM's quantization method checks itself.
        self._stored_quantized = hasattr(config, "quantization_config")
        self._expected = expected_tensors(config.to_dict())

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the reasoner's tensors; CheckpointError names one that is missing or misshapen."""
        load: Any = super().load_weights  # type: ignore[misc]  # of vLLM's model
        if self._stored_quantized:
            found: set[str] = load(item for item in weights if not is_generator(item[0]))
            return found
        parts = {TEXT: self.language_model, VISION: self.visual}  # the operator can leave one out
        built = {folder for folder, part in parts.items() if any(True for _ in part.parameters())}
        expected = {name: e for name, e in self._expected.items() if e.folder in built}
        unknown: list[str] = []
        loaded: set[str] = load(only_expected(weights, expected, unknown))
        unknown = [name for name in unknown if name not in self._expected]
        if unknown:
            logger.warning(
                "Ignored %d tensors that are not part of a Cosmos 3 reasoner: %s",
                len(unknown),
                ", ".join(unknown[:8]) + (", ..." if len(unknown) > 8 else ""),
            )
        return loaded
