"""The request bodies in the OpenAPI page, made from the specs that the validator uses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Set
from typing import Any

from vllm_cosmos3.request.controls import CONTROLS
from vllm_cosmos3.request.fields import Spec
from vllm_cosmos3.request.request import OF_TRANSFER, SPECS, GenerateRequest
from vllm_cosmos3.server.http.request_fields import (
    ALIASES,
    HIDDEN,
    IGNORED,
    IMAGE_ONLY,
    NESTED,
    NOTHING,
    SERVER_FIELDS,
    STRUCTURED,
    UNSUPPORTED,
    VIDEO_ONLY,
)

Schema = dict[str, Any]
_TYPES: dict[str, Schema] = {
    "text": {"type": ["string"]},
    "choice": {"type": ["string"]},
    "size": {"type": ["string"], "pattern": r"^(\d{1,8}[xX]\d{1,8}|auto)$"},
    "int": {"type": ["integer"]},
    "float": {"type": ["number"]},
    "bool": {"type": ["boolean"]},
    "ints": {"type": ["array", "integer"], "items": {"type": "integer"}, "minItems": 1},
    "pair": {"type": ["array"], "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
    "numbers": {"type": ["array"], "items": {"type": "number"}, "minItems": 1},
    "rows": {
        "type": ["array"],
        "items": {"type": "array", "items": {"type": "number"}, "minItems": 1},
        "minItems": 1,
    },
    "control": {"type": ["boolean", "string", "object"]},
}
KEY = (
    "Idempotency-Key",
    "the same key and body again give the same job; another body is refused",
)
PREFER = ("Prefer", "wait=N: answer when the video is done, or after N seconds")
_MEDIA = {
    "input_reference": "picture or clip to start from",
    "input_references": "the same, as a list of one",
    "image_reference": "picture to start from",
    "video_reference": "clip to start from",
    "image": "the same as input_reference",
    "video": "the same as input_reference",
}
_WAYS = (
    "a file, a URL of http, https, data or (where allowed) file, or an object with it as image_url,"
    " video_url or url"
)
_IMAGE_FIELDS_NOT = {
    *CONTROLS, *OF_TRANSFER, "num_chunks",
    "seconds", "generate_sound", "sound_duration",
    "condition_frame_indexes_vision", "condition_video_keep", "action_mode", "domain_name",
    "domain_id", "raw_action_dim", "action_chunk_size", "action", "action_path", "action_history",
    "action_state", "action_stats_path", "action_normalization", "view_point", "view_description",
    "image_size",
}  # fmt: skip


def video_request(*headers: tuple[str, str]) -> Schema:
    """The body of POST /v1/videos in its three content types, and the headers that count."""
    schema = _object(
        SPECS.keys() - HIDDEN,
        SERVER_FIELDS.keys() - IMAGE_ONLY,
        n={"maximum": 1, "description": "one video per request"},
        num_frames={"minimum": 2},
    )
    fields = schema["properties"]
    for name, what in _MEDIA.items():
        fields[name] = _media(f"{what}: {_WAYS}")
    fields["control_reference"] = _media(
        f"control clip of a transfer, of the kind control_type: {_WAYS}"
    )
    fields["control_type"] = {
        "description": "what kind of control the clip in control_reference is",
        "type": ["string", "null"],
        "enum": [*CONTROLS, None],
    }
    kinds = ("multipart/form-data", "application/json", "application/x-www-form-urlencoded")
    return {**_body(schema, kinds), "parameters": [_header(*each) for each in headers]}


def remix_request(*headers: tuple[str, str]) -> Schema:
    """The body of POST /v1/videos/{id}/remix."""
    body = video_request(*headers)
    content = body["requestBody"]["content"].values()
    for kind in content:
        kind["schema"] = {**kind["schema"], "description": "a new prompt, and what else changes"}
    return body


def image_request() -> Schema:
    """The body of POST /v1/images/generations."""
    names = SPECS.keys() - HIDDEN - _IMAGE_FIELDS_NOT
    one = {"maximum": 1, "description": "1 or left out"}
    schema = _object(names, SERVER_FIELDS.keys() - VIDEO_ONLY, num_frames=one)
    return _body(schema, ("application/json",))


def _header(name: str, description: str) -> Schema:
    return {"name": name, "in": "header", "schema": {"type": "string"}, "description": description}


def _media(description: str) -> Schema:
    kinds = ["string", "object", "array", "null"]
    return {"type": kinds, "format": "binary", "description": description}


def _body(schema: Schema, kinds: tuple[str, ...]) -> Schema:
    content = {kind: {"schema": schema} for kind in kinds}
    return {"requestBody": {"required": True, "content": content}}


def _object(names: Set[str], server: Set[str], **changes: Schema) -> Schema:
    """All fields that are read, in any of their spellings; null is as good as none.

    ``changes`` are what the route says of a field in other words than the validator.
    """
    defaults = {item.name: item.default for item in dataclasses.fields(GenerateRequest)}
    fields = {name: _field(spec, defaults[name]) for name, spec in SPECS.items() if name in names}
    fields |= {name: _field(spec, None) for name, spec in SERVER_FIELDS.items() if name in server}
    for name, change in changes.items():
        fields[name] |= change
    fields["prompt"]["description"] += "; it or prompt_token_ids is needed"
    for name in STRUCTURED:
        fields[name]["type"] += ["object"]
    if "seconds" in fields:  # which OpenAI's clients write as text
        fields["seconds"]["type"] += ["string"]
    for name, meant in ALIASES.items():
        if meant in fields:
            fields[name] = {**fields[meant], "description": f"the same as {meant}"}
    for name in NESTED:
        text = "more of these fields: an object, or its JSON text"
        fields[name] = {"type": ["object", "string", "null"], "description": text}
    for name in sorted(IGNORED):
        fields[name] = {"description": "accepted with a warning: it has no effect on this model"}
    for name, possible in UNSUPPORTED.items():
        fields[name] = {"enum": [*NOTHING, None], "description": f"must be {possible}"}
    return {"type": "object", "properties": fields, "additionalProperties": False}


def _field(spec: Spec, default: Any) -> Schema:
    unit = f" [{spec.unit}]" if spec.unit else ""
    kind = _TYPES[spec.kind]
    field = {**kind, "type": [*kind["type"], "null"], "description": f"{spec.help}{unit}"}
    if spec.choices:
        field["enum"] = [*spec.choices, None]
    if spec.kind == "text" and spec.high < math.inf:
        field["maxLength"] = int(spec.high)
    if spec.kind in ("int", "float", "ints"):
        field |= _range(spec)
    if spec.kind in ("ints", "pair"):
        field["items"] = kind["items"] | _range(spec)
    if default is not None:
        field["default"] = default
    return field


def _range(spec: Spec) -> Schema:
    limits = {}
    if spec.low > -math.inf:
        limits["exclusiveMinimum" if spec.above else "minimum"] = spec.low
    if spec.high < math.inf:
        limits["maximum"] = spec.high
    return limits
