"""Quantization: FP8 matrices, and the steps in which activations keep their precision. No torch.

"native" products have FP8 weights and FP8 activations (W8A8); "a16" ones have the same weights
and activations as they are (W8A16).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_cosmos3.errors import CheckpointError, Unsupported

MODES = ("native", "a16")
WHERE = "quantization_config in transformer/config.json"
_POLICY = "runtime.diffusion_step_policy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """FP8 (E4M3) of the matrices in the layers of both towers, chosen when a checkpoint is loaded.

    ``stored``: the checkpoint holds FP8 weights, a scale for each matrix and one for its input. If
    not, weights are quantized while they are loaded, with a scale for each output, and
    activations where they are multiplied, with a scale for each token.

    The first and the last steps are a16, the others native; steps that are both follow ``overlap``.
    ``text`` is the mode of the text tower.
    """

    stored: bool
    first_steps: int = 0
    last_steps: int = 0
    overlap: str = "a16"
    text: str = "native"

    def native(self, index: int, steps: int) -> bool:
        """Whether step ``index`` of ``steps`` quantizes activations. A single step does."""
        if steps == 1:
            return True
        first, last = index < self.first_steps, index >= steps - self.last_steps
        if first and last:
            return self.overlap == "native"
        return not (first or last)

    @property
    def scheme(self) -> str:
        """Where scales come from, in a word or two."""
        return "fp8, scales of the checkpoint" if self.stored else "fp8, quantized at load"

    def record(self) -> dict[str, object]:
        """What an answer says of it, as JSON."""
        return {
            "weights": "fp8",
            "scales": "checkpoint" if self.stored else "at load",
            "first_steps_a16": self.first_steps,
            "last_steps_a16": self.last_steps,
            "text": self.text,
        }


ON_THE_FLY = Quantization(stored=False, first_steps=3, last_steps=3, text="a16")


def read_quantization(folder: Path, values: Mapping[str, Any]) -> Quantization | None:
    """The quantization of a checkpoint from ``transformer/config.json``; None if it has none.

    Raises:
        Unsupported: it is of another method, or its step policy is one that is not known.
        CheckpointError: a field of the step policy is missing or of another type.
    """
    config = values.get("quantization_config")
    if not config:
        return None
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder}: {WHERE} is {config!r}, must be an object")
    method = config.get("quant_method"), config.get("quant_algo")
    if method != ("modelopt", "FP8"):
        raise Unsupported(
            f"{folder}: {WHERE} has quant_method {method[0]!r} and quant_algo {method[1]!r}; this "
            "version runs 'modelopt' with 'FP8', or the bfloat16 revision"
        )
    runtime = config.get("runtime") or {}
    policy = runtime.get("diffusion_step_policy") if isinstance(runtime, dict) else runtime
    return _with_policy(folder, policy) if policy else Quantization(stored=True)


def _with_policy(folder: Path, policy: Any) -> Quantization:
    def refuse(field: str, value: object, possible: str) -> Unsupported:
        return Unsupported(f"{folder}: {_POLICY}: {field} is {value!r}, must be {possible}")

    if not isinstance(policy, dict):
        raise CheckpointError(f"{folder}: {_POLICY} is {policy!r}, must be an object")
    if missing := sorted(_FIELDS - policy.keys()):
        raise CheckpointError(f"{folder}: {_POLICY} lacks {', '.join(missing)}")
    if unknown := sorted(policy.keys() - _FIELDS):
        raise refuse(unknown[0], policy[unknown[0]], "left out: this version does not know it")
    for field, expected in _FIXED.items():
        if policy[field] != expected:
            raise refuse(field, policy[field], repr(expected))
    for field in ("overlap", "reasoner"):
        if policy[field] not in MODES:
            raise refuse(field, policy[field], " or ".join(MODES))
    counts = []
    for field in ("first_steps", "last_steps"):
        steps = policy[field]
        if not isinstance(steps, dict) or steps.keys() != {"count", "mode"}:
            raise refuse(field, steps, "an object with count and mode")
        if type(steps["count"]) is not int or steps["count"] < 0:
            raise refuse(f"{field}.count", steps["count"], "an integer of at least 0")
        if steps["mode"] not in MODES:
            raise refuse(f"{field}.mode", steps["mode"], " or ".join(MODES))
        counts.append(steps["count"] if steps["mode"] == "a16" else 0)
    return Quantization(
        stored=True,
        first_steps=counts[0],
        last_steps=counts[1],
        overlap=policy["overlap"],
        text=policy["reasoner"],
    )


_FIXED = {
    "schema_version": 1,
    "type": "first_last_n",
    "index_space": "denoising_loop_iteration",
    "scope": ["transformer"],
    "default_mode": "native",
}
_FIELDS = _FIXED.keys() | {"first_steps", "last_steps", "overlap", "reasoner"}
