"""Control clips of a transfer in an HTTP body: what is a file travels as one, the rest as a field.

``edge=true``, ``depth=URL``, ``depth={"control_path": PATH, "control_weight": 2}``, an upload under
the name of the control, and ``control_reference`` with ``control_type`` all say the same thing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.request.controls import CONTROLS, PRESET_OF
from vllm_cosmos3.server.http import json_text
from vllm_cosmos3.server.http.api_errors import ApiError

PAIR = ("control_reference", "control_type")  # one upload and which control it shows
SOURCES = ("control", "control_path")
TRUTH = {"true": True, "false": False}


def split(path: str, value: Any) -> tuple[Any, str, Any]:
    """What the validator gets for a control, and where its clip stood, and the clip or None.

    Raises:
        InvalidRequest: an object that is not JSON, or that names two clips.
    """
    text = value.strip() if isinstance(value, str) else ""
    if text.lower() in TRUTH:
        return TRUTH[text.lower()], path, None
    if text.startswith("{"):
        value = json_object(path, text)
    if not isinstance(value, Mapping):
        return (value, path, None) if isinstance(value, bool | int | float) else ({}, path, value)
    parts = {key: _typed(key, part) for key, part in value.items()}
    given = [key for key in SOURCES if parts.get(key) is not None]
    if len(given) != 1:
        return parts, path, None
    return parts, f"{path}.{given[0]}", parts.pop(given[0])


def paired(pair: Mapping[str, tuple[str, Any]]) -> tuple[str, str, Any] | None:
    """Control, path and clip of ``control_reference`` with ``control_type``; None if neither is given.

    Raises:
        InvalidRequest: one without the other, or another type.
    """
    if not pair:
        return None
    for name, other in (PAIR, PAIR[::-1]):
        if name not in pair:
            possible = f"given together with {other}"
            raise InvalidRequest(name, None, possible, "missing_required")
    (path, clip), (type_path, name) = (pair[name] for name in PAIR)
    if name not in CONTROLS:
        raise InvalidRequest(type_path, name, f"one of {', '.join(CONTROLS)}")
    return str(name), path, clip


def joined(fields: Mapping[str, Any], media: Mapping[str, Path]) -> dict[str, Any]:
    """The fields of a request with its files, each where the validator expects it."""
    out = {**fields}
    for name, file in media.items():
        parts = fields.get(name)
        out[name] = (
            {**(parts if isinstance(parts, Mapping) else {}), "control": file}
            if name in CONTROLS
            else file
        )
    return out


def json_object(path: str, text: str) -> Any:
    """What the text of a form says in JSON. An error of this path where it is not that."""
    try:
        return json_text.read(text, path)
    except json_text.Misread as error:
        raise ApiError(error.code, str(error), param=error.path) from None
    except json.JSONDecodeError as error:
        where = f"JSON; it ends to be so at character {error.pos}: {error.msg}"
        raise InvalidRequest(path, text, where, "invalid_json") from None
    except (ValueError, RecursionError):  # thousands of digits or brackets
        possible = "JSON of ordinary numbers and depth"
        raise InvalidRequest(path, text, possible, "invalid_json") from None


def _typed(key: str, part: Any) -> Any:
    """The text of a form as the value it stands for."""
    if not isinstance(part, str):
        return part
    if key in PRESET_OF.values():
        return str(part)
    if key == "control_weight":
        try:
            return number(part, float)
        except ValueError:
            return str(part)
    return part


def number(text: str, kind: type[int] | type[float]) -> int | float:
    """The number that a text is. Python reads more than other programs write, such as 1_000."""
    if not text.isascii() or "_" in text:
        raise ValueError(text)
    return kind(text)
