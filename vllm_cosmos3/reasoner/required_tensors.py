"""Which tensors the reasoner needs from a checkpoint, and whether they are all there.

vLLM starts with uninitialised memory where a tensor is absent and answers with noise. So the names
and shapes are derived from the configuration and compared with what a folder holds (its headers,
before the engine starts) and with what arrives while the weights are loaded. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import json
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from vllm_cosmos3.checkpoint.backbone import NEMOTRON, Backbone, backbone_of
from vllm_cosmos3.checkpoint.config import VisionConfig, read_json, siglip_config
from vllm_cosmos3.checkpoint.tensors import GENERATION, Tensors, siglip_tensors, vision_tensors
from vllm_cosmos3.errors import CheckpointError

TEXT, VISION = "transformer", "vision_encoder"  # the two folders that are read

# Tensors of the generator, which shares the folder and its layers with the reasoner.
GENERATOR = re.compile(
    GENERATION.pattern
    + r"|\.k_norm_und_for_gen\."  # of the text, for the generator's eyes
    + r"|\.(input|weight|output)_quantizer\."  # ModelOpt's own dialect, which vLLM does not read
)


class Expected(NamedTuple):
    """Where one tensor must lie, and its shape."""

    folder: str
    shape: tuple[int, ...]


class HasShape(Protocol):
    """What is compared of a tensor."""

    @property
    def shape(self) -> Any: ...


_Tensor = TypeVar("_Tensor", bound=HasShape)


def is_generator(name: str) -> bool:
    """Whether a tensor of ``transformer/`` belongs to the generator."""
    return GENERATOR.search(name) is not None


def expected_tensors(config: Mapping[str, Any]) -> dict[str, Expected]:
    """Every tensor of the reasoner, by the name the checkpoint gives it.

    ``config`` is the root ``config.json``; CheckpointError names a key that it lacks.
    """
    try:
        tied, backbone = bool(config.get("tie_word_embeddings")), backbone_of(config["text_config"])
        if backbone is None:
            raise CheckpointError(
                f"config.json: hidden_act is {config['text_config']['hidden_act']!r}, which no "
                "Cosmos 3 reasoner has"
            )
        text = _text_tensors(config["text_config"], backbone, tied=tied)
        vision = _vision_tensors(config, backbone)
    except KeyError as missing:
        raise CheckpointError(f"config.json lacks the key {missing}") from None
    return {name: Expected(TEXT, shape) for name, shape in text.items()} | {
        name: Expected(VISION, shape) for name, shape in vision.items()
    }


def check_folder(folder: Path, expected: Mapping[str, Expected]) -> None:
    """Compare the safetensors headers in ``folder`` with what is expected; reads no weights.

    CheckpointError, in one sentence, names the first folder, file or tensor that is wrong.
    """
    found: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for part in dict.fromkeys(where.folder for where in expected.values()):
        if not (folder / part).is_dir():
            raise CheckpointError(f"{part}/ is missing in {folder}")
        for shard in sorted((folder / part).glob("*.safetensors")):
            found |= {name: (shard, shape) for name, shape in _read_header(shard).items()}
    missing = [name for name in expected if name not in found]
    if missing:
        raise CheckpointError(_missing(folder, missing, expected))
    for name, where in expected.items():
        shard, shape = found[name]
        check_shape(name, shape, where, str(shard))


def only_expected(
    weights: Iterable[tuple[str, _Tensor]], expected: Mapping[str, Expected], unknown: list[str]
) -> Iterator[tuple[str, _Tensor]]:
    """Pass on the expected tensors; raise at the end if one did not come.

    Tensors of the generator are dropped, others that are not expected are dropped and their names
    appended to ``unknown``.
    """
    waiting = dict(expected)
    for name, tensor in weights:
        if name not in expected:
            if not is_generator(name):
                unknown.append(name)
            continue
        waiting.pop(name, None)
        check_shape(name, tuple(tensor.shape), expected[name], f"{expected[name].folder}/")
        yield name, tensor
    if waiting:
        name, where = next(iter(waiting.items()))
        raise CheckpointError(
            f"{name} is missing in {where.folder}/ of the checkpoint{_others(len(waiting) - 1)}"
        )


def check_shape(name: str, shape: tuple[int, ...], expected: Expected, place: str) -> None:
    """CheckpointError unless a tensor has the shape that the configuration implies."""
    if shape != expected.shape:
        raise CheckpointError(
            f"{name} in {place} has shape {list(shape)}, must be {list(expected.shape)}"
        )


def _text_tensors(c: Mapping[str, Any], backbone: Backbone, *, tied: bool) -> Tensors:
    hidden, mlp, head = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    query, kv = c["num_attention_heads"] * head, c["num_key_value_heads"] * head
    layer = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.to_q": (query, hidden),
        "self_attn.to_k": (kv, hidden),
        "self_attn.to_v": (kv, hidden),
        "self_attn.to_out": (hidden, query),
        "mlp.down_proj": (hidden, mlp),
    }
    layer |= {f"mlp.{matrix}": (mlp, hidden) for matrix in backbone.mlp_inputs}
    if backbone.qk_norm_for_text:
        layer |= {f"self_attn.{norm}": (head,) for norm in backbone.text_norms}
    tensors = {"embed_tokens.weight": (c["vocab_size"], hidden), "norm.weight": (hidden,)}
    if not tied:
        tensors["lm_head.weight"] = (c["vocab_size"], hidden)
    for index in range(c["num_hidden_layers"]):
        tensors |= {f"layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    return tensors


def _vision_tensors(config: Mapping[str, Any], backbone: Backbone) -> Tensors:
    if backbone is NEMOTRON:
        return siglip_tensors(siglip_config(config))
    values = config["vision_config"]
    chosen = {field.name: values[field.name] for field in dataclasses.fields(VisionConfig)}
    return vision_tensors(VisionConfig(**chosen))


def _read_header(shard: Path) -> Tensors:
    """Shapes by name from the header of a safetensors file, whose length must fit the header."""
    size = shard.stat().st_size
    with shard.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise CheckpointError(f"{shard} is truncated: its header is incomplete")
        try:
            header = json.loads(file.read(length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
            shapes = {name: tuple(entry["shape"]) for name, entry in tensors.items()}
        except (ValueError, AttributeError, KeyError, TypeError, IndexError):
            raise CheckpointError(f"{shard} is not a safetensors file") from None
    if 8 + length + end != size:
        raise CheckpointError(
            f"{shard} is truncated: it has {size} bytes, must have {8 + length + end}"
        )
    return shapes


def _missing(folder: Path, missing: list[str], expected: Mapping[str, Expected]) -> str:
    """The sentence for absent tensors: names the shard if the index knows an absent one."""
    name = missing[0]
    part = expected[name].folder
    shard = _indexed(folder, part).get(name)
    others = _others(len(missing) - 1)
    if shard is not None and not (folder / shard).is_file():
        return f"{shard} is missing in {folder}, it holds {name}{others}"
    return f"{name} is missing in {folder / part}{others}"


def _indexed(folder: Path, part: str) -> dict[str, str]:
    """Files by tensor name, relative to ``folder``: the root index, else the one of the part."""
    root = folder / "model.safetensors.index.json"
    if root.is_file():
        return dict(read_json(root)["weight_map"])
    for index in sorted((folder / part).glob("*.safetensors.index.json")):
        return {name: f"{part}/{file}" for name, file in read_json(index)["weight_map"].items()}
    return {}


def _others(count: int) -> str:
    return f", and {count} more tensor{'s' * (count > 1)}" if count else ""
