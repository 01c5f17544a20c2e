"""Presets: named trades of exactness for speed, each a documented set of other fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_cosmos3.checkpoint.config import ModelConfig
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.request.request import PRESETS, GenerateRequest

IMAGE_INTERVAL = (400.0, 1000.0)  # of guidance: what other servers of this model take for pictures


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """What a preset comes to for one request; ``name`` is None where fields were chosen one by one."""

    name: str | None
    step_cache: bool
    guidance_interval: tuple[float, float] | None


def chosen(request: GenerateRequest, model: ModelConfig) -> Chosen:
    """The preset of a request, whose own fields come first.

    exact: nothing that changes the result; high: pictures are guided at timesteps 400 to 1000 alone,
    and weights may be FP8; fast: base checkpoints reuse steps as well.

    Raises:
        InvalidRequest: the preset cannot be had of this checkpoint, or another field contradicts it.
    """
    name, quantized = request.preset, model.quantization is not None
    if name == "exact" and quantized:
        possible = "high or fast, or left out: the weights are FP8 here"
        raise InvalidRequest("preset", name, possible, "unsupported_by_model")
    if name == "exact" and request.step_cache == "sea":
        possible = "none or left out, as preset is exact"
        raise InvalidRequest("step_cache", request.step_cache, possible, "conflict")
    if name is None:
        exact = not quantized and request.step_cache != "sea"
        return Chosen(name="exact" if exact else None, step_cache=False, guidance_interval=None)
    picture = request.mode == "text2image" and not model.distilled
    return Chosen(
        name=name,
        step_cache=name == "fast" and model.kind == "base",
        guidance_interval=IMAGE_INTERVAL if name != "exact" and picture else None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PresetRule:
    """What an operator says of presets: the one of requests that name none, and which are allowed."""

    default: str | None = None
    allowed: tuple[str, ...] = PRESETS

    @classmethod
    def read(cls, default: str, allowed: str) -> PresetRule:
        """From two options: "" for no default, and names joined by commas, "" for all.

        Raises:
            InvalidRequest: a name is not that of a preset, or the default is not allowed.
        """
        names = tuple(name.strip() for name in allowed.split(",")) if allowed else PRESETS
        for name in names:
            if name not in PRESETS:
                possible = f"names joined by commas, of {', '.join(PRESETS)}"
                raise InvalidRequest("presets", allowed, possible)
        if default and default not in names:
            raise InvalidRequest("preset", default, f"one of presets: {', '.join(names)}")
        if not default and names != PRESETS:
            default = names[0]
        return cls(default=default or None, allowed=names)

    def applied(self, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """The fields of a request with the default, if it names no preset.

        Raises:
            InvalidRequest: they ask for what is not allowed.
        """
        name = fields.get("preset")
        name = self.default if name is None else name
        if name in PRESETS and name not in self.allowed:
            possible = f"{' or '.join(self.allowed)}, which the operator allows"
            raise InvalidRequest("preset", name, possible, "permission_denied")
        cache = fields.get("step_cache")
        owners = {"sea": {"fast"}, "none": {"exact", "high"}}.get(str(cache), set(self.allowed))
        if not owners & set(self.allowed):
            possible = f"left out: the operator allows {' and '.join(self.allowed)}"
            raise InvalidRequest("step_cache", cache, possible, "permission_denied")
        return fields if name is None else {**fields, "preset": name}
