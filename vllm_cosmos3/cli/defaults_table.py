"""``generate --print-defaults``: the defaults of every mode, embodiment and control."""

from __future__ import annotations

from dataclasses import asdict, fields

from vllm_cosmos3.request.request import SPECS, GenerateRequest


def defaults_table() -> str:
    """The defaults that depend on the mode, side by side, all others, and the embodiments."""
    from vllm_cosmos3.request.defaults import DEFAULTS

    rows = {mode: asdict(default) for mode, default in DEFAULTS.items()}
    names = [name for name in next(iter(rows.values())) if name in SPECS]
    lines = [f"{'':32}" + "".join(f"{mode:>13}" for mode in rows)]
    for name in names:
        lines.append(f"{name:32}" + "".join(f"{_shown(row[name]):>13}" for row in rows.values()))
    lines.append("\nin every mode")
    for item in fields(GenerateRequest):
        if item.default is not None:
            lines.append(f"  {item.name:30}{item.default}")
    lines += ["", "with actions", *_embodiments()]
    lines += ["", "with controls; size, length and rate are those of the clips", *_controls()]
    return "\n".join(lines)


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


def _shown(value: float | str | tuple[int, ...] | None) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "-"
    return f"{value:g}" if isinstance(value, int | float) else value or "-"
