"""The request bodies in the OpenAPI page, made from the specs that the validator uses.

The page lists each field once, by its own name, with those that most requests have in front. The validator
knows more: names of other servers, and what it refuses in words of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Set
from typing import Any

from vllm_cosmos3.request.controls import CONTROLS
from vllm_cosmos3.request.fields import Spec
from vllm_cosmos3.request.request import OF_TRANSFER, SPECS, GenerateRequest
from vllm_cosmos3.server.http.request_fields import (
    HIDDEN,
    IMAGE_ONLY,
    SERVER_FIELDS,
    STRUCTURED,
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
COMMON = (  # in the order in which people ask for them
    "prompt", "input_reference", "size", "seconds", "num_frames", "fps", "seed", "num_inference_steps",
    "guidance_scale", "negative_prompt", "generate_sound", "n", "model", "continue_from", "preview",
    "upsample_prompt", "response_format", "output_format", "output_compression",
)  # fmt: skip
_IMAGE_FIELDS_NOT = {
    *CONTROLS, *OF_TRANSFER, "num_chunks",
    "seconds", "generate_sound", "sound_duration", "keep_sound",
    "condition_frame_indexes_vision", "condition_video_keep", "action_mode", "domain_name",
    "domain_id", "raw_action_dim", "action_chunk_size", "action", "action_path", "action_history",
    "action_state", "action_stats_path", "action_normalization", "view_point", "view_description",
    "image_size",
}  # fmt: skip
JSON, FORM, TEXT_FORM = (
    "application/json",
    "multipart/form-data",
    "application/x-www-form-urlencoded",
)
_START = "picture or clip to start from"
_EDITED = "picture to edit"
_SOUND = "sound that the video follows"
_CONTROL = "control clip of a transfer, of the kind control_type"
_WAYS = "a URL of http, https, data or (where allowed) file, or an object with it as image_url, video_url or url"
_OTHERS = "Names of other servers are read as well, such as num_steps for num_inference_steps."
_IN_FORMS = (
    "The common fields; those of the JSON body are read too, lists and objects as JSON text."
)
EXAMPLE = {
    "prompt": "A paper boat drifts down a stream",
    "size": "832x480",
    "seconds": 4,
    "seed": 0,
}
EDIT_EXAMPLE = {"prompt": "Paint the boat red", "seed": 0}
IMAGE_EXAMPLE = {"prompt": "A paper boat on a stream", "size": "960x960", "seed": 0}


def video_request(*headers: tuple[str, str]) -> Schema:
    """The body of POST /v1/videos in its three content types, and the headers that count."""
    return {**_body(_video_contents(EXAMPLE)), "parameters": [_header(*each) for each in headers]}


def remix_request(*headers: tuple[str, str]) -> Schema:
    """The body of POST /v1/videos/{id}/remix."""
    contents = _video_contents({"prompt": "The paper boat tips over"})
    for schema, _ in contents.values():
        schema["description"] = "A new prompt, and what else changes."
    return {**_body(contents), "parameters": [_header(*each) for each in headers]}


def image_request() -> Schema:
    """The body of POST /v1/images/generations."""
    return _body({JSON: (_object(_image_fields(), _OTHERS), IMAGE_EXAMPLE)})


def edit_request() -> Schema:
    """The body of POST /v1/images/edits: that of an image, and the picture to edit."""
    fields = _image_fields()
    form = {name: _as_text(fields[name]) for name in COMMON if name in fields}
    fields["image"] = {"type": ["string", "object"], "description": f"{_EDITED}: {_WAYS}"}
    form["image"] = {"type": "string", "format": "binary", "description": _EDITED}
    return _body(
        {
            FORM: (_object(form, _IN_FORMS), EDIT_EXAMPLE),
            JSON: (_object(fields, _OTHERS), EDIT_EXAMPLE),
        }
    )


def _image_fields() -> Schema:
    one = {"maximum": 1, "description": "1 or left out"}
    names = SPECS.keys() - HIDDEN - _IMAGE_FIELDS_NOT
    return _fields(names, SERVER_FIELDS.keys() - VIDEO_ONLY, num_frames=one)


def _video_contents(example: Schema) -> dict[str, tuple[Schema, Schema]]:
    """Schema and example of a video's body by content type, JSON first."""
    fields = _fields(
        SPECS.keys() - HIDDEN,
        SERVER_FIELDS.keys() - IMAGE_ONLY,
        n={"maximum": 1, "description": "one video per request"},
        num_frames={"minimum": 2},
        input_reference={"type": ["string", "object", "null"], "description": f"{_START}: {_WAYS}"},
        sound_path={"type": ["string", "object", "null"], "description": f"{_SOUND}: {_WAYS}"},
    )
    fields["extra_params"] = {
        "type": ["object", "string", "null"],
        "description": "more of these fields: an object, or its JSON text",
    }
    kinds = {"type": "string", "enum": [*CONTROLS], "description": "of control_reference"}
    form = {name: _as_text(fields[name]) for name in COMMON if name in fields}
    form["input_reference"] = {"type": "string", "description": f"{_START}, as a URL"}
    files = {**form, "control_type": kinds}
    for name, what in (
        ("input_reference", _START),
        ("control_reference", _CONTROL),
        ("sound_path", _SOUND),
    ):
        files[name] = {"type": "string", "format": "binary", "description": what}
    return {
        JSON: (_object(fields, _OTHERS), example),
        FORM: (_object(files, _IN_FORMS), example),
        TEXT_FORM: (_object(form, _IN_FORMS), example),
    }


def _header(name: str, description: str) -> Schema:
    return {"name": name, "in": "header", "schema": {"type": "string"}, "description": description}


def _body(contents: dict[str, tuple[Schema, Schema]]) -> Schema:
    content = {
        kind: {"schema": schema, "example": example} for kind, (schema, example) in contents.items()
    }
    return {"requestBody": {"required": True, "content": content}}


def _object(fields: Schema, description: str) -> Schema:
    return {"type": "object", "description": description, "properties": fields}


def _fields(names: Set[str], server: Set[str], **changes: Schema) -> Schema:
    """All fields of a body, the common ones first and those of actions and controls last; null is as good as none.

    ``changes`` are what the route says of a field in other words than the validator.
    """
    defaults = {item.name: item.default for item in dataclasses.fields(GenerateRequest)}
    fields = {name: _field(spec, defaults[name]) for name, spec in SPECS.items() if name in names}
    fields |= {name: _field(spec, None) for name, spec in SERVER_FIELDS.items() if name in server}
    for name, change in changes.items():
        fields[name] = fields.get(name, {}) | change
    fields["prompt"]["description"] += "; it or prompt_token_ids is needed"
    for name in STRUCTURED:
        fields[name]["type"] += ["object"]
    if "seconds" in fields:  # which OpenAI's clients write as text
        fields["seconds"]["type"] += ["string"]
    places = {name: place for place, name in enumerate(COMMON)}
    last = len(places) + 1
    order = {
        name: places.get(name, last if name in _IMAGE_FIELDS_NOT else last - 1) for name in fields
    }
    return dict(sorted(fields.items(), key=lambda item: order[item[0]]))


def _as_text(field: Schema) -> Schema:
    """A field in a form, where nothing is null and a default need not be sent."""
    kept = {name: value for name, value in field.items() if name not in ("default", "enum")}
    if "enum" in field:
        kept["enum"] = [value for value in field["enum"] if value is not None]
    return {**kept, "type": field["type"][0]}


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
