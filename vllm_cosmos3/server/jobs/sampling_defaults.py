"""Sampling defaults of a server: its own defaults for the fields of videos."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vllm_cosmos3.checkpoint.config import ModelConfig
from vllm_cosmos3.checkpoint.kinds import VIDEO_MODES
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.request.defaults import Defaults, defaults_of
from vllm_cosmos3.request.parameters import changed_defaults
from vllm_cosmos3.request.request import from_fields
from vllm_cosmos3.server.http.request_fields import VIDEO, ClientRequest, translate
from vllm_cosmos3.server.jobs.value_sources import in_other_words

OPTION = "default_sampling_params"
STAGE = "0"  # vLLM-Omni's name of the only one, under which its users write them


def read_sampling_defaults(text: str) -> dict[str, Any]:
    """The fields of a request in the JSON of the option, under the names that requests may use.

    Raises:
        InvalidRequest: it is no object, or a field cannot have its value.
    """
    if not text:
        return {}
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if isinstance(value, dict) and value.keys() == {STAGE}:
        value = value[STAGE]
    if not isinstance(value, dict):
        raise InvalidRequest(OPTION, text, "a JSON object with fields of a request")
    try:
        request = translate(value, VIDEO)
        for name in (*request.server_fields, *request.references):
            raise InvalidRequest(name, "given", "left out: each request says it")
        from_fields({"prompt": "a prompt", **request.fields})
    except InvalidRequest as error:
        field = f"{OPTION}.{error.field}"
        raise InvalidRequest(field, error.value, error.possible, error.code) from None
    return request.fields


def shown_defaults(model: ModelConfig, fields: Mapping[str, Any]) -> dict[str, Defaults]:
    """The defaults by mode: those of the checkpoint, and for videos those of the server over them."""
    found = dict(defaults_of(model.kind))
    if fields:
        request = from_fields({"prompt": "a prompt", **fields})
        for mode in found.keys() & set(VIDEO_MODES):
            found[mode] = changed_defaults(found[mode], request, model)
    return found


def with_defaults(request: ClientRequest, kind: str, defaults: Mapping[str, Any]) -> ClientRequest:
    """The request of a job of this kind with the server's defaults under its own fields.

    Pictures and actions have none: their numbers follow from other things.
    """
    if kind == "image" or "action_mode" in request.fields:
        return request
    said = in_other_words(request.fields)
    missing = {name: value for name, value in defaults.items() if name not in said}
    return replace(request, fields={**missing, **request.fields})
