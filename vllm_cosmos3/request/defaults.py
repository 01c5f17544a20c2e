"""What each mode takes for the fields that a request leaves out: the models' own framework's numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace


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
    "text2video": _VIDEO,
    "image2video": replace(
        _VIDEO,
        condition_frame_indexes_vision=(0,),
        negative_prompts=("negative_prompt_i2v.json", "negative_prompt.json"),
    ),
    "video2video": replace(_VIDEO, condition_frame_indexes_vision=(0, 1)),
}
# With actions, where size, length and rate follow from the embodiment and the picture.
ACTION_STEPS, ACTION_GUIDANCE, ACTION_SHIFT = 30, 1.0, 10.0
TRANSFER_TIER = 720  # of sizes, where the request names none
TEXT_TOKENS = 2048  # of a text whose length is not known; the published negative prompt has 1,904
