"""The parts of a checkpoint that the generator loads, known before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from vllm_cosmos3.checkpoint.config import ModelConfig
from vllm_cosmos3.checkpoint.shards import Shapes, Table, check_weights, identity_table
from vllm_cosmos3.checkpoint.tensors import (
    layer_matrices,
    scale_tensors,
    transformer_tensors,
    vae_tensors,
)
from vllm_cosmos3.generator.models.stored_modalities import coders
from vllm_cosmos3.generator.models.weight_tables import scale_table, weight_table


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """One folder with weights: what it may hold, and what of that goes where.

    ``matrices`` are those that `Quantization` is about.
    """

    folder: str
    shapes: Shapes
    table: Table
    matrices: frozenset[str] = frozenset()

    def fp8_in(self, model: ModelConfig) -> frozenset[str]:
        """Those that are FP8 in the files."""
        stored = model.quantization is not None and model.quantization.stored
        return self.matrices if stored else frozenset()


def components(model: ModelConfig) -> Iterator[Component]:
    """Components that `loading.load_models` reads."""
    transformer, vae = transformer_tensors(model.transformer), vae_tensors(model.vae)
    table, matrices = weight_table(model.transformer), frozenset(layer_matrices(transformer))
    if model.quantization is not None and model.quantization.stored:
        transformer |= scale_tensors(transformer)
        table |= scale_table(table, matrices)
    yield Component(folder="transformer", shapes=transformer, table=table, matrices=matrices)
    yield Component(folder="vae", shapes=vae, table=identity_table(vae))
    for coder in coders(model).values():
        tensors = coder.tensors(model)
        yield Component(folder=coder.folder, shapes=tensors, table=identity_table(tensors))


def loaded_values(model: ModelConfig) -> int:
    """Number of values in all of them."""
    return sum(math.prod(part.shapes[name]) for part in components(model) for name in part.table)


def check_files(model: ModelConfig) -> None:
    """Look into the headers of all shards.

    Raises:
        CheckpointError: tensors are missing, unexpected or of another shape.
    """
    for part in components(model):
        check_weights(part.table, model.path / part.folder, part.shapes, part.fp8_in(model))
