"""Settings of an adapter: its alphas and its rule of scaling, from wherever its trainer has left them. No torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vllm_cosmos3.checkpoint.config import read_json
from vllm_cosmos3.errors import CheckpointError, Unsupported

PEFT_FILE = "adapter_config.json"
IN_METADATA = "lora_adapter_metadata"  # of safetensors files that diffusers writes
# Settings of peft that change what is computed, or the weights that it is added to, and their value
# where they do not.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA", None),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """How much an adapter adds. ``alpha`` is None where nobody says it, ``patterns`` have other ones.

    With ``rslora`` the sum is divided by the square root of the rank instead of the rank.
    """

    alpha: float | None = None
    patterns: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False

    def alpha_of(self, module: str) -> float | None:
        """That of a matrix, by its name in the adapter: of the first pattern that it ends with, as in peft."""
        for pattern, alpha in self.patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return alpha
        return self.alpha

    def divided(self, alpha: float, rank: int) -> float:
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def read_settings(file: Path, metadata: Mapping[str, str]) -> LoraSettings:
    """Settings of the adapter in ``file``, whose ``metadata`` are given.

    Raises:
        Unsupported: it is another method than LoRA, rsLoRA or DoRA.
        CheckpointError: a value is of another type.
    """
    folder = file.parent
    if (folder / PEFT_FILE).is_file():
        return _of_peft(folder / PEFT_FILE, read_json(folder / PEFT_FILE))
    if IN_METADATA in metadata:
        return _of_diffusers(file, metadata[IN_METADATA])
    for name in ("config.json", "config.yaml"):  # of an export of the framework, or of its training
        if (folder / name).is_file():
            found = _lora_alpha(_read(folder / name))
            if found is not None:
                return LoraSettings(alpha=_number(folder / name, "lora_alpha", found))
    return LoraSettings()


def _of_diffusers(file: Path, text: str) -> LoraSettings:
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: {IN_METADATA} is no JSON object")
    return _of_peft(file, {name.removeprefix("transformer."): v for name, v in values.items()})


def _of_peft(file: Path, values: Mapping[str, Any]) -> LoraSettings:
    for name, neutral in _NEUTRAL.items():
        value = values.get(name)
        if value not in neutral:
            raise Unsupported(
                f"{file}: {name} is {value!r}, must be {' or '.join(map(repr, neutral[:1]))}: this "
                "version merges LoRA, rsLoRA and DoRA"
            )
    patterns = values.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{file}: alpha_pattern is {patterns!r}, must be an object")
    alpha = values.get("lora_alpha")
    return LoraSettings(
        alpha=None if alpha is None else _number(file, "lora_alpha", alpha),
        patterns={key: _number(file, f"alpha_pattern.{key}", v) for key, v in patterns.items()},
        rslora=bool(values.get("use_rslora")),
    )


def _number(file: Path, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise CheckpointError(f"{file}: {name} is {value!r}, must be a number")
    return float(value)


def _read(file: Path) -> Any:
    if file.suffix == ".json":
        return read_json(file)
    try:
        return yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        return None  # with tags of its trainer, perhaps: somebody else has to say the alpha


def _lora_alpha(values: Any) -> Any:
    """``model.config.lora_alpha``, where it is."""
    for key in ("model", "config", "lora_alpha"):
        if not isinstance(values, dict):
            return None
        values = values.get(key)
    return values
