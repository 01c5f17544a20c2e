"""Backbones: the language models that both towers are made of, as values that their layers are built from.

Nano and Super have Qwen3's layers, Edge has Nemotron's. Names are those of the tensors. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Backbone:
    """What the layers of one language model are made of.

    ``mlp_inputs`` are the matrices that read the hidden states: a gate and what it lets through, or one
    alone. ``text_norms`` are the norms of a text layer's queries and keys, and ``seen_key_norm`` is the
    one of them whose keys the generation tower sees. ``rounds_once`` says that weights of norms multiply
    in float32, before the result is rounded.
    """

    name: str
    hidden_act: str
    mlp_inputs: tuple[str, ...]
    text_norms: tuple[str, ...]
    seen_key_norm: str
    rounds_once: bool

    @property
    def qk_norm_for_text(self) -> bool:
        """Whether the text's own attention norms its queries and keys."""
        return "norm_q" in self.text_norms

    @property
    def use_und_k_norm_for_gen(self) -> bool:
        """Whether the text's keys are made twice: for its own attention, and for the other tower's."""
        return self.seen_key_norm == "k_norm_und_for_gen"


QWEN3 = Backbone(
    name="Qwen3",
    hidden_act="silu",
    mlp_inputs=("gate_proj", "up_proj"),
    text_norms=("norm_q", "norm_k"),
    seen_key_norm="norm_k",
    rounds_once=False,
)
NEMOTRON = Backbone(
    name="Nemotron",
    hidden_act="relu2",
    mlp_inputs=("up_proj",),
    text_norms=("k_norm_und_for_gen",),
    seen_key_norm="k_norm_und_for_gen",
    rounds_once=True,
)
BACKBONES = (QWEN3, NEMOTRON)


def backbone_of(config: Mapping[str, Any]) -> Backbone | None:
    """The backbone that a text configuration names by its activation; None where it is another.

    Older exports have no such key, and are Qwen3's.
    """
    named = config.get("hidden_act", QWEN3.hidden_act)
    return next((backbone for backbone in BACKBONES if backbone.hidden_act == named), None)
