"""Kinds of checkpoint: how their files tell them apart, and which modes each one serves.

Kinds share their code; what they were trained for differs. A request for another mode would run and
make noise, so it is refused before it is queued.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_cosmos3.checkpoint.backbone import NEMOTRON, QWEN3, Backbone, backbone_of
from vllm_cosmos3.checkpoint.simulators import simulator_kind
from vllm_cosmos3.errors import InvalidRequest

WORLD_MODEL = "world_model"  # the mode of a simulator, which has sessions instead of requests
VIDEO_MODES = ("text2video", "image2video", "video2video")
ACTION_MODES = ("forward_dynamics", "inverse_dynamics", "policy")


@dataclass(frozen=True, slots=True)
class Kind:
    """What the checkpoints of one kind were trained for.

    ``distilled`` says that they have fixed steps, ``image_size`` is the width and height of pictures
    where a request has none, ``tiers`` are the sizes of `sizes.TRAINED_SIZES`, ``frames`` the shortest
    and longest videos at any size. ``robot`` is what a policy moves. Sound and actions also need
    their weights, whatever the kind.
    """

    modes: tuple[str, ...]
    distilled: bool = False
    image_size: tuple[int, int] = (960, 960)
    backbone: Backbone = QWEN3
    tiers: tuple[int, ...] = (256, 480, 704, 720, 768)
    frames: tuple[int, int] = (24, 400)
    robot: str | None = None


_LARGE_IMAGE = (1024, 1024)  # of the tier 768
_BASE_MODES = ("text2image", "image2image", *VIDEO_MODES, "transfer", *ACTION_MODES)
_EDGE = Kind(
    ("text2image", *VIDEO_MODES, *ACTION_MODES),
    image_size=(640, 640),
    backbone=NEMOTRON,
    tiers=(256, 480),
    frames=(50, 150),
)


KINDS = {
    "base": Kind(_BASE_MODES),
    "text2image": Kind(_BASE_MODES, image_size=_LARGE_IMAGE),
    "distilled-t2i": Kind(("text2image",), distilled=True, image_size=_LARGE_IMAGE),
    "distilled-i2v": Kind(("image2video",), distilled=True),
    "policy-droid": Kind(("policy",), robot="droid"),
    "edge": _EDGE,
    "edge-policy-droid": replace(_EDGE, modes=("policy",), robot="droid"),
    "sim-bimanual": Kind((WORLD_MODEL,), distilled=True),
    "sim-bimanual-camera": Kind((WORLD_MODEL,), distilled=True),
}
ASKED_BY = {  # what a request of a mode has that the others lack
    "text2image": "num_frames=1",
    "image2image": "an image and num_frames=1",
    "text2video": "a prompt alone",
    "image2video": "an image",
    "video2video": "a video",
    "transfer": "a control such as edge",
    "forward_dynamics": "action_mode=forward_dynamics",
    "inverse_dynamics": "action_mode=inverse_dynamics",
    "policy": "action_mode=policy",
    WORLD_MODEL: "a session: Cosmos3.session, or the WebSocket /v1/realtime_video/generate",
}
_IMAGE2VIDEO_FPS = 16  # base_fps of the published distilled checkpoint; the other one has 24


def kind_of(
    folder: Path,
    *,
    transformer: Mapping[str, Any],
    scheduler: Mapping[str, Any],
    pipeline: Mapping[str, Any],
    root: Mapping[str, Any],
) -> str:
    """The kind of the checkpoint in ``folder``, given its JSON files; ``pipeline`` is the index.

    Policies and Super-Text2Image have the files of other checkpoints and are told by the name of their
    repository: in the root configuration, of the folder, or of the folder in the Hugging Face cache.
    """
    if (simulator := simulator_kind(transformer, pipeline)) is not None:
        return simulator
    if scheduler.get("fixed_step_sampler_config") or pipeline.get("is_distilled"):
        fps = transformer.get("base_fps")
        return "distilled-i2v" if fps == _IMAGE2VIDEO_FPS else "distilled-t2i"
    cached = folder.parent.parent.name if folder.parent.name == "snapshots" else ""
    names = (str(root.get("_name_or_path", "")), folder.name, cached)
    told = {"policy": "policy-droid", "text2image": "text2image"}
    usual = "base"
    if backbone_of(transformer) is NEMOTRON:
        told, usual = {"policy": "edge-policy-droid"}, "edge"
    return next((kind for word, kind in told.items() if word in " ".join(names).lower()), usual)


def check_kind(chosen: str, found: str) -> None:
    """Refuse a kind that the user has chosen for files that cannot be of that kind."""
    distilled, backbone = KINDS[found].distilled, KINDS[found].backbone
    simulates = WORLD_MODEL in KINDS[found].modes
    possible = [
        name
        for name, kind in KINDS.items()
        if (kind.distilled, kind.backbone) == (distilled, backbone)
        and (WORLD_MODEL in kind.modes) == simulates
    ]
    if chosen not in possible:
        reason = f"{'fixed steps' if distilled else 'no fixed steps'} and {backbone.name}'s layers"
        raise InvalidRequest(
            "checkpoint_kind", chosen, f"one of {', '.join(possible)}: this checkpoint has {reason}"
        )


def base_kind(kind: str) -> str:
    """The kind with the same layers that has the most modes."""
    alike = [name for name in KINDS if KINDS[name].backbone is KINDS[kind].backbone]
    return max(alike, key=lambda name: len(KINDS[name].modes))


def check_mode(kind: str, mode: str) -> None:
    """Refuse a mode that a checkpoint of ``kind`` was not made for."""
    modes = KINDS[kind].modes
    if mode == "text2video" and mode not in modes and "image2video" in modes:
        possible = f"given, as the kind of this checkpoint is {kind}"
        raise InvalidRequest("image", None, possible, "unsupported_by_model")
    if mode not in modes:
        served = " or ".join(f"{name} ({ASKED_BY[name]})" for name in modes)
        possible = f"{served}, as the kind of this checkpoint is {kind}"
        raise InvalidRequest("mode", mode, possible, "unsupported_by_model")
