"""Modes of the yardstick: ways to generate, by names that can be joined as in fp8+sea."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_cosmos3.errors import InvalidRequest

EXACT = "exact"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """A way to generate: engine options and fields of the request that make it one."""

    name: str
    engine: Mapping[str, Any]
    fields: Mapping[str, Any]


# Name -> engine options, fields of the request.
PARTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    EXACT: ({}, {}),
    "fp8": ({"quantization": "fp8"}, {}),
    "fp8-native": (
        {"quantization": "fp8", "fp8_first_steps": 0, "fp8_last_steps": 0, "fp8_text": "native"},
        {},
    ),
    "sea": ({}, {"step_cache": "sea"}),
    "interval": ({}, {"guidance_interval": (400.0, 1000.0)}),
}


def read_modes(names: Sequence[str]) -> list[Mode]:
    """The modes of these names, the exact one first: it is what the others are compared with.

    Raises:
        InvalidRequest: a name is not made of known parts, or two of them are alternatives.
    """
    modes = [_mode(name) for name in dict.fromkeys((EXACT, *names))]
    return sorted(modes, key=lambda mode: mode.name != EXACT)


def _mode(name: str) -> Mode:
    engine: dict[str, Any] = {"quantization": "none"}
    fields: dict[str, Any] = {}
    parts = name.split("+")
    for part in parts:
        if part not in PARTS or (part == EXACT and len(parts) > 1):
            possible = f"{EXACT}, or joined by +: {', '.join(p for p in PARTS if p != EXACT)}"
            raise InvalidRequest("modes", name, possible)
        options, values = PARTS[part]
        if "quantization" in options and engine["quantization"] != "none":
            raise InvalidRequest("modes", name, "with one kind of fp8")
        engine |= options
        fields |= values
    return Mode(name=name, engine=engine, fields=fields)
