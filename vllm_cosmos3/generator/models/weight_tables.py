"""Weight tables: which parameters of the towers the tensors of ``transformer/`` fill. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from vllm_cosmos3.checkpoint.backbone import Backbone
from vllm_cosmos3.checkpoint.config import TransformerConfig
from vllm_cosmos3.checkpoint.shards import SCALES, Target
from vllm_cosmos3.checkpoint.tensors import GENERATION_NORMS
from vllm_cosmos3.generator.models.stored_modalities import adapter_weights

_Rows = dict[str, tuple[str, str | int | None]]


def weight_table(config: TransformerConfig) -> dict[str, Target]:
    """Parameters that the tensors of ``transformer/`` fill. Tensors not listed here are not needed."""
    outer = _OUTER | adapter_weights(config)
    table = {name: Target(parameter) for name, parameter in outer.items()}
    backbone, last = config.backbone, config.num_hidden_layers - 1
    text_last = _TEXT_LAST | {f"self_attn.{backbone.seen_key_norm}": ("k_norm", None)}
    text_layer = _TEXT_LAYER | _norms(backbone.text_norms) | _mlp("mlp", backbone)
    generation_layer = _GENERATION_LAYER | _norms(GENERATION_NORMS) | _mlp("mlp_moe_gen", backbone)
    for index in range(config.num_hidden_layers):
        text = text_last if index == last else text_layer
        place = "understanding.last" if index == last else f"understanding.layers.{index}"
        for rows, module in ((text, place), (generation_layer, f"layers.{index}")):
            for name, (layer, part) in rows.items():
                table[f"layers.{index}.{name}.weight"] = Target(f"{module}.{layer}.weight", part)
    return table


def scale_table(table: Mapping[str, Target], matrices: Iterable[str]) -> dict[str, Target]:
    """Where the scales of those ``matrices`` go that the table has."""
    return {
        f"{name.removesuffix('.weight')}{scale}": scale_target(table[name], scale)
        for name in matrices
        if name in table
        for scale in SCALES
    }


def scale_target(target: Target, scale: str) -> Target:
    """Where a scale of the matrix goes that fills ``target``."""
    return Target(f"{target.parameter.removesuffix('.weight')}{scale}", target.part)


def _norms(names: Iterable[str]) -> _Rows:
    """The norms of a layer's queries and keys."""
    return {f"self_attn.{name}": (_NORM_OF_HEADS[name], None) for name in names}


def _mlp(name: str, backbone: Backbone) -> _Rows:
    return {f"{name}.{matrix}": ("up", part) for part, matrix in enumerate(backbone.mlp_inputs)}


_OUTER = {
    "embed_tokens.weight": "understanding.embed_tokens.weight",
    "norm_moe_gen.weight": "norm.weight",
    "time_embedder.linear_1.weight": "time.linear_1.weight",
    "time_embedder.linear_1.bias": "time.linear_1.bias",
    "time_embedder.linear_2.weight": "time.linear_2.weight",
    "time_embedder.linear_2.bias": "time.linear_2.bias",
}
_NORM_OF_HEADS = {
    "norm_q": "heads.q_norm",
    "norm_k": "heads.k_norm",
    "k_norm_und_for_gen": "heads.seen_norm",
    "norm_added_q": "heads.q_norm",
    "norm_added_k": "heads.k_norm",
}
_TEXT_LAST: _Rows = {
    "input_layernorm": ("input_norm", None),
    "self_attn.to_k": ("kv", 0),
    "self_attn.to_v": ("kv", 1),
}
_TEXT_LAYER: _Rows = {
    "input_layernorm": ("input_norm", None),
    "self_attn.to_q": ("qkv", "q"),
    "self_attn.to_k": ("qkv", "k"),
    "self_attn.to_v": ("qkv", "v"),
    "self_attn.to_out": ("out", None),
    "post_attention_layernorm": ("post_norm", None),
    "mlp.down_proj": ("down", None),
}
_GENERATION_LAYER: _Rows = {
    "input_layernorm_moe_gen": ("input_norm", None),
    "self_attn.add_q_proj": ("qkv", "q"),
    "self_attn.add_k_proj": ("qkv", "k"),
    "self_attn.add_v_proj": ("qkv", "v"),
    "self_attn.to_add_out": ("out", None),
    "post_attention_layernorm_moe_gen": ("post_norm", None),
    "mlp_moe_gen.down_proj": ("down", None),
}
