"""What a user asks for: one frozen request. Every single value is checked here, once.

Command-line flags and the HTTP schema are generated from the fields and their ``Spec``. This module
knows no checkpoint: values that depend on one (defaults, sizes, sound) are resolved in `parameters`.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from vllm_cosmos3.errors import InvalidRequest, did_you_mean
from vllm_cosmos3.request.controls import CONTROLS, Control
from vllm_cosmos3.request.embodiments import VIEWS
from vllm_cosmos3.request.fields import Spec, with_arguments
from vllm_cosmos3.request.prompts import as_text
from vllm_cosmos3.request.sizes import proposed_size

if TYPE_CHECKING:
    import numpy as np
    import torch

    from vllm_cosmos3.media import ImageSource, SoundSource, VideoSource

PRESETS = ("exact", "high", "fast")
MAX_SEED = 2**32 - 1  # numpy's RandomState, the reference's noise rule, takes 32 bits


def _field(*, default: Any = None, **spec: Any) -> Any:
    """A request field: its default (None where it follows from the mode) and its `Spec`."""
    return dataclasses.field(default=default, metadata={"spec": Spec(**spec)})


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One request for an image or a video, with or without sound, or for actions.

    The mode follows from the inputs: ``action_mode`` names one of those with actions, a control
    such as ``edge`` is transfer, ``num_frames=1`` is text-to-image, an ``image`` is image-to-video,
    a ``video`` is video-to-video, anything else is text-to-video; both of the first two, an edit of the image. A field that is
    None takes the default of its mode (`defaults.DEFAULTS`); an omitted seed is drawn here, so
    that every rank and the record of the result see the same number.

    Raises:
        InvalidRequest: a value has the wrong type or range, or two fields contradict each other.
    """

    prompt: str | None = _field(
        kind="text",
        high=2**20,
        help="what to show: plain text, or a structured JSON caption",
    )
    negative_prompt: str | None = _field(
        kind="text",
        high=2**20,
        help="what to avoid (default for videos: a standard text)",
    )
    image: ImageSource | None = _field(  # noqa: RUF009
        kind="image",
        help="first frame of the video, or picture to edit (num_frames 1)",
    )
    video: VideoSource | None = _field(  # noqa: RUF009
        kind="video", help="clip to continue"
    )
    condition_frame_indexes_vision: tuple[int, ...] | None = _field(
        kind="ints",
        low=0,
        high=1000,
        help="latent frames taken from the video (k needs 4k+1 frames)",
    )
    condition_video_keep: Literal["first", "last"] = _field(
        default="first",
        kind="choice",
        choices=("first", "last"),
        help="end of the video that supplies them",
    )
    action_mode: str | None = _field(
        kind="choice",
        choices=("forward_dynamics", "inverse_dynamics", "policy"),
        help="forward_dynamics: actions to video; inverse_dynamics: video to actions; policy: both"
        " from an instruction",
    )
    domain_name: str | None = _field(
        kind="text", high=100, help="embodiment of the actions, e.g. av, umi or droid_lerobot"
    )
    domain_id: int | None = _field(
        kind="int",
        low=0,
        high=1000,
        help="id of the embodiment; alternative to domain_name",
    )
    raw_action_dim: int | None = _field(
        kind="int", low=1, high=1000, help="numbers in one action (default: of the embodiment)"
    )
    action_chunk_size: int | None = _field(
        kind="int",
        low=1,
        high=1000,
        help="number of actions, one for each frame but the first",
    )
    action: tuple[tuple[float, ...], ...] | None = _field(
        kind="rows", help="action rows of forward_dynamics"
    )
    action_path: str | None = _field(
        kind="text", high=4096, help="action rows in a JSON file; alternative to action"
    )
    action_history: tuple[tuple[float, ...], ...] | None = _field(
        kind="rows", help="actions carried out before the first frame"
    )
    action_state: tuple[float, ...] | None = _field(
        kind="numbers", help="robot state at the first frame, if the model has one"
    )
    action_stats_path: str | None = _field(
        kind="text",
        high=4096,
        help="statistics as JSON, for actions in physical units",
    )
    action_normalization: str = _field(
        default="minmax",
        kind="choice",
        choices=("minmax", "meanstd", "quantile", "quantile_rot"),
        help="normalization the model was trained with",
    )
    view_point: str | None = _field(
        kind="choice",
        choices=tuple(VIEWS),
        help="camera position (default: of the embodiment)",
    )
    view_description: str | None = _field(
        kind="text",
        high=2**12,
        help="description of the cameras",
    )
    image_size: int | None = _field(
        kind="int",
        choices=(256, 480, 704, 720, 768),
        help="resolution tier, with the size nearest in shape to the input",
    )
    edge: Control | None = _field(  # noqa: RUF009
        kind="control",
        help="follow the edges of this clip, or (true) of the video; as an object: control_path,"
        " control_weight, preset_edge_threshold (none to very_high)",
    )
    blur: Control | None = _field(  # noqa: RUF009
        kind="control",
        help="follow this blurred clip, or (true) the blurred video; as an object: control_path,"
        " control_weight, preset_blur_strength (none to very_high)",
    )
    depth: Control | None = _field(  # noqa: RUF009
        kind="control", help="follow a depth clip, or an object with control_weight"
    )
    seg: Control | None = _field(  # noqa: RUF009
        kind="control", help="follow a segmentation clip; as an object likewise"
    )
    wsm: Control | None = _field(  # noqa: RUF009
        kind="control",
        help="follow a clip of world-scenario maps; as an object likewise",
    )
    control_guidance: float | None = _field(
        kind="float",
        low=0,
        high=20,
        help="guidance of the controls (default: by control)",
    )
    control_guidance_interval: tuple[float, float] | None = _field(
        kind="pair",
        low=0,
        high=1000,
        help="timesteps with control guidance (default: all)",
    )
    control_attention: str | None = _field(
        kind="choice",
        choices=("averaged", "full"),
        help="with several controls - averaged: attend to each control separately and average by weight, as"
        " trained (default); full: attend to all at once, as diffusers",
    )
    num_video_frames_per_chunk: int | None = _field(
        kind="int",
        low=2,
        high=401,
        unit="frames",
        help="frames per chunk (default: at most 93; wsm: 101)",
    )
    num_conditional_frames: int | None = _field(
        kind="int",
        low=0,
        high=400,
        unit="frames",
        help="frames reused from the previous chunk (default: 1)",
    )
    num_first_chunk_conditional_frames: int | None = _field(
        kind="int",
        low=0,
        high=400,
        unit="frames",
        help="frames reused from the video in the first chunk (default: 0)",
    )
    max_frames: int | None = _field(
        kind="int",
        low=2,
        high=18_000,
        unit="frames",
        help="most frames used of a control clip (default: 5000)",
    )
    share_vision_temporal_positions: bool | None = _field(
        kind="bool", help="same time positions of controls and video (default: true)"
    )
    emphasize_control_in_prompt: bool | None = _field(
        kind="bool", help="append a sentence on the controls (default: true)"
    )
    show_control_condition: bool | None = _field(
        kind="bool", help="show the controls to the left of the video"
    )
    show_input: bool | None = _field(kind="bool", help="show the input video on the far left")
    size: str | None = _field(
        kind="size", help="output size, e.g. 1280x720; replaces width and height"
    )
    height: int | None = _field(
        kind="int", low=16, high=65536, unit="pixels", help="height in pixels, a multiple of 16"
    )
    width: int | None = _field(
        kind="int", low=16, high=65536, unit="pixels", help="width in pixels, a multiple of 16"
    )
    num_frames: int | None = _field(
        kind="int",
        low=1,
        high=100_000,
        unit="frames",
        help="number of frames, rounded up to 4k+1; 1 makes an image",
    )
    seconds: float | None = _field(
        kind="float",
        low=0,
        above=True,
        high=600,
        unit="seconds",
        help="length; alternative to num_frames",
    )
    num_chunks: int = _field(
        default=1,
        kind="int",
        low=1,
        high=100,
        unit="chunks",
        help="consecutive chunks, each from the last frame of the one before",
    )
    fps: float | None = _field(
        kind="float",
        low=1,
        high=60,
        unit="frames per second",
        help="frame rate in frames per second",
    )
    num_inference_steps: int | None = _field(
        kind="int", low=1, high=200, unit="steps", help="denoising steps"
    )
    guidance_scale: float | None = _field(
        kind="float",
        low=0,
        high=20,
        help="classifier-free guidance; 1: off, half the time",
    )
    guidance_interval: tuple[float, float] | None = _field(
        kind="pair",
        low=0,
        high=1001,
        help="timesteps with guidance (default: all; Edge policy 960,1001)",
    )
    preset: str | None = _field(
        kind="choice",
        choices=PRESETS,
        help="less exact is faster: sets other fields that are not given (default: exact, or the server's)",
    )
    step_cache: str | None = _field(
        kind="choice",
        choices=("none", "sea"),
        help="sea (SeaCache): reuses steps; not exact (default: none)",
    )
    step_cache_threshold: float | None = _field(
        kind="float",
        low=0,
        high=10,
        help="change that adds up until a step is computed; larger reuses more (default: 0.25)",
    )
    step_cache_max_reused: int | None = _field(
        kind="int", low=1, high=200, unit="steps", help="most steps reused in a row (default: 2)"
    )
    step_cache_order: int | None = _field(
        kind="int",
        low=0,
        high=1,
        help="extrapolation order: 0 repeats the last computed step, 1 extrapolates the last two (default: 1)",
    )
    flow_shift: float | None = _field(
        kind="float",
        low=0.01,
        high=100,
        help="noise schedule shift; larger favours structure",
    )
    schedule: str = _field(
        default="native",
        kind="choice",
        choices=("native", "diffusers", "karras"),
        help="noise schedule: that of the reference, or the flow or Karras schedule of diffusers (karras needs sigma_min and sigma_max in the checkpoint)",
    )
    seed: int | None = _field(
        kind="int", low=0, high=MAX_SEED, help="seed of the initial noise (default: random)"
    )
    noise: str = _field(
        default="numpy",
        kind="choice",
        choices=("numpy", "torch"),
        help="how noise is drawn from the seed: numpy as in the reference, or a torch generator",
    )
    n: int = _field(
        default=1,
        kind="int",
        low=1,
        high=10,
        help="results, with seeds seed to seed+n-1",
    )
    generate_sound: bool = _field(
        default=False, kind="bool", help="generate a synchronized sound track"
    )
    sound_duration: float | None = _field(
        kind="float",
        low=0.04,
        high=600,
        unit="seconds",
        help="length of the sound (default: that of the video)",
    )
    sound_path: SoundSource | None = _field(  # noqa: RUF009
        kind="sound",
        help="sound file, or clip with sound, that the video follows",
    )
    keep_sound: bool = _field(
        default=False, kind="bool", help="give the result the sound of the video or control clip"
    )
    use_resolution_template: bool = _field(
        default=True, kind="bool", help="append the sentence on resolution"
    )
    use_duration_template: bool = _field(
        default=True,
        kind="bool",
        help="append the sentence on duration",
    )
    negative_metadata_mode: str | None = _field(
        kind="choice",
        choices=("none", "same", "inverse"),
        help="size and length in the negative prompt: none, the same, or the inverse (default: same; with"
        " actions none)",
    )
    use_system_prompt: bool = _field(
        default=False, kind="bool", help="put the model's system prompt before the prompt"
    )
    prompt_format: str = _field(
        default="auto",
        kind="choice",
        choices=("auto", "plain", "json"),
        help="where size and length go - plain: sentences appended to the prompt; json: keys of the JSON"
        " caption; auto: json if the prompt is a JSON object",
    )
    max_sequence_length: int = _field(
        default=4096,
        kind="int",
        low=64,
        high=32768,
        unit="tokens",
        help="longest prompt in tokens; longer is cut",
    )
    prompt_token_ids: tuple[int, ...] | None = _field(
        kind="ints",
        low=0,
        high=2**31,
        help="token ids of prompt and chat template; alternative to prompt",
    )
    negative_prompt_token_ids: tuple[int, ...] | None = _field(
        kind="ints",
        low=0,
        high=2**31,
        help="the same for negative_prompt",
    )
    allow_untrained_size: bool = _field(
        default=False,
        kind="bool",
        help="accept larger or longer outputs than trained for",
    )
    output_type: str = _field(
        default="pixels",
        kind="choice",
        choices=("pixels", "latent"),
        help="decoded pixels and sound, or latents only",
    )
    latents: Mapping[str, np.ndarray | torch.Tensor] | None = _field(
        kind="arrays",
        help="initial noise by stream: vision [1,48,T,h,w], sound [64,T_s], action [T_a,64]",
    )

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            object.__setattr__(self, name, as_text(getattr(self, name)))
        for name, spec in SPECS.items():
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, spec.checked(name, value))
            elif name in _NEVER_NONE:
                raise InvalidRequest(name, value, spec.possible, "missing_required")
        _check_prompts(self)
        _check_size(self)
        _check_conditions(self)
        _check_chunks(self)
        _check_sound(self)
        _check_units(self)
        _check_transfer(self)
        if self.seed is None:
            object.__setattr__(self, "seed", secrets.randbelow(MAX_SEED - self.n))
        elif self.seed + self.n - 1 > MAX_SEED:
            raise InvalidRequest("seed", self.seed, f"at most {MAX_SEED} minus n, plus one")

    @property
    def controls(self) -> dict[str, Control]:
        """The control signals of a transfer, in the order of their clips in the sequence."""
        given = {name: getattr(self, name) for name in CONTROLS}
        return {name: control for name, control in given.items() if control is not None}

    @property
    def mode(self) -> str:
        """The action mode, or what the inputs make it: transfer, text2image, text2video, ..."""
        if self.action_mode is not None:
            return self.action_mode
        if self.controls:
            return "transfer"
        if self.num_frames == 1:
            return "text2image" if self.image is None else "image2image"
        if self.image is not None:
            return "image2video"
        return "text2video" if self.video is None else "video2video"


SPECS: dict[str, Spec] = {
    item.name: item.metadata["spec"] for item in dataclasses.fields(GenerateRequest)
}
_NEVER_NONE = {
    item.name for item in dataclasses.fields(GenerateRequest) if item.default is not None
}
FIELD_DEFAULTS: dict[str, Any] = {
    item.name: item.default for item in dataclasses.fields(GenerateRequest)
}
GenerateRequest.__doc__ = with_arguments(GenerateRequest.__doc__, SPECS, FIELD_DEFAULTS)


def from_fields(fields: Mapping[str, Any]) -> GenerateRequest:
    """A request from field names and values; an unknown name is refused with the nearest one."""
    for name in fields:
        if name not in SPECS:
            hint = did_you_mean(name, SPECS)
            raise InvalidRequest(name, fields[name], hint, "unknown_parameter")
    return GenerateRequest(**fields)


# Rules that join several fields.


def _check_prompts(request: GenerateRequest) -> None:
    if request.prompt is None and request.prompt_token_ids is None:
        raise InvalidRequest("prompt", None, "a text, or prompt_token_ids", "missing_required")
    for name in ("prompt", "negative_prompt"):
        text = getattr(request, name)
        if text is None:
            continue
        if getattr(request, f"{name}_token_ids") is not None:
            raise InvalidRequest(name, text, f"left out, as {name}_token_ids is given", "conflict")
        if bad := next(filter(_unprintable, text), None):
            raise InvalidRequest(name, text, f"text without characters such as {bad!r}")
    if request.prompt is not None and not request.prompt.strip():
        raise InvalidRequest("prompt", request.prompt, "a text that is not empty")


def _unprintable(character: str) -> bool:
    """Control characters other than white space, and halves of surrogate pairs."""
    code = ord(character)
    return (code < 32 and character not in "\t\n\r") or 0xD800 <= code < 0xE000


def _check_size(request: GenerateRequest) -> None:
    height, width = request.height, request.width
    if (height is None) != (width is None):
        missing, other = ("width", "height") if width is None else ("height", "width")
        raise InvalidRequest(missing, None, f"given together with {other}", "missing_required")
    if request.size is not None:
        size = parse_size(request.size)
        if height is not None and size != (width, height):
            raise InvalidRequest(
                "size", request.size, f"{width}x{height} or left out, as width and height are given",
                "conflict",
            )  # fmt: skip
        width, height = size
        most = int(SPECS["width"].high), int(SPECS["height"].high)
        if width > most[0] or height > most[1]:
            possible = f"of sides up to {'x'.join(map(str, most))}"
            raise InvalidRequest("size", request.size, possible, "too_large")
    if width is None or height is None:
        return
    if all(side and side % 16 == 0 for side in (width, height)):
        return
    near = proposed_size(width, height, untrained=request.allow_untrained_size)
    shown = "x".join(map(str, near))
    if request.size is not None:
        raise InvalidRequest("size", request.size, f"multiples of 16, such as {shown}")
    name, side = ("width", width) if width % 16 else ("height", height)
    raise InvalidRequest(name, side, f"a multiple of 16, such as that of {shown}")


def _check_conditions(request: GenerateRequest) -> None:
    if request.image is not None and request.video is not None:
        raise InvalidRequest("video", request.video, "left out, as image is given", "conflict")
    if request.num_frames == 1:
        for name in ("video", "seconds", "condition_frame_indexes_vision"):
            if (value := getattr(request, name)) is not None:
                possible = "left out, as num_frames=1 makes an image"
                raise InvalidRequest(name, value, possible, "unsupported_combination")
        if request.generate_sound:
            possible = "False, as num_frames=1 makes an image"
            raise InvalidRequest(
                "generate_sound", request.generate_sound, possible, "unsupported_combination"
            )
    if request.sound_duration is not None and not request.generate_sound:
        possible = "left out, or generate_sound=True with it"
        raise InvalidRequest("sound_duration", request.sound_duration, possible, "conflict")
    indexes = request.condition_frame_indexes_vision
    if (
        indexes is not None
        and request.video is None
        and not (request.image is not None and indexes == (0,))
    ):
        possible = "left out, or given with a video (an image is always latent frame 0)"
        raise InvalidRequest("condition_frame_indexes_vision", indexes, possible, "conflict")
    if request.latents is not None and request.n > 1:
        possible = "1 or left out, as latents are the noise of one result"
        raise InvalidRequest("n", request.n, possible, "conflict")
    if request.guidance_interval and request.guidance_interval[0] > request.guidance_interval[1]:
        possible = "two timesteps, the lower one first"
        raise InvalidRequest("guidance_interval", request.guidance_interval, possible)


NOT_WITH_SOUND_PATH = ("action_mode", "sound_duration")


def _check_sound(request: GenerateRequest) -> None:
    """A result has one sound: generated, or ``sound_path``, or the kept one of a clip."""
    if request.sound_path is not None:
        name = next((name for name in NOT_WITH_SOUND_PATH if getattr(request, name)), None)
        name = (
            "num_frames" if request.num_frames == 1 else name or next(iter(request.controls), None)
        )
        if name is not None:
            possible = (
                f"left out with this {name}: only a whole video from a prompt follows a sound"
            )
            raise InvalidRequest("sound_path", "given", possible, "unsupported_combination")
    if not request.keep_sound:
        return
    if request.generate_sound or request.sound_path is not None:
        possible = "False: the result has another sound"
    elif request.video is None and not request.controls:
        possible = "False, or given with a video, or a control, whose sound is kept"
    elif request.action_mode is not None or request.condition_video_keep == "last":
        possible = "False: the result does not begin where the video does"
    else:
        return
    raise InvalidRequest("keep_sound", request.keep_sound, possible, "conflict")


def _check_chunks(request: GenerateRequest) -> None:
    """A rollout is a matter of frames alone."""
    if request.num_chunks == 1:
        return
    reasons = {
        "num_frames": request.num_frames == 1 and "a picture has no last frame to go on from",
        "generate_sound": request.generate_sound and "the sound of a chunk does not go on in the next",
        "sound_path": request.sound_path is not None and "the sound of a chunk does not go on in the next",
        "action_mode": request.action_mode in ("inverse_dynamics", "policy")
        and "it needs to see the world after each chunk",
        "action_state": request.action_state is not None and "the later states are not known",
        next(iter(request.controls), ""): bool(request.controls) and "a transfer makes chunks of its own",
    }  # fmt: skip
    for name, reason in reasons.items():
        if reason:
            possible = f"1 with this {name}: {reason}"
            code = "unsupported_combination"
            raise InvalidRequest("num_chunks", request.num_chunks, possible, code)


def _check_units(request: GenerateRequest) -> None:
    """No embodiment has statistics of its own: those of the file alone can be chosen from."""
    chosen = request.action_normalization
    if chosen != "minmax" and request.action_stats_path is None:
        possible = "minmax or left out, or given with action_stats_path"
        raise InvalidRequest("action_normalization", chosen, possible, "conflict")


OF_TRANSFER = (
    "control_guidance", "control_guidance_interval", "control_attention",
    "num_video_frames_per_chunk", "num_conditional_frames", "num_first_chunk_conditional_frames",
    "max_frames", "share_vision_temporal_positions", "emphasize_control_in_prompt",
    "show_control_condition", "show_input",
)  # fmt: skip
NOT_OF_TRANSFER = ("action_mode", "image", "condition_frame_indexes_vision")


def _check_transfer(request: GenerateRequest) -> None:
    controls = request.controls
    if not controls:
        for name in OF_TRANSFER:
            if (value := getattr(request, name)) is not None:
                possible = f"left out, or given with one of {', '.join(CONTROLS)}"
                raise InvalidRequest(name, value, possible, "conflict")
        return
    for name in NOT_OF_TRANSFER:
        if (value := getattr(request, name)) is not None:
            possible = f"left out, as {next(iter(controls))} makes this a transfer"
            raise InvalidRequest(name, value, possible, "unsupported_combination")
    if request.condition_video_keep != "first":
        possible = "first, or left out: a transfer follows its clips from their beginning"
        raise InvalidRequest(
            "condition_video_keep",
            request.condition_video_keep,
            possible,
            "unsupported_combination",
        )
    if request.num_frames == 1 or request.generate_sound:
        name = "generate_sound" if request.generate_sound else "num_frames"
        possible = "left out, as a transfer makes a video without sound"
        raise InvalidRequest(name, getattr(request, name), possible, "unsupported_combination")
    for name, control in controls.items():
        if control.clip is None and request.video is None:
            computed = "edges are" if name == "edge" else "blur is"
            possible = f"given, or a video given, from which the {computed} computed"
            raise InvalidRequest(f"{name}.control", None, possible, "missing_required")
    if sum(control.weight for control in controls.values()) == 0:
        name = f"{next(iter(controls))}.control_weight"
        raise InvalidRequest(name, 0.0, "above 0 for at least one of the controls")
    if request.num_first_chunk_conditional_frames and request.video is None:
        value = request.num_first_chunk_conditional_frames
        possible = "0 or left out, or given with the video that has those frames"
        raise InvalidRequest("num_first_chunk_conditional_frames", value, possible, "conflict")
    if request.show_input and request.video is None:
        possible = "left out, or given with a video"
        raise InvalidRequest("show_input", request.show_input, possible, "conflict")
    interval = request.control_guidance_interval
    if interval and interval[0] > interval[1]:
        possible = "two timesteps, the lower one first"
        raise InvalidRequest("control_guidance_interval", interval, possible)


def parse_size(size: str) -> tuple[int, int]:
    """Width and height of a string such as ``1280x720``, which a `Spec` has checked."""
    width, height = size.lower().split("x")
    return int(width), int(height)
