"""Parameters of a request: what it leaves open, from the mode's defaults and the checkpoint's limits.

No file is read and no tokenizer needed, so that a server can answer at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial

from vllm_cosmos3.checkpoint.config import ModelConfig
from vllm_cosmos3.checkpoint.kinds import KINDS, check_mode
from vllm_cosmos3.checkpoint.latents import latent_frames, round_frames
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.request.actions import Action, too_long
from vllm_cosmos3.request.defaults import (
    TRANSFER,
    TRANSFER_TIER,
    Defaults,
    Parameters,
    action_defaults,
    defaults_of,
)
from vllm_cosmos3.request.presets import Chosen
from vllm_cosmos3.request.presets import chosen as chosen_preset
from vllm_cosmos3.request.request import GenerateRequest, parse_size
from vllm_cosmos3.request.sizes import (
    MAX_AREA,
    TRAINED_FPS,
    frame_limits,
    is_too_large,
    is_trained,
    nearest_size,
    nearest_trained,
)
from vllm_cosmos3.request.step_cache import StepCache
from vllm_cosmos3.request.transfer import Transfer

OF_GUIDANCE = (  # and of nothing else
    "negative_prompt",
    "negative_prompt_token_ids",
    "negative_metadata_mode",
    "guidance_interval",
)
OF_STEP_CACHE = {  # field of `StepCache` -> of the request
    "threshold": "step_cache_threshold",
    "max_reused": "step_cache_max_reused",
    "order": "step_cache_order",
}


def prompt_parameters(request: GenerateRequest, model: ModelConfig) -> Parameters:
    """The parameters of an image or a video from a prompt. Reads no file and needs no tokenizer.

    Raises:
        InvalidRequest: the combination does not fit the checkpoint or the sizes it was trained for.
    """
    default = defaults_of(model.kind)[request.mode]
    check_mode(model.kind, request.mode)
    width, height = _size(request, default)
    fps = request.fps or default.fps
    warnings = [*_check_area(request, model, width, height), *_check_fps(request, fps)]
    num_frames, rounded = _frames(request, model, default, fps)
    warnings += [*rounded, *_check_frames(request, model, num_frames, fps, width, height)]
    known = request.condition_frame_indexes_vision or default.condition_frame_indexes_vision
    known = tuple(sorted(set(known)))
    _check_known(request, model, known, num_frames)
    default = replace(
        default,
        width=width,
        height=height,
        num_frames=num_frames,
        fps=fps,
        condition_frame_indexes_vision=known,
    )
    return _parameters(request, model, default, warnings)


def changed_defaults(default: Defaults, request: GenerateRequest, model: ModelConfig) -> Defaults:
    """The defaults of a mode of videos with the size, length, rate and sampling of ``request``."""
    fps = request.fps or default.fps
    width, height = _size(request, default)
    guidance = request.guidance_scale
    return replace(
        default,
        width=width,
        height=height,
        num_frames=_frames(request, model, default, fps)[0],
        fps=fps,
        num_inference_steps=request.num_inference_steps or default.num_inference_steps,
        guidance_scale=default.guidance_scale if guidance is None else guidance,
        flow_shift=request.flow_shift or default.flow_shift,
        guidance_interval=request.guidance_interval or default.guidance_interval,
    )


def edit_parameters(
    request: GenerateRequest, model: ModelConfig, size: tuple[int, int]
) -> Parameters:
    """The same for an edit of a picture, of width and height ``size`` if the request names none."""
    check_mode(model.kind, request.mode)
    default = defaults_of(model.kind)[request.mode]
    width, height = _size(request, replace(default, width=size[0], height=size[1]))
    warnings = [] if (width, height) == size else _check_area(request, model, width, height)
    default = replace(default, width=width, height=height)
    return _parameters(request, model, default, warnings)


def action_parameters(
    request: GenerateRequest, model: ModelConfig, action: Action, picture: tuple[int, int]
) -> Parameters:
    """The same for a request with actions about a ``picture`` of this width and height.

    The size is that of the canvas on which the picture is laid.
    """
    width, height = nearest_size(action.image_size, *picture)
    default = action_defaults(model.kind)
    width, height = _size(request, replace(default, width=width, height=height))
    warnings = [
        *action.warnings,
        *_check_area(request, model, width, height),
        *_check_chunk(request, model, action, width, height),
    ]
    default = replace(
        default,
        width=width,
        height=height,
        num_frames=action.num_frames,
        fps=action.fps,
        condition_frame_indexes_vision=action.known_frames,
    )
    return _parameters(request, model, default, warnings)


def transfer_parameters(
    request: GenerateRequest, model: ModelConfig, transfer: Transfer
) -> Parameters:
    """The same for a transfer, whose size, length and rate are those of its clips."""
    width, height, chunks = transfer.width, transfer.height, transfer.chunks
    trained, most = (round_frames(n, model.vae) for n in frame_limits(width, height))
    if chunks.frames > most and not request.allow_untrained_size:
        possible = f"at most {most} at {width}x{height}, or allow_untrained_size set"
        raise InvalidRequest("num_video_frames_per_chunk", chunks.frames, possible, "too_large")
    warnings = [
        *transfer.warnings,
        *_beyond_training("num_video_frames_per_chunk", chunks.frames, trained, width, height),
        *_check_area(request, model, width, height),
        *_check_fps(request, transfer.fps),
    ]
    default = replace(
        TRANSFER,
        width=width,
        height=height,
        num_frames=chunks.total,
        fps=transfer.fps,
        guidance_scale=transfer.guidance_scale,
    )
    return _parameters(request, model, default, warnings, transfer.control_guidance)


def _parameters(
    request: GenerateRequest,
    model: ModelConfig,
    default: Defaults,
    warnings: Sequence[str],
    control_guidance: float | None = None,
) -> Parameters:
    """All parameters of a request whose size, length and rate ``default`` has."""
    steps, guidance = _fixed_steps(request, model, default)
    preset = chosen_preset(request, model)
    reuse = _reuse(request, preset)
    chosen = replace(
        default,
        num_inference_steps=steps,
        guidance_scale=guidance,
        flow_shift=request.flow_shift or default.flow_shift,
        negative_metadata_mode=request.negative_metadata_mode or default.negative_metadata_mode,
        guidance_interval=(
            request.guidance_interval or preset.guidance_interval or default.guidance_interval
        ),
    )
    return Parameters(
        **asdict(chosen),
        mode=request.mode,
        sound_duration=_sound_duration(request, model, default.num_frames / default.fps),
        schedule=request.schedule,
        noise=request.noise,
        control_guidance=control_guidance,
        control_guidance_interval=request.control_guidance_interval,
        preset=preset.name,
        reuse=reuse,
        warnings=(
            *warnings,
            *_without_effect(request, model, guidance),
            *(_without_cache(request) if reuse is None else ()),
        ),
    )


def of_all_chunks(request: GenerateRequest, chunk: Parameters) -> Parameters:
    """The length of a rollout: each chunk begins with the last frame of the one before."""
    frames = chunk.num_frames + (request.num_chunks - 1) * (chunk.num_frames - 1)
    return replace(chunk, num_frames=frames)


def fitting(
    request: GenerateRequest, model: ModelConfig, width: int, height: int
) -> tuple[int, int]:
    """The size of a transfer for that of its input. A wrong one should not wait for the clips."""
    if request.size is not None:
        width, height = parse_size(request.size)
    elif request.width is not None and request.height is not None:
        width, height = request.width, request.height
    else:
        width, height = nearest_size(request.image_size or TRANSFER_TIER, width, height)
    _check_area(request, model, width, height)
    return width, height


# The numbers, one by one.


def _size(request: GenerateRequest, default: Defaults) -> tuple[int, int]:
    if request.size is not None:
        return parse_size(request.size)
    return request.width or default.width, request.height or default.height


def _check_area(request: GenerateRequest, model: ModelConfig, width: int, height: int) -> list[str]:
    tiers = KINDS[model.kind].tiers
    if is_trained(width, height, tiers):
        return []
    nearest = "x".join(map(str, nearest_trained(width, height, tiers)))
    if is_too_large(width, height) and not request.allow_untrained_size:
        possible = f"at most {MAX_AREA:,} pixels, such as {nearest}, or allow_untrained_size set"
        raise InvalidRequest("size", f"{width}x{height}", possible, "too_large")
    return [f"size {width}x{height} is not a trained one; the nearest is {nearest}"]


def _check_fps(request: GenerateRequest, fps: float) -> list[str]:
    low, high = TRAINED_FPS
    if request.num_frames == 1 or low <= fps <= high:
        return []
    return [f"fps {fps:g} is outside the trained range of {low} to {high}"]


def _frames(
    request: GenerateRequest, model: ModelConfig, default: Defaults, fps: float
) -> tuple[int, list[str]]:
    """The number of frames, rounded up to what whole latent frames hold."""
    asked, rounded = request.num_frames, partial(round_frames, vae=model.vae)
    if request.seconds is not None:
        from_seconds = max(2, math.ceil(request.seconds * fps - 1e-6))
        if asked is not None and rounded(asked) != rounded(from_seconds):
            possible = f"about {asked / fps:g} or left out, as num_frames is {asked} at {fps:g} fps"
            raise InvalidRequest("seconds", request.seconds, possible, "conflict")
        asked = from_seconds
    if asked is None:
        return default.num_frames, []
    frames = rounded(asked)
    return frames, [
        f"num_frames {asked} is rounded up to {frames} (4k+1)"
    ] if frames != asked else []


def _check_frames(
    request: GenerateRequest, model: ModelConfig, frames: int, fps: float, width: int, height: int
) -> list[str]:
    trained, limit = frame_limits(width, height)
    least, most = KINDS[model.kind].frames
    trained = min(trained, most)
    if frames > round_frames(limit, model.vae) and not request.allow_untrained_size:
        field, longest = "num_frames", float(limit)
        if request.num_frames is None:
            field, longest = "seconds", limit / fps
        given = getattr(request, field)
        possible = f"at most {longest:g} at {width}x{height}, or allow_untrained_size set"
        raise InvalidRequest(field, given, possible, "too_large")
    if frames > round_frames(trained, model.vae):
        return _beyond_training("num_frames", frames, trained, width, height)
    if 1 < frames < least:
        return [f"num_frames {frames} is below the trained {least}"]
    return []


def _check_chunk(
    request: GenerateRequest, model: ModelConfig, action: Action, width: int, height: int
) -> list[str]:
    """The upper limit of frames alone: the models were trained with short chunks of actions."""
    trained, limit = frame_limits(width, height)
    most = round_frames(limit, model.vae) - 1
    if action.chunk_size > most and not request.allow_untrained_size:
        where = f" at {width}x{height}, or allow_untrained_size set"
        raise too_long(request, action.chunk_size, most, where)
    if action.chunk_size < round_frames(trained, model.vae):
        return []
    return _beyond_training("num_frames", action.num_frames, trained, width, height)


def _beyond_training(name: str, frames: int, trained: int, width: int, height: int) -> list[str]:
    if frames <= trained:
        return []
    return [f"{name} {frames} is above the trained {trained} at {width}x{height}"]


def _fixed_steps(
    request: GenerateRequest, model: ModelConfig, default: Defaults
) -> tuple[int, float]:
    """Steps and guidance scale; a distilled checkpoint has its own and takes no others."""
    fixed = model.scheduler.t_list
    if fixed is None:
        if request.schedule == "karras":
            _check_karras(model)
        scale = request.guidance_scale
        return (
            request.num_inference_steps or default.num_inference_steps,
            default.guidance_scale if scale is None else scale,
        )
    for name, value in (("num_inference_steps", len(fixed)), ("guidance_scale", 1.0)):
        given = getattr(request, name)
        if given is not None and given != value:
            possible = f"{value:g} or left out: this checkpoint is distilled to {len(fixed)} steps"
            raise InvalidRequest(name, given, possible, "unsupported_parameter")
    return len(fixed), 1.0


def _check_karras(model: ModelConfig) -> None:
    """This schedule has no numbers of its own: they come from the checkpoint."""
    if model.scheduler.sigma_min is None or model.scheduler.sigma_max is None:
        possible = "native or diffusers: this checkpoint's scheduler_config.json has no sigma_min or sigma_max"
        raise InvalidRequest("schedule", "karras", possible, "unsupported_by_model")


def _without_effect(request: GenerateRequest, model: ModelConfig, guidance: float) -> list[str]:
    """What is given in vain: without guidance all that is about it, and noise levels where a
    distilled checkpoint, which is never guided, has its own.
    """
    unused = [name for name in OF_GUIDANCE if getattr(request, name) is not None]
    if not model.distilled:
        return [f"{name} has no effect with guidance_scale 1" for name in unused if guidance == 1]
    unused += ["flow_shift"] if request.flow_shift is not None else []
    unused += ["schedule"] if request.schedule != "native" else []
    return [f"{name} has no effect on a distilled checkpoint" for name in unused]


def _reuse(request: GenerateRequest, preset: Chosen) -> StepCache | None:
    """The step cache, with what the request leaves open."""
    if not (preset.step_cache if request.step_cache is None else request.step_cache == "sea"):
        return None
    given = {part: getattr(request, name) for part, name in OF_STEP_CACHE.items()}
    return StepCache(**{part: value for part, value in given.items() if value is not None})


def _without_cache(request: GenerateRequest) -> list[str]:
    unused = [name for name in OF_STEP_CACHE.values() if getattr(request, name) is not None]
    return [f"{name} has no effect without step_cache=sea" for name in unused]


def _check_known(
    request: GenerateRequest, model: ModelConfig, known: tuple[int, ...], num_frames: int
) -> None:
    length = latent_frames(num_frames, model.vae)
    if known and max(known) >= length:
        possible = f"below {length}, the latent frames of {num_frames} frames"
        raise InvalidRequest("condition_frame_indexes_vision", known, possible)
    if len(known) == length:
        possible = f"fewer than all {length} latent frames of {num_frames} frames"
        raise InvalidRequest("condition_frame_indexes_vision", known, possible)


def _sound_duration(request: GenerateRequest, model: ModelConfig, seconds: float) -> float | None:
    if not request.generate_sound:
        return None
    if model.sound is None:
        possible = "False: this checkpoint makes no sound"
        raise InvalidRequest(
            "generate_sound", request.generate_sound, possible, "unsupported_by_model"
        )
    if request.sound_path is not None:
        return None  # nothing of it is generated
    return request.sound_duration or seconds
