"""Names of LoRA tensors: those of the Cosmos Framework, peft and diffusers, for the names of a checkpoint. No torch."""

from __future__ import annotations

import re
from typing import NamedTuple

# What trainers put around the transformer.
_WRAPPER = r"(?:base_model|model|net|transformer|language_model|module|_orig_mod)\."
_LORA = re.compile(
    rf"^(?P<wrappers>(?:{_WRAPPER})*)(?P<module>.+)\."
    r"(?:lora_(?P<part>[AB])(?:\.[^.]+)?\.weight"
    r"|lora_(?P<magnitude>magnitude_vector)(?:\.[^.]+)?(?:\.weight)?)$"
)
_FRAMEWORK = {  # of the attention; the MLPs are called alike
    "q_proj": "to_q",
    "k_proj": "to_k",
    "v_proj": "to_v",
    "o_proj": "to_out",
    "q_proj_moe_gen": "add_q_proj",
    "k_proj_moe_gen": "add_k_proj",
    "v_proj_moe_gen": "add_v_proj",
    "o_proj_moe_gen": "to_add_out",
}


class LoraName(NamedTuple):
    """A tensor of an adapter: the matrix that it changes, and what of the change it is.

    ``tensor`` is the name in ``transformer/``, ``part`` is A, B or (of DoRA) magnitude, ``module`` the
    matrix as the trainer called it.
    """

    tensor: str
    part: str
    module: str
    dialect: str


def parsed(name: str) -> LoraName | None:
    """What a tensor of an adapter's file is; None if its name is not one of LoRA."""
    found = _LORA.match(name)
    if found is None:
        return None
    wrappers, module = found["wrappers"], found["module"]
    path, _, leaf = module.rpartition(".")
    of_framework = path.endswith("self_attn") and leaf in _FRAMEWORK
    if wrappers.startswith("base_model."):
        dialect = "peft"
    elif of_framework or "language_model." in wrappers:
        dialect = "framework"
    else:
        dialect = "diffusers"
    ours = f"{path}.{_FRAMEWORK[leaf]}" if of_framework else module
    whole = f"{wrappers}{module}".removeprefix("base_model.model.")
    return LoraName(f"{ours}.weight", found["part"] or "magnitude", whole, dialect)
