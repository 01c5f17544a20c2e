"""``generate --print-defaults``: the defaults of every mode, embodiment and control of a kind of checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from vllm_cosmos3.checkpoint.kinds import ACTION_MODES, KINDS, WORLD_MODEL
from vllm_cosmos3.request.request import SPECS, GenerateRequest

OF_EMBODIMENT = ("width", "height", "num_frames", "fps")  # where there are actions
Columns = Mapping[str, Mapping[str, Any]]


def defaults_table(kind: str, steps: int | None = None) -> str:
    """The defaults that depend on the mode, side by side, all others, and the embodiments.

    ``steps`` are those of a checkpoint that takes no others, nor guidance.
    """
    modes = KINDS[kind].modes
    if WORLD_MODEL in modes:
        return "\n".join(_session())
    columns = _columns(kind, steps)
    names = [name for name in next(iter(columns.values())) if name in SPECS]
    lines = [f"{'':32}" + "".join(f"{mode:>13}" for mode in columns)]
    for name in names:
        values = (_shown(column[name]) for column in columns.values())
        lines.append(f"{name:32}" + "".join(f"{value:>13}" for value in values))
    lines.append("\nin every mode")
    lines += [f"  {f.name:30}{f.default}" for f in fields(GenerateRequest) if f.default is not None]
    if set(ACTION_MODES) & set(modes):
        lines += ["", "with actions", *_embodiments()]
    if "transfer" in modes:
        lines += ["", "with controls; size, length and rate are those of the clips", *_controls()]
    return "\n".join(lines)


def _columns(kind: str, steps: int | None) -> Columns:
    """The defaults by mode: of all modes with actions together, whose sizes are of the embodiment."""
    from vllm_cosmos3.request.defaults import action_defaults, defaults_of

    modes = KINDS[kind].modes
    fixed = {} if steps is None else {"num_inference_steps": steps, "guidance_scale": 1.0}
    columns = {
        mode: asdict(default) | fixed
        for mode, default in defaults_of(kind).items()
        if mode in modes
    }
    if set(ACTION_MODES) & set(modes):
        columns["actions"] = asdict(action_defaults(kind)) | dict.fromkeys(OF_EMBODIMENT)
    return columns


def _session() -> list[str]:
    """The defaults of a simulator's session."""
    from vllm_cosmos3.request.world import SESSION_DEFAULTS, SIZE

    shown = SESSION_DEFAULTS | {"size": f"{SIZE[0]}x{SIZE[1]}, or of 480p after the picture"}
    given = {name: value for name, value in shown.items() if value is not None}
    return ["a session", *(f"  {name:30}{value}" for name, value in given.items())]


def _controls() -> list[str]:
    """The defaults that depend on the control, a line for each that is the only one."""
    from vllm_cosmos3.request.controls import CONTROL_GUIDANCE
    from vllm_cosmos3.request.transfer import default_of

    names = ("guidance_scale", "num_video_frames_per_chunk", "max_frames")
    lines = [f"  {'control':22}" + "".join(f"{name:>28}" for name in ("control_guidance", *names))]
    for hint, strength in {**CONTROL_GUIDANCE, "several": 1.0}.items():
        default = default_of((hint,))
        values = (strength, default.guidance, default.chunk, default.limit)
        lines.append(f"  {hint:22}" + "".join(f"{value:>28g}" for value in values))
    return lines


def _embodiments() -> list[str]:
    """The defaults that depend on the embodiment, a line for each."""
    from vllm_cosmos3.request.embodiments import EMBODIMENTS

    names = ("raw_action_dim", "fps", "action_chunk_size", "image_size", "view_point")
    lines = [f"  {'domain_name':22}" + "".join(f"{name:>19}" for name in names)]
    for row in EMBODIMENTS:
        values = [_shown(getattr(row, name)) for name in names]
        lines.append(f"  {row.name:22}" + "".join(f"{value:>19}" for value in values))
    return lines


def _shown(value: float | str | tuple[float, ...] | None) -> str:
    if isinstance(value, tuple):
        return ",".join(f"{number:g}" for number in value) or "-"
    return f"{value:g}" if isinstance(value, int | float) else value or "-"
