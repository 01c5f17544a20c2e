"""From a request to a plan: the only place where a mode means anything.

A mode is a row of `defaults.DEFAULTS` and a condition: which latent frames are known, and from what pixels.
Everything is checked here before a weight is touched, given the checkpoint's own numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np

from vllm_cosmos3 import actions, media, prompts, transfer
from vllm_cosmos3.actions import Action
from vllm_cosmos3.config import ModelConfig
from vllm_cosmos3.defaults import (
    ACTION_GUIDANCE,
    ACTION_SHIFT,
    ACTION_STEPS,
    DEFAULTS,
    TRANSFER_TIER,
    Defaults,
)
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.hints import HINTS
from vllm_cosmos3.kinds import check_mode
from vllm_cosmos3.plan import Plan, StreamPlan
from vllm_cosmos3.request import SPECS, GenerateRequest, parse_size
from vllm_cosmos3.sizes import (
    MAX_AREA,
    MAX_TRAINED_FRAMES,
    MIN_TRAINED_FRAMES,
    TRAINED_FPS,
    TRAINED_SIZES,
    aspect_ratio,
    nearest_size,
    round_frames,
    tier_of,
)
from vllm_cosmos3.transfer import Transfer


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Every number of a request settled, for one checkpoint. Names are those of the request."""

    mode: str
    width: int
    height: int
    num_frames: int
    seconds: float
    fps: float
    num_inference_steps: int
    guidance_scale: float
    flow_shift: float
    condition_frame_indexes_vision: tuple[int, ...]
    negative_prompts: tuple[str, ...]
    negative_metadata_mode: str
    sound_duration: float | None  # None: no sound
    warnings: tuple[str, ...]


def resolve(request: GenerateRequest, model: ModelConfig) -> Parameters:
    """Settle what a request without actions leaves open. Reads no file and needs no tokenizer.

    Raises:
        InvalidRequest: the combination does not fit the checkpoint or the sizes it was trained for.
    """
    mode, default = request.mode, DEFAULTS[request.mode]
    check_mode(model.kind, mode)
    width, height = _size(request, default)
    fps = request.fps or default.fps
    warnings = [*_check_area(request, width, height), *_check_fps(request, fps)]
    num_frames, rounded = _frames(request, default, fps)
    warnings += [*rounded, *_check_frames(request, num_frames, fps, width, height)]
    steps, guidance = _fixed_steps(request, model, default)
    known = tuple(
        sorted(
            set(request.condition_frame_indexes_vision or default.condition_frame_indexes_vision)
        )
    )
    _check_known(request, known, num_frames)
    warnings += _without_effect(request, model)
    return Parameters(
        mode=mode,
        width=width,
        height=height,
        num_frames=num_frames,
        seconds=num_frames / fps,
        fps=fps,
        num_inference_steps=steps,
        guidance_scale=guidance,
        flow_shift=request.flow_shift or default.flow_shift,
        condition_frame_indexes_vision=known,
        negative_prompts=default.negative_prompts,
        negative_metadata_mode=request.negative_metadata_mode or default.negative_metadata_mode,
        sound_duration=_sound_duration(request, model, num_frames / fps),
        warnings=tuple(warnings),
    )


def resolve_action(
    request: GenerateRequest, model: ModelConfig, action: Action, picture: tuple[int, int]
) -> Parameters:
    """The same for a request with actions about a ``picture`` of this width and height.

    The size is that of the canvas on which the picture is laid.
    """
    width, height = nearest_size(action.image_size, *picture)
    default = Defaults(
        width=width,
        height=height,
        num_frames=action.num_frames,
        fps=action.fps,
        num_inference_steps=ACTION_STEPS,
        guidance_scale=ACTION_GUIDANCE,
        flow_shift=ACTION_SHIFT,
        condition_frame_indexes_vision=action.known_frames,
        negative_prompts=(),
        negative_metadata_mode="none",
    )
    width, height = _size(request, default)
    steps, guidance = _fixed_steps(request, model, default)
    return Parameters(
        mode=request.mode,
        width=width,
        height=height,
        num_frames=default.num_frames,
        seconds=default.num_frames / default.fps,
        fps=default.fps,
        num_inference_steps=steps,
        guidance_scale=guidance,
        flow_shift=request.flow_shift or default.flow_shift,
        condition_frame_indexes_vision=default.condition_frame_indexes_vision,
        negative_prompts=default.negative_prompts,
        negative_metadata_mode=request.negative_metadata_mode or default.negative_metadata_mode,
        sound_duration=None,
        warnings=(*action.warnings, *_check_area(request, width, height)),
    )


def resolve_transfer(
    request: GenerateRequest, model: ModelConfig, followed: Transfer
) -> Parameters:
    """The same for a transfer, whose clips have settled most."""
    default = replace(DEFAULTS["text2video"], guidance_scale=followed.guidance_scale)
    width, height, chunks = followed.width, followed.height, followed.chunks
    steps, guidance = _fixed_steps(request, model, default)
    limit = round_frames(MAX_TRAINED_FRAMES[tier_of(width, height)])
    if chunks.frames > limit and not request.allow_untrained_size:
        possible = f"at most {limit} at {width}x{height}, or allow_untrained_size set"
        raise InvalidRequest("num_video_frames_per_chunk", chunks.frames, possible, "too_large")
    return Parameters(
        mode=request.mode,
        width=width,
        height=height,
        num_frames=chunks.total,
        seconds=chunks.total / followed.fps,
        fps=followed.fps,
        num_inference_steps=steps,
        guidance_scale=guidance,
        flow_shift=request.flow_shift or default.flow_shift,
        condition_frame_indexes_vision=(),
        negative_prompts=(),
        negative_metadata_mode=request.negative_metadata_mode or default.negative_metadata_mode,
        sound_duration=None,
        warnings=(
            *followed.warnings,
            *_check_area(request, width, height),
            *_check_fps(request, followed.fps),
        ),
    )


def make_plan(request: GenerateRequest, model: ModelConfig, tokenizer: prompts.Tokenizer) -> Plan:
    """The plan of a request. Opens and resizes its image or video; touches no weight.

    Raises:
        InvalidRequest: as `resolve`, and for media that cannot be read, and for wrong token ids.
    """
    action = actions.settle(request, model)
    followed = transfer.settle(request, model, partial(_fitting, request))
    later: list[tuple[StreamPlan, ...]] = []
    if action is not None:
        frames = actions.observation(request, action)
        parameters = resolve_action(request, model, action, (frames.shape[2], frames.shape[1]))
        warnings = list(parameters.warnings)
        canvas = _canvas_stream(frames, parameters, model)
        streams = [canvas, actions.action_stream(action, model)]
        later = [
            (replace(canvas, source=None), actions.action_stream(action, model, chunk))
            for chunk in range(1, request.num_chunks)
        ]
    elif followed is not None:
        parameters = resolve_transfer(request, model, followed)
        warnings = list(parameters.warnings)
        (*streams,), *later = transfer.chunk_streams(followed, model)
    else:
        parameters = resolve(request, model)
        warnings = list(parameters.warnings)
        streams = [_vision_stream(request, parameters, model, warnings)]
        later = [(replace(streams[0], known=(0,), source=None),)] * (request.num_chunks - 1)
    chunk, parameters = parameters, _of_all_chunks(request, parameters)
    if parameters.sound_duration is not None:
        streams.append(_sound_stream(parameters.sound_duration, model))
    negative = _negative_prompt(request, parameters, model)
    view = None if action is None else action.view
    told = chunk  # the prompt is that of a chunk
    if followed is not None:
        told = replace(told, num_frames=followed.chunks.frames, fps=float(round(followed.fps)))
    token_ids = _token_ids(request, told, model, tokenizer, negative, view, warnings)
    seed = request.seed or 0
    return Plan(
        token_ids=token_ids,
        streams=tuple(streams),
        fps=parameters.fps,
        schedule=request.schedule,
        solver="unipc" if model.scheduler.t_list is None else "sde",
        num_inference_steps=parameters.num_inference_steps,
        flow_shift=parameters.flow_shift,
        guidance_scale=parameters.guidance_scale,
        guidance_interval=request.guidance_interval,
        seeds=tuple(range(seed, seed + request.n)),
        noise=request.noise,
        decoded=request.output_type != "latent",
        control_guidance=None if followed is None else followed.control_guidance,
        control_guidance_interval=request.control_guidance_interval,
        later=tuple(later),
        overlap=1 if followed is None else followed.chunks.overlap,
        num_frames=parameters.num_frames if later or followed is not None else None,
        beside=() if followed is None else followed.beside,
        domain_id=0 if action is None else action.embodiment.domain_id,
        actions=None if action is None else action.rows,
        initial=_initial(request, streams, several=bool(later)),
        effective=_effective(request, parameters, model, action, followed, negative, token_ids)
        | ({"num_video_frames_per_chunk": told.num_frames} if later else {})
        | {"output_size": _output_size(streams, model)},
        warnings=tuple(warnings),
    )


def _of_all_chunks(request: GenerateRequest, chunk: Parameters) -> Parameters:
    """The length of a rollout: each chunk begins with the last frame of the one before."""
    frames = chunk.num_frames + (request.num_chunks - 1) * (chunk.num_frames - 1)
    return replace(chunk, num_frames=frames, seconds=frames / chunk.fps)


# The conditions: known latent frames become pixels.


def _nothing(_: GenerateRequest, __: Parameters) -> np.ndarray | None:
    return None


def _image(request: GenerateRequest, _: Parameters) -> np.ndarray | None:
    assert request.image is not None  # so says its mode
    return media.read_image(request.image)[None]


def _video(request: GenerateRequest, parameters: Parameters) -> np.ndarray | None:
    """The pixels under the latent frames up to the last known one: the encoder looks back only."""
    assert request.video is not None  # so says its mode
    needed = 4 * parameters.condition_frame_indexes_vision[-1] + 1
    frames = media.read_video(request.video, frames=needed, keep=request.condition_video_keep)
    if len(frames) < needed:
        last = parameters.condition_frame_indexes_vision[-1]
        possible = f"at least {needed} frames long for condition_frame_indexes_vision up to {last}"
        raise InvalidRequest("video", f"{len(frames)} frames", possible)
    return frames


CONDITIONS: dict[str, Callable[[GenerateRequest, Parameters], np.ndarray | None]] = {
    "text2image": _nothing,
    "text2video": _nothing,
    "image2video": _image,
    "video2video": _video,
}


# Streams.


def _vision_stream(
    request: GenerateRequest, parameters: Parameters, model: ModelConfig, warnings: list[str]
) -> StreamPlan:
    width, height = parameters.width, parameters.height
    pixels = CONDITIONS[parameters.mode](request, parameters)
    if pixels is not None:
        warnings += _crop_warning(pixels.shape[2], pixels.shape[1], width, height)
        pixels = media.cover_crop(pixels, height=height, width=width)
    vae = model.vae
    frames = 1 + (parameters.num_frames - 1) // vae.scale_factor_temporal
    rows, columns = height // vae.scale_factor_spatial, width // vae.scale_factor_spatial
    return StreamPlan(
        name="vision",
        shape=(1, vae.z_dim, frames, rows, columns),
        rate=parameters.fps,
        known=parameters.condition_frame_indexes_vision,
        source=pixels,
    )


def _canvas_stream(frames: media.Pixels, parameters: Parameters, model: ModelConfig) -> StreamPlan:
    """A video of which only what the pictures cover of their canvas is kept."""
    pixels, (height, width) = media.fit_inside(
        frames, height=parameters.height, width=parameters.width
    )
    vae = model.vae
    length = 1 + (parameters.num_frames - 1) // vae.scale_factor_temporal
    rows, columns = (max(side // vae.scale_factor_spatial, 1) for side in (height, width))
    return StreamPlan(
        name="vision",
        shape=(1, vae.z_dim, length, rows, columns),
        rate=parameters.fps,
        known=parameters.condition_frame_indexes_vision,
        source=pixels,
        canvas=(parameters.height, parameters.width),
    )


def _crop_warning(width: int, height: int, to_width: int, to_height: int) -> list[str]:
    scale = max(to_width / width, to_height / height)
    lost = 1 - (to_width * to_height) / (scale * width * scale * height)
    if lost < 0.1:
        return []
    return [
        f"the {width}x{height} input loses {lost:.0%} of its area to fill {to_width}x{to_height}"
    ]


def _sound_stream(duration: float, model: ModelConfig) -> StreamPlan:
    sound = model.sound
    assert sound is not None  # _sound_duration has refused checkpoints without sound
    length = math.ceil(int(duration * sound.sampling_rate) / sound.hop_size)
    return StreamPlan(
        name="sound",
        shape=(sound.vocoder_input_dim, length),
        rate=model.transformer.sound_latent_fps,
    )


def _initial(
    request: GenerateRequest, streams: list[StreamPlan], *, several: bool
) -> dict[str, np.ndarray]:
    """The caller's initial noise as float32 arrays of the streams' shapes."""
    shapes = {stream.name: stream.shape for stream in streams}
    given = {}
    if request.latents and several:
        possible = "left out, as each chunk draws its own noise"
        raise InvalidRequest("latents", "given", possible, "unsupported_combination")
    for name, value in (request.latents or {}).items():
        if name not in shapes:
            possible = f"latents of the request's streams: {', '.join(shapes)}"
            raise InvalidRequest(f"latents[{name!r}]", "given", possible)
        array = np.asarray(value, dtype=np.float32)
        if array.shape != shapes[name]:
            raise InvalidRequest(f"latents[{name!r}]", array.shape, f"of shape {shapes[name]}")
        if not np.isfinite(array).all():
            raise InvalidRequest(f"latents[{name!r}]", "not finite", "finite numbers")
        given[name] = array
    return given


# Prompts.


def _negative_prompt(request: GenerateRequest, parameters: Parameters, model: ModelConfig) -> str:
    files = parameters.negative_prompts
    if request.negative_prompt is not None:
        return request.negative_prompt
    return prompts.default_negative(model.path, files) if files else ""


def _token_ids(
    request: GenerateRequest,
    parameters: Parameters,
    model: ModelConfig,
    tokenizer: prompts.Tokenizer,
    negative: str,
    view: str | None,
    warnings: list[str],
) -> tuple[tuple[int, ...], ...]:
    facts = prompts.Facts(
        num_frames=parameters.num_frames,
        fps=parameters.fps,
        height=parameters.height,
        width=parameters.width,
        aspect_ratio=aspect_ratio(parameters.width, parameters.height),
    )
    system = prompts.SYSTEM_TRANSFER if request.hints else None  # always: so it was trained
    if system is None and request.use_system_prompt:
        system = prompts.SYSTEM_IMAGE if facts.is_image else prompts.SYSTEM_VIDEO
    sentences = {
        "duration": request.use_duration_template,
        "resolution": request.use_resolution_template,
    }

    def encoded(field: str, text: str) -> tuple[int, ...]:
        limit = request.max_sequence_length
        ids, length = prompts.encode(text, tokenizer, system=system, limit=limit)
        if length > limit:
            warnings.append(f"{field} is cut from {length} to max_sequence_length={limit} tokens")
        return ids

    if request.prompt_token_ids is not None:
        ids = _given_ids(request, "prompt_token_ids", request.prompt_token_ids, model)
    else:
        prompt, style = request.prompt or "", request.prompt_format
        if view is None:
            text = prompts.positive_text(prompt, facts, style=style, **sentences)
        else:
            text = prompts.action_text(prompt, facts, style=style, view=view, **sentences)
        if request.hints and request.emphasize_control_in_prompt is not False:
            text = prompts.following(text, list(request.hints))
        ids = encoded("prompt", text)
    if request.negative_prompt_token_ids is not None:
        negative_ids = _given_ids(
            request, "negative_prompt_token_ids", request.negative_prompt_token_ids, model
        )
    else:
        text = prompts.negative_text(
            negative, facts, metadata=parameters.negative_metadata_mode, **sentences
        )
        negative_ids = encoded("negative_prompt", text)
    prompted = (ids, ids) if request.hints else (ids,)  # with controls and without
    return (*prompted, negative_ids) if parameters.guidance_scale != 1 else prompted


def _given_ids(
    request: GenerateRequest, field: str, ids: tuple[int, ...], model: ModelConfig
) -> tuple[int, ...]:
    vocabulary = model.transformer.vocab_size
    if max(ids) >= vocabulary:
        raise InvalidRequest(field, max(ids), f"token ids below {vocabulary}, the vocabulary")
    if len(ids) > request.max_sequence_length:
        possible = f"at most max_sequence_length={request.max_sequence_length} tokens long"
        raise InvalidRequest(field, f"{len(ids)} tokens", possible)
    return ids


# Numbers.


def _fitting(request: GenerateRequest, width: int, height: int) -> tuple[int, int]:
    """The size of a transfer for that of its input. A wrong one should not wait for the clips."""
    if request.size is not None:
        width, height = parse_size(request.size)
    elif request.width is not None and request.height is not None:
        width, height = request.width, request.height
    else:
        width, height = nearest_size(request.image_size or TRANSFER_TIER, width, height)
    _check_area(request, width, height)
    return width, height


def _size(request: GenerateRequest, default: Defaults) -> tuple[int, int]:
    if request.size is not None:
        return parse_size(request.size)
    return request.width or default.width, request.height or default.height


def _check_area(request: GenerateRequest, width: int, height: int) -> list[str]:
    if any((width, height) in sizes for sizes in TRAINED_SIZES.values()):
        return []
    if width * height > MAX_AREA and not request.allow_untrained_size:
        possible = f"at most {MAX_AREA:,} pixels, such as 1360x768, or allow_untrained_size set"
        raise InvalidRequest("size", f"{width}x{height}", possible, "too_large")
    nearest = min(
        TRAINED_SIZES[tier_of(width, height)],
        key=lambda size: abs(math.log(size[0] / size[1]) - math.log(width / height)),
    )
    return [f"size {width}x{height} is not a trained one; the nearest is {nearest[0]}x{nearest[1]}"]


def _check_fps(request: GenerateRequest, fps: float) -> list[str]:
    low, high = TRAINED_FPS
    if request.num_frames == 1 or low <= fps <= high:
        return []
    return [f"fps {fps:g} is outside the trained range of {low} to {high}"]


def _frames(request: GenerateRequest, default: Defaults, fps: float) -> tuple[int, list[str]]:
    """The number of frames, rounded up to 4k + 1: what whole latent frames hold."""
    asked = request.num_frames
    if request.seconds is not None:
        from_seconds = max(2, math.ceil(request.seconds * fps - 1e-6))
        if asked is not None and round_frames(asked) != round_frames(from_seconds):
            possible = f"about {asked / fps:g} or left out, as num_frames is {asked} at {fps:g} fps"
            raise InvalidRequest("seconds", request.seconds, possible, "conflict")
        asked = from_seconds
    if asked is None:
        return default.num_frames, []
    frames = round_frames(asked)
    return frames, [
        f"num_frames {asked} is rounded up to {frames} (4k+1)"
    ] if frames != asked else []


def _check_frames(
    request: GenerateRequest, frames: int, fps: float, width: int, height: int
) -> list[str]:
    limit = MAX_TRAINED_FRAMES[tier_of(width, height)]
    if frames > round_frames(limit):
        if not request.allow_untrained_size:
            field, most = "num_frames", float(limit)
            if request.num_frames is None:
                field, most = "seconds", limit / fps
            given = getattr(request, field)
            possible = f"at most {most:g} at {width}x{height}, or allow_untrained_size set"
            raise InvalidRequest(field, given, possible, "too_large")
        return [f"num_frames {frames} is above the trained {limit} at {width}x{height}"]
    if 1 < frames < MIN_TRAINED_FRAMES:
        return [f"num_frames {frames} is below the trained {MIN_TRAINED_FRAMES}"]
    return []


def _fixed_steps(
    request: GenerateRequest, model: ModelConfig, default: Defaults
) -> tuple[int, float]:
    """Steps and guidance scale; a distilled checkpoint has its own and takes no others."""
    fixed = model.scheduler.t_list
    if fixed is None:
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


def _without_effect(request: GenerateRequest, model: ModelConfig) -> list[str]:
    """A distilled checkpoint has its own noise levels, and no guidance that the rest is about."""
    if model.scheduler.t_list is None:
        return []
    names = ("negative_prompt", "negative_prompt_token_ids", "guidance_interval", "flow_shift")
    unused = [name for name in names if getattr(request, name) is not None]
    unused += ["schedule"] if request.schedule != "native" else []
    return [f"{name} has no effect on a distilled checkpoint" for name in unused]


def _check_known(request: GenerateRequest, known: tuple[int, ...], num_frames: int) -> None:
    latent_frames = 1 + (num_frames - 1) // 4
    if known and max(known) >= latent_frames:
        possible = f"below {latent_frames}, the latent frames of {num_frames} frames"
        raise InvalidRequest("condition_frame_indexes_vision", known, possible)
    if len(known) == latent_frames:
        possible = f"fewer than all {latent_frames} latent frames of {num_frames} frames"
        raise InvalidRequest("condition_frame_indexes_vision", known, possible)


def _sound_duration(request: GenerateRequest, model: ModelConfig, seconds: float) -> float | None:
    if not request.generate_sound:
        return None
    if model.sound is None:
        possible = "False: this checkpoint makes no sound"
        raise InvalidRequest(
            "generate_sound", request.generate_sound, possible, "unsupported_by_model"
        )
    return request.sound_duration or seconds


def _effective(
    request: GenerateRequest,
    parameters: Parameters,
    model: ModelConfig,
    action: Action | None,
    followed: Transfer | None,
    negative: str,
    token_ids: tuple[tuple[int, ...], ...],
) -> dict[str, object]:
    """Every field of the request with its final value, the mode and the kind of checkpoint, as JSON values."""
    settled = asdict(parameters)
    settled.pop("warnings")
    values: dict[str, object] = {"mode": settled.pop("mode"), "checkpoint_kind": model.kind}
    for name in SPECS:
        values[name] = settled.pop(name) if name in settled else getattr(request, name)
    values["size"] = f"{parameters.width}x{parameters.height}"
    if request.negative_prompt_token_ids is None:
        values["negative_prompt"] = negative
    values["image"] = _shown(request.image)
    values["video"] = _shown(request.video)
    values |= dict.fromkeys(HINTS)
    values |= {} if action is None else action.effective()
    values |= {} if followed is None else followed.effective()
    values["latents"] = sorted(request.latents) if request.latents else None
    values["prompt_tokens"] = [len(ids) for ids in token_ids]
    return values


def _output_size(streams: list[StreamPlan], model: ModelConfig) -> str:
    """Width and height of what is decoded: of a canvas, only what its picture covers."""
    rows, columns = next(s.shape[3:] for s in reversed(streams) if s.name == "vision")
    scale = model.vae.scale_factor_spatial
    return f"{columns * scale}x{rows * scale}"


def _shown(source: object) -> str | None:
    """A source of pixels as a word in a record: its file, or its type."""
    if source is None:
        return None
    return (
        str(source)
        if hasattr(source, "__fspath__") or isinstance(source, str)
        else type(source).__name__
    )
