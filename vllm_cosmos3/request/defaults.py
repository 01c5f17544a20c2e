"""Numbers of a request: the defaults of each mode, which are those of the models' own framework, and all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from vllm_cosmos3.checkpoint.kinds import KINDS, VIDEO_MODES
from vllm_cosmos3.request.step_cache import StepCache


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What a mode takes for the fields that a request leaves out."""

    width: int
    height: int
    num_frames: int
    fps: float
    num_inference_steps: int
    guidance_scale: float
    flow_shift: float
    condition_frame_indexes_vision: tuple[int, ...]
    negative_prompts: tuple[str, ...]  # files under assets/ of the checkpoint; none: empty text
    negative_metadata_mode: str = "same"
    guidance_interval: tuple[float, float] | None = None  # None: every step is guided


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters(Defaults):
    """All numbers of a request for one checkpoint, resolved. Names are those of the request."""

    mode: str
    sound_duration: float | None  # None: no sound
    schedule: str
    noise: str
    control_guidance: float | None  # None: no controls
    control_guidance_interval: tuple[float, float] | None
    preset: str | None  # None: fields chosen one by one
    reuse: StepCache | None  # None: every step is computed
    warnings: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Length of the video."""
        return self.num_frames / self.fps

    @property
    def step_cache(self) -> str:
        return "none" if self.reuse is None else "sea"

    @property
    def step_cache_threshold(self) -> float | None:
        return None if self.reuse is None else self.reuse.threshold

    @property
    def step_cache_max_reused(self) -> int | None:
        return None if self.reuse is None else self.reuse.max_reused

    @property
    def step_cache_order(self) -> int | None:
        return None if self.reuse is None else self.reuse.order


_VIDEO = Defaults(
    width=1280,
    height=720,
    num_frames=189,
    fps=24.0,
    num_inference_steps=35,
    guidance_scale=6.0,
    flow_shift=10.0,
    condition_frame_indexes_vision=(),
    negative_prompts=("negative_prompt.json",),
)
DEFAULTS = {
    "text2image": Defaults(
        width=960,
        height=960,
        num_frames=1,
        fps=24.0,
        num_inference_steps=50,
        guidance_scale=4.0,
        flow_shift=3.0,
        condition_frame_indexes_vision=(),
        negative_prompts=(),
    ),
    # Where a request names no size it is that of the picture, see `edits`.
    "image2image": Defaults(
        width=512,
        height=512,
        num_frames=1,
        fps=24.0,
        num_inference_steps=35,
        guidance_scale=6.0,
        flow_shift=5.0,
        condition_frame_indexes_vision=(),
        negative_prompts=(),
    ),
    "text2video": _VIDEO,
    "image2video": replace(
        _VIDEO,
        condition_frame_indexes_vision=(0,),
        negative_prompts=("negative_prompt_i2v.json", "negative_prompt.json"),
    ),
    "video2video": replace(_VIDEO, condition_frame_indexes_vision=(0, 1)),
}
# With actions, where size, length and rate are those of the embodiment and the picture.
ACTION = replace(
    _VIDEO,
    num_inference_steps=30,
    guidance_scale=1.0,
    negative_prompts=(),
    negative_metadata_mode="none",
)
_EDGE_VIDEO = {
    mode: replace(
        DEFAULTS[mode], width=832, height=480, num_frames=121, guidance_scale=5.0, flow_shift=3.0
    )
    for mode in VIDEO_MODES
}
_EDGE = {"text2image": replace(DEFAULTS["text2image"], guidance_scale=7.0), **_EDGE_VIDEO}
_EDGE_ACTION = replace(ACTION, flow_shift=5.0)
_EDGE_POLICY = replace(  # guided at its first step alone
    _EDGE_ACTION,
    num_inference_steps=4,
    guidance_scale=3.0,
    guidance_interval=(960.0, 1001.0),
)
# Kinds with defaults of their own.
_PROMPTS = {"edge": _EDGE, "edge-policy-droid": _EDGE}
_ACTIONS = {"edge": _EDGE_ACTION, "edge-policy-droid": _EDGE_POLICY}
TRANSFER = replace(_VIDEO, negative_prompts=())  # where they are those of the clips
TRANSFER_TIER = 720  # of sizes, where the request names none
TEXT_TOKENS = 2048  # of a text whose length is not known; the published negative prompt has 1,904


def defaults_of(kind: str) -> Mapping[str, Defaults]:
    """The defaults by mode that a checkpoint of this kind has for images and videos from prompts."""
    width, height = KINDS[kind].image_size
    modes = _PROMPTS.get(kind, DEFAULTS)
    return {**modes, "text2image": replace(modes["text2image"], width=width, height=height)}


def action_defaults(kind: str) -> Defaults:
    """The defaults with actions, where size, length and rate are not of the checkpoint."""
    return _ACTIONS.get(kind, ACTION)
