"""Bytes of the weights of one rank, from the inventory of the checkpoint's tensors."""

from __future__ import annotations

import re
from math import prod

from vllm_cosmos3.checkpoint.config import ModelConfig, TransformerConfig
from vllm_cosmos3.checkpoint.tensors import (
    Tensors,
    parameters,
    sound_tensors,
    transformer_tensors,
    vae_tensors,
)

FLOAT32 = 4
VOCABULARY_MULTIPLE = 64  # rows of vLLM's embedding
_GENERATION = re.compile(r"^layers\.\d+\..*(moe_gen|add)")
_LAYER = re.compile(r"^layers\.")
_TEXT_LAST = ("input_layernorm.", "self_attn.to_k.", "self_attn.to_v.", "self_attn.norm_k.")
_NOT_LOADED = ("lm_head.", "norm.")


def weights(model: ModelConfig, *, tensor_parallel_size: int, element_size: int) -> dict[str, int]:
    """Bytes by part of the model on one rank; ``element_size`` are the bytes of a value.

    Norms, adapters and autoencoders are on every rank, matrices of the layers are divided.
    """
    config, tp = model.transformer, tensor_parallel_size
    last = f"layers.{config.num_hidden_layers - 1}."
    parts = dict.fromkeys(("understanding", "embedding", "generation", "adapters"), 0)
    for name, shape in transformer_tensors(config).items():
        if name.startswith(_NOT_LOADED):
            continue
        size = prod(shape) * element_size
        if _GENERATION.search(name):
            parts["generation"] += size // tp if len(shape) > 1 else size
        elif _LAYER.search(name):
            if not name.startswith(last) or name.removeprefix(last).startswith(_TEXT_LAST):
                parts["understanding"] += size // tp if len(shape) > 1 else size
        elif name.startswith("embed_tokens."):
            rows = -(-shape[0] // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
            parts["embedding"] += rows // tp * shape[1] * element_size
        else:
            parts["adapters"] += prod(shape) * (
                FLOAT32 if "time_embedder" in name else element_size
            )
    parts["video autoencoder"] = parameters(vae_tensors(model.vae)) * element_size
    if model.sound is not None:
        parts["sound autoencoder"] = parameters(_sound_decoder(model)) * FLOAT32
    return parts


def layer_bytes(config: TransformerConfig, *, tensor_parallel_size: int, element_size: int) -> int:
    """Bytes of one whole layer of either tower on one rank."""
    tensors = transformer_tensors(config)
    first = {name: s for name, s in tensors.items() if name.startswith("layers.0.")}
    tower = [shape for name, shape in first.items() if _GENERATION.search(name)]
    divided = sum(prod(shape) for shape in tower if len(shape) > 1) // tensor_parallel_size
    return (divided + sum(prod(shape) for shape in tower if len(shape) == 1)) * element_size


def loading(model: ModelConfig, parts: dict[str, int], *, element_size: int, dummy: bool) -> int:
    """Bytes at the peak of loading the ``parts`` that rest on the device.

    An autoencoder is built in float32 before it is cast. Random weights are drawn in float32, one
    tensor at a time; read ones come from the host.
    """

    def drawn(tensors: Tensors) -> int:
        return max(prod(shape) for shape in tensors.values()) * FLOAT32 if dummy else 0

    towers = ("understanding", "embedding", "generation", "adapters")
    base = sum(parts.get(name, 0) for name in towers)
    peak = base + drawn(
        {
            name: shape
            for name, shape in transformer_tensors(model.transformer).items()
            if not name.startswith(_NOT_LOADED)
        }
    )
    built = parts["video autoencoder"]
    cast = built * FLOAT32 // element_size
    tensors = vae_tensors(model.vae)
    peak = max(peak, base + max(cast, built + drawn(tensors)))
    base += built
    if model.sound is not None:
        sound = parts["sound autoencoder"]
        peak = max(peak, base + sound + drawn(_sound_decoder(model)))
    return peak


def _sound_decoder(model: ModelConfig) -> Tensors:
    assert model.sound is not None
    tensors = sound_tensors(model.sound)
    return {name: shape for name, shape in tensors.items() if name.startswith("decoder.")}
