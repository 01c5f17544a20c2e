"""Controls of a transfer: the five signals a video can follow, and what a request says of each.

The presets and the strengths of guidance are those that the model was tuned with. No pixels here:
`transfer` computes and reads them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

from vllm_cosmos3.errors import InvalidRequest

if TYPE_CHECKING:
    from vllm_cosmos3.media import VideoSource

CONTROLS = ("edge", "blur", "depth", "seg", "wsm")  # in the order of the sequence
COMPUTED = ("edge", "blur")  # from the video itself, where no control is given
PRESETS = ("none", "very_low", "low", "medium", "high", "very_high")
PRESET_OF = {"edge": "preset_edge_threshold", "blur": "preset_blur_strength"}
CONTROL_GUIDANCE = {"edge": 1.5, "blur": 1.5, "depth": 1.5, "seg": 2.0, "wsm": 3.0}  # if alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """One control signal of a request.

    ``clip`` shows it, or None where it is computed from the request's video.
    ``weight`` counts against those of the other controls. ``preset`` is how strongly edges are
    filtered or how much is blurred.
    """

    clip: VideoSource | None = None
    weight: float = 1.0
    preset: str = "medium"


def control_of(name: str, value: Any) -> Control | None:
    """The control that a field stands for: true, a clip, or an object of its parts; false is none.

    Raises:
        InvalidRequest: a part is unknown, of the wrong type or out of range.
    """
    if value is False or isinstance(value, Control):
        return value or None
    if value is True:
        value = {}
    elif isinstance(value, Real):
        raise InvalidRequest(name, value, "true, a video, or an object", "invalid_type")
    elif not isinstance(value, Mapping):
        value = {"control": value}
    parts = ["control", "control_path", "control_weight"]
    parts += [PRESET_OF[name]] if name in PRESET_OF else []
    for part in value:
        if part not in parts:
            possible = f"{name} has {', '.join(parts)}"
            raise InvalidRequest(f"{name}.{part}", value[part], possible, "unknown_parameter")
    clip, path = value.get("control"), value.get("control_path")
    if clip is not None and path is not None:
        possible = f"left out, as {name}.control is given"
        raise InvalidRequest(f"{name}.control_path", path, possible, "conflict")
    clip = path if clip is None else clip
    if isinstance(clip, (bool, Real, Mapping)):
        possible = "a file, bytes, a list of PIL images or a uint8 array [T,H,W,3]"
        raise InvalidRequest(f"{name}.control", clip, possible, "invalid_type")
    if clip is None and name not in COMPUTED:
        possible = "a clip that shows it: only edge and blur are computed from the video"
        raise InvalidRequest(f"{name}.control", None, possible, "missing_required")
    return Control(
        clip=clip,
        weight=_weight(name, value.get("control_weight")),
        preset=_preset(name, value.get(PRESET_OF.get(name, ""))),
    )


def _weight(name: str, value: Any) -> float:
    if value is None:
        return 1.0
    possible = "a finite number of at least 0"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InvalidRequest(f"{name}.control_weight", value, possible, "invalid_type")
    try:
        weight = float(value)
    except OverflowError:  # an integer of hundreds of digits
        weight = math.inf
    if not (math.isfinite(weight) and weight >= 0):
        raise InvalidRequest(f"{name}.control_weight", value, possible)
    return weight


def _preset(name: str, value: Any) -> str:
    if value is None:
        return "medium"
    if value not in PRESETS:
        raise InvalidRequest(f"{name}.{PRESET_OF[name]}", value, f"one of {', '.join(PRESETS)}")
    return str(value)
