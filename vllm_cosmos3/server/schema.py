"""The request bodies in the OpenAPI page, made from the specs that the validator uses."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from vllm_cosmos3.hints import HINTS
from vllm_cosmos3.request import OF_TRANSFER, SPECS, GenerateRequest
from vllm_cosmos3.server.protocol import HIDDEN, IMAGE_ONLY, SERVER_FIELDS, VIDEO_ONLY
from vllm_cosmos3.spec import Spec

_TYPES: dict[str, dict[str, Any]] = {
    "text": {"type": "string"},
    "choice": {"type": "string"},
    "size": {"type": "string", "pattern": r"^\d+x\d+$"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "bool": {"type": "boolean"},
    "ints": {"type": "array", "items": {"type": "integer"}},
    "pair": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
    "numbers": {"type": "array", "items": {"type": "number"}},
    "rows": {"type": "array", "items": {"type": "array", "items": {"type": "number"}}},
}
_TYPES["hint"] = {"oneOf": [{"type": "boolean"}, {"type": "string"}, {"type": "object"}]}
HEADERS = (
    ("Idempotency-Key", "the same key and body again give the same job; another body is refused"),
    ("Prefer", "wait=N: answer when the video is done, or after N seconds"),
)
_IMAGE_FIELDS_NOT = {
    *HINTS, *OF_TRANSFER,
    "num_frames", "seconds", "fps", "generate_sound", "sound_duration", "use_duration_template",
    "condition_frame_indexes_vision", "condition_video_keep", "action_mode", "domain_name",
    "domain_id", "raw_action_dim", "action_chunk_size", "action", "action_path", "action_history",
    "action_state", "action_stats_path", "action_normalization", "view_point", "view_description",
    "image_size",
}  # fmt: skip


def video_request() -> dict[str, Any]:
    """The body of POST /v1/videos in its three content types."""
    names = SPECS.keys() - HIDDEN - {"n"}
    schema = _object(names, SERVER_FIELDS.keys() - IMAGE_ONLY)
    for name, kind in (("input", "picture or clip"), ("image", "picture"), ("video", "clip")):
        schema["properties"][f"{name}_reference"] = {
            "description": f"{kind} to start from: a file, or a URL of http, https, data or (where allowed) file",
            "type": "string",
            "format": "binary",
        }
    schema["properties"]["control_reference"] = {
        "description": "control clip of a transfer, of the kind control_type",
        "type": "string",
        "format": "binary",
    }
    schema["properties"]["control_type"] = {
        "description": "what kind of control the clip in control_reference is",
        "type": "string",
        "enum": list(HINTS),
    }
    kinds = ("multipart/form-data", "application/json", "application/x-www-form-urlencoded")
    return {**_body(schema, kinds), "parameters": [_header(*each) for each in HEADERS]}


def remix_request() -> dict[str, Any]:
    """The body of POST /v1/videos/{id}/remix."""
    body = video_request()
    content = body["requestBody"]["content"].values()
    for kind in content:
        kind["schema"] = {**kind["schema"], "description": "a new prompt, and what else changes"}
    return body


def image_request() -> dict[str, Any]:
    """The body of POST /v1/images/generations."""
    names = SPECS.keys() - HIDDEN - _IMAGE_FIELDS_NOT
    return _body(_object(names, SERVER_FIELDS.keys() - VIDEO_ONLY), ("application/json",))


def _header(name: str, description: str) -> dict[str, Any]:
    return {"name": name, "in": "header", "schema": {"type": "string"}, "description": description}


def _body(schema: dict[str, Any], kinds: tuple[str, ...]) -> dict[str, Any]:
    content = {kind: {"schema": schema} for kind in kinds}
    return {"requestBody": {"required": True, "content": content}}


def _object(names: set[str], server: set[str]) -> dict[str, Any]:
    defaults = {item.name: item.default for item in dataclasses.fields(GenerateRequest)}
    properties = {
        name: _field(spec, defaults[name]) for name, spec in SPECS.items() if name in names
    }
    properties |= {
        name: _field(spec, None) for name, spec in SERVER_FIELDS.items() if name in server
    }
    properties["extra_params"] = {"type": "object", "description": "more of these fields"}
    return {
        "type": "object",
        "properties": properties,
        "required": ["prompt"],
        "additionalProperties": False,
    }


def _field(spec: Spec, default: Any) -> dict[str, Any]:
    unit = f" [{spec.unit}]" if spec.unit else ""
    field = {**_TYPES[spec.kind], "description": f"{spec.help}{unit}"}
    if spec.choices:
        field["enum"] = list(spec.choices)
    if spec.kind in ("int", "float"):
        if spec.low > -math.inf:
            field["exclusiveMinimum" if spec.above else "minimum"] = spec.low
        if spec.high < math.inf:
            field["maximum"] = spec.high
    if default is not None:
        field["default"] = default
    return field
