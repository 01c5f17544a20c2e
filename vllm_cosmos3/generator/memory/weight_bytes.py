"""Bytes of the weights of one rank, from the inventory of the checkpoint's tensors."""

from __future__ import annotations

import re
from math import prod

from vllm_cosmos3.checkpoint.config import ModelConfig
from vllm_cosmos3.checkpoint.tensors import (
    Tensors,
    layer_matrices,
    parameters,
    sound_tensors,
    transformer_tensors,
    vae_tensors,
)

FLOAT32 = 4
VOCABULARY_MULTIPLE = 64  # rows of vLLM's embedding
_GENERATION = re.compile(r"^layers\.\d+\..*(moe_gen|add)")
_LAYER = re.compile(r"^layers\.")
_TEXT_LAST = ("input_layernorm.", "self_attn.to_k.", "self_attn.to_v.")  # and the keys' norm
_NOT_LOADED = ("lm_head.", "norm.")
_ROW_PARALLEL = re.compile(r"(to_out|to_add_out|down_proj)\.weight$")  # inputs are divided
_FIRST_OF_JOINED = ("to_q", "add_q_proj", "to_out", "to_add_out", "down_proj")  # and of the MLP's
_MERGING = 3 * FLOAT32  # bytes of a value: the matrix, what it becomes, and what is added
_QUANTIZING = 2 * FLOAT32 + 1  # bytes of a value, at the peak: in float32, scaled, and FP8


def weights(model: ModelConfig, *, tensor_parallel_size: int, element_size: int) -> dict[str, int]:
    """Bytes by part of the model on one rank; ``element_size`` are the bytes of a value.

    Norms, adapters and autoencoders are on every rank, matrices of the layers are divided.
    """
    config, tp = model.transformer, tensor_parallel_size
    last = f"layers.{config.num_hidden_layers - 1}."
    text_last = (*_TEXT_LAST, f"self_attn.{config.backbone.seen_key_norm}.")
    parts = dict.fromkeys(("understanding", "embedding", "generation", "adapters"), 0)
    for name, shape in transformer_tensors(config).items():
        if name.startswith(_NOT_LOADED):
            continue
        if _GENERATION.search(name):
            parts["generation"] += _of_layer(model, name, shape, tp, element_size)
        elif _LAYER.search(name):
            if not name.startswith(last) or name.removeprefix(last).startswith(text_last):
                parts["understanding"] += _of_layer(model, name, shape, tp, element_size)
        elif name.startswith("embed_tokens."):
            rows = -(-shape[0] // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
            parts["embedding"] += rows // tp * shape[1] * element_size
        else:
            parts["adapters"] += prod(shape) * (
                FLOAT32 if "time_embedder" in name else element_size
            )
    parts["video autoencoder"] = parameters(vae_tensors(model.vae)) * element_size
    if model.sound is not None:
        parts["sound autoencoder"] = parameters(sound_tensors(model.sound)) * FLOAT32
    return parts


def layer_bytes(model: ModelConfig, *, tensor_parallel_size: int, element_size: int) -> int:
    """Bytes of one whole layer of either tower on one rank."""
    return sum(
        _of_layer(model, name, shape, tensor_parallel_size, element_size)
        for name, shape in transformer_tensors(model.transformer).items()
        if name.startswith("layers.0.") and _GENERATION.search(name)
    )


def _of_layer(
    model: ModelConfig, name: str, shape: tuple[int, ...], tp: int, element_size: int
) -> int:
    """Bytes of a tensor of a layer on one rank, with its scales."""
    if len(shape) == 1:
        return prod(shape) * element_size
    if model.quantization is None:
        return prod(shape) // tp * element_size
    config = model.transformer
    scales = shape[0] if _ROW_PARALLEL.search(name) else shape[0] // tp
    # Joined with values alone.
    last = f"layers.{config.num_hidden_layers - 1}.self_attn.to_k.weight"
    first = {*_FIRST_OF_JOINED, config.backbone.mlp_inputs[0]}
    scales += model.quantization.stored and (name == last or name.split(".")[-2] in first)
    return prod(shape) // tp + scales * FLOAT32


def loading(model: ModelConfig, parts: dict[str, int], *, element_size: int, dummy: bool) -> int:
    """Bytes at the peak of loading the ``parts`` that rest on the device.

    An autoencoder is built in float32 before it is cast. Random weights are drawn in float32, one
    tensor at a time; read ones come from the host. Adapters are merged on the device, in float32.
    """

    def drawn(tensors: Tensors) -> int:
        return max(prod(shape) for shape in tensors.values()) * FLOAT32 if dummy else 0

    towers = ("understanding", "embedding", "generation", "adapters")
    base = sum(parts.get(name, 0) for name in towers)
    tensors = transformer_tensors(model.transformer)
    loaded = {name: s for name, s in tensors.items() if not name.startswith(_NOT_LOADED)}
    merging = _merging(model, loaded, element_size)
    peak = base + max(drawn(loaded), merging, _quantizing(model, loaded, element_size, dummy=dummy))
    built = parts["video autoencoder"]
    cast = built * FLOAT32 // element_size
    tensors = vae_tensors(model.vae)
    peak = max(peak, base + max(cast, built + drawn(tensors)))
    base += built
    if model.sound is not None:
        sound = parts["sound autoencoder"]
        peak = max(peak, base + sound + drawn(sound_tensors(model.sound)))
    return peak


def _quantizing(model: ModelConfig, tensors: Tensors, element_size: int, *, dummy: bool) -> int:
    """Bytes beside the weights while the largest matrix is quantized; none if the files hold FP8."""
    if model.quantization is None or (model.quantization.stored and not dummy):
        return 0
    largest = max(prod(shape) for shape in layer_matrices(tensors).values())
    return largest * (_QUANTIZING + (0 if dummy or element_size == FLOAT32 else element_size))


def _merging(model: ModelConfig, tensors: Tensors, element_size: int) -> int:
    """Bytes beside the weights while an adapter is merged into the largest of its matrices."""
    changed = {name for adapter in model.adapters for name in adapter.pairs} & tensors.keys()
    largest = max((prod(tensors[name]) for name in changed), default=0)
    return largest * (_MERGING + element_size)
