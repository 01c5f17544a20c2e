"""Planner: from a request to its plan, the only place where a mode means anything.

A mode is a row of `defaults.DEFAULTS`, which says which latent frames are known.
Numbers are resolved in `parameters`. Everything is checked before a weight is touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import numpy as np

from vllm_cosmos3 import media
from vllm_cosmos3.checkpoint.config import ModelConfig
from vllm_cosmos3.checkpoint.latents import pixel_frames, vision_shape
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.media_budget import Lease, media_budget
from vllm_cosmos3.request import actions, prompts, sounds
from vllm_cosmos3.request import transfer as transfers
from vllm_cosmos3.request.actions import Action
from vllm_cosmos3.request.controls import CONTROLS
from vllm_cosmos3.request.defaults import Parameters
from vllm_cosmos3.request.edits import edit_streams
from vllm_cosmos3.request.inputs import input_frames, resized
from vllm_cosmos3.request.parameters import (
    action_parameters,
    fitting,
    of_all_chunks,
    prompt_parameters,
    transfer_parameters,
)
from vllm_cosmos3.request.plan import Plan, StreamPlan
from vllm_cosmos3.request.request import SPECS, GenerateRequest
from vllm_cosmos3.request.sizes import aspect_ratio
from vllm_cosmos3.request.transfer import Transfer

Streams = list[tuple[StreamPlan, ...]]  # of each chunk


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Draft:
    """A request with all numbers and pixels resolved, but for its prompts.

    ``parameters`` are those of one chunk, which is what the prompts speak of.
    """

    request: GenerateRequest
    model: ModelConfig
    parameters: Parameters
    chunks: Streams
    action: Action | None
    transfer: Transfer | None
    sound: np.ndarray | None


def make_plan(request: GenerateRequest, model: ModelConfig, tokenizer: prompts.Tokenizer) -> Plan:
    """The plan of a request. Opens and resizes its image or video; touches no weight.

    Raises:
        InvalidRequest: as `prompt_parameters`, and for media that cannot be read, and for wrong token ids.
    """
    return with_prompts(make_draft(request, model), tokenizer)


def make_draft(request: GenerateRequest, model: ModelConfig) -> Draft:
    """The part of `make_plan` that is the same for every prompt: numbers and pixels."""
    action = actions.resolve_action(request, model)
    with media_budget().lease() as lease:
        transfer = transfers.resolve_transfer(
            request, model, partial(fitting, request, model), lease
        )
        if action is not None:
            parameters, chunks = _with_actions(request, model, action, lease)
        elif transfer is not None:
            parameters = transfer_parameters(request, model, transfer)
            chunks = list(transfers.chunk_streams(transfer, model, lease))
        elif request.mode == "image2image":
            parameters, edit = edit_streams(request, model, lease)
            chunks = [edit]
        else:
            parameters, chunks = _from_prompt(request, model, lease)
        sound = sounds.given_sound(request, model, of_all_chunks(request, parameters), lease)
        if request.sound_path is not None:
            chunks = [(*chunks[0], sounds.sound_stream(parameters.seconds, model, sound))]
    parameters = _without_idle_cache(parameters, chunks)
    return Draft(
        request=request,
        model=model,
        parameters=parameters,
        chunks=chunks,
        action=action,
        transfer=transfer,
        sound=sound,
    )


def with_prompts(draft: Draft, tokenizer: prompts.Tokenizer) -> Plan:
    """The plan of a draft: its prompts become token ids."""
    request, model, action, transfer = draft.request, draft.model, draft.action, draft.transfer
    parameters = of_all_chunks(request, draft.parameters)
    negative = _negative_prompt(request, parameters, model)
    token_ids, truncated = _token_ids(draft, tokenizer, negative)
    streams, *later = draft.chunks
    seed = request.seed or 0
    return Plan(
        token_ids=token_ids,
        streams=streams,
        parameters=parameters,
        solver="sde" if model.distilled else "unipc",
        seeds=tuple(range(seed, seed + request.n)),
        decoded=request.output_type != "latent",
        domain_id=0 if action is None else action.embodiment.domain_id,
        actions=None if action is None else action.rows,
        later_chunks=tuple(later),
        overlap=1 if transfer is None else transfer.chunks.overlap,
        side_by_side=() if transfer is None else transfer.side_by_side,
        sound=draft.sound,
        initial=_initial(request, streams, several=bool(later)),
        effective=_effective(draft, parameters, negative, token_ids),
        truncated=truncated,
    )


# Streams.


def _without_idle_cache(parameters: Parameters, chunks: Streams) -> Parameters:
    """No step cache where no video is generated, which it follows."""
    generated = any(s.name == "vision" and s.generated for streams in chunks for s in streams)
    if parameters.reuse is None or generated:
        return parameters
    sentence = "step_cache has no effect, as the whole video is given"
    return replace(parameters, reuse=None, warnings=(*parameters.warnings, sentence))


def _from_prompt(
    request: GenerateRequest, model: ModelConfig, lease: Lease
) -> tuple[Parameters, Streams]:
    """A video after a prompt and perhaps pixels, in chunks that continue each other, with sound."""
    parameters = prompt_parameters(request, model)
    pixels, warnings = _known_pixels(request, parameters, model, lease)
    parameters = replace(parameters, warnings=(*parameters.warnings, *warnings))
    first = output_streams(parameters, model, pixels)
    following = (replace(first[0], known=(0,), source=None),)
    return parameters, [first] + [following] * (request.num_chunks - 1)


def output_streams(
    parameters: Parameters, model: ModelConfig, pixels: media.Pixels | None = None
) -> tuple[StreamPlan, ...]:
    """The streams of a video after a prompt and perhaps ``pixels``, and of what belongs to it."""
    vision = StreamPlan(
        name="vision",
        shape=vision_shape(parameters.num_frames, parameters.height, parameters.width, model.vae),
        rate=parameters.fps,
        known=parameters.condition_frame_indexes_vision,
        source=pixels,
    )
    if parameters.sound_duration is None:
        return (vision,)
    return vision, sounds.sound_stream(parameters.sound_duration, model)


def _known_pixels(
    request: GenerateRequest, parameters: Parameters, model: ModelConfig, lease: Lease
) -> tuple[media.Pixels | None, list[str]]:
    """The pixels under the latent frames up to the last known one, and a warning where they are cut.

    No more of them: the encoder looks back only.
    """
    known = parameters.condition_frame_indexes_vision
    height, width = parameters.height, parameters.width
    if not known:
        return None, []
    needed = pixel_frames(known[-1] + 1, model.vae)
    frames = input_frames(request, limit=needed, lease=lease)
    first = next(frames)
    fit = partial(media.cover_crop, height=height, width=width)
    pixels = resized(chain([first], frames), fit, (needed, height, width), lease)
    if len(pixels) < needed:
        possible = (
            f"at least {needed} frames long for condition_frame_indexes_vision up to {known[-1]}"
        )
        raise InvalidRequest("video", f"{len(pixels)} frames", possible)
    return pixels, _crop_warning(first.shape[1], first.shape[0], width, height)


def _with_actions(
    request: GenerateRequest, model: ModelConfig, action: Action, lease: Lease
) -> tuple[Parameters, Streams]:
    """A robot's view and its actions, chunk by chunk.

    The view is a video of which only what the pictures cover of their canvas is kept.
    """
    length = action.num_frames if action.mode.video else 1
    frames = input_frames(request, limit=length, lease=lease)
    first = next(frames)
    parameters = action_parameters(request, model, action, (first.shape[1], first.shape[0]))
    height, width = parameters.height, parameters.width
    needed = pixel_frames(action.known_frames[-1] + 1, model.vae)
    _, (rows, columns) = media.fit_inside(first[None], height=height, width=width)

    def fit(frame: media.Pixels) -> media.Pixels:
        return media.fit_inside(frame, height=height, width=width)[0]

    pixels = resized(chain([first], frames), fit, (needed, height, width), lease)
    seen = len(pixels) + sum(1 for _ in frames)
    if seen < length:
        possible = f"at least {length} frames long for {action.chunk_size} actions"
        raise InvalidRequest("video", f"{seen} frames", possible)
    view = StreamPlan(
        name="vision",
        shape=vision_shape(parameters.num_frames, rows, columns, model.vae),
        rate=parameters.fps,
        known=parameters.condition_frame_indexes_vision,
        source=pixels,
        canvas=(height, width),
    )
    later = [
        (replace(view, source=None), actions.action_stream(action, model, chunk))
        for chunk in range(1, request.num_chunks)
    ]
    return parameters, [(view, actions.action_stream(action, model)), *later]


def _crop_warning(width: int, height: int, to_width: int, to_height: int) -> list[str]:
    scale = max(to_width / width, to_height / height)
    lost = 1 - (to_width * to_height) / (scale * width * scale * height)
    if lost < 0.1:
        return []
    return [
        f"the {width}x{height} input loses {lost:.0%} of its area to fill {to_width}x{to_height}"
    ]


def _initial(
    request: GenerateRequest, streams: Sequence[StreamPlan], *, several: bool
) -> dict[str, np.ndarray]:
    """The caller's initial noise as float32 arrays of the streams' shapes."""
    shapes = {stream.name: stream.shape for stream in streams if stream.generated}
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
    draft: Draft, tokenizer: prompts.Tokenizer, negative: str
) -> tuple[tuple[tuple[int, ...], ...], tuple[str, ...]]:
    """Token ids of each branch of guidance, and a sentence on each prompt that was cut."""
    request, parameters, facts = draft.request, draft.parameters, _facts(draft)
    sentences = {
        "duration": request.use_duration_template,
        "resolution": request.use_resolution_template,
    }
    truncated: list[str] = []

    def encoded(field: str, text: str) -> tuple[int, ...]:
        limit, system = request.max_sequence_length, _system_prompt(request, facts)
        ids, length = prompts.encode(text, tokenizer, system=system, limit=limit)
        if length > limit:
            truncated.append(f"{field} is cut from {length} to max_sequence_length={limit} tokens")
        return ids

    if request.prompt_token_ids is not None:
        ids = _given_ids(request, "prompt_token_ids", request.prompt_token_ids, draft.model)
    else:
        prompt, style = request.prompt or "", request.prompt_format
        if draft.action is None:
            text = prompts.positive_text(prompt, facts, style=style, **sentences)
        else:
            view = draft.action.view
            text = prompts.action_text(prompt, facts, style=style, view=view, **sentences)
        if request.controls and request.emphasize_control_in_prompt is not False:
            text = prompts.following(text, list(request.controls))
        ids = encoded("prompt", text)
    if request.negative_prompt_token_ids is not None:
        negative_ids = _given_ids(
            request, "negative_prompt_token_ids", request.negative_prompt_token_ids, draft.model
        )
    else:
        text = prompts.negative_text(
            negative, facts, metadata=parameters.negative_metadata_mode, **sentences
        )
        negative_ids = encoded("negative_prompt", text)
    branches = [ids, ids] if request.controls else [ids]  # with controls and without
    branches += [negative_ids] if parameters.guidance_scale != 1 else []
    return tuple(branches), tuple(truncated)


def _facts(draft: Draft) -> prompts.Facts:
    """What the prompts may state: of one chunk, at a whole rate where controls are followed."""
    parameters, transfer = draft.parameters, draft.transfer
    width, height = parameters.width, parameters.height
    return prompts.Facts(
        num_frames=parameters.num_frames if transfer is None else transfer.chunks.frames,
        fps=parameters.fps if transfer is None else float(round(transfer.fps)),
        height=height,
        width=width,
        aspect_ratio=aspect_ratio(width, height),
    )


def _system_prompt(request: GenerateRequest, facts: prompts.Facts) -> str | None:
    if request.controls:
        return prompts.SYSTEM_TRANSFER  # always: so it was trained
    if request.mode == "image2image":
        return prompts.SYSTEM_EDIT  # likewise
    if not request.use_system_prompt:
        return None
    return prompts.SYSTEM_IMAGE if facts.is_image else prompts.SYSTEM_VIDEO


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


def _effective(
    draft: Draft, parameters: Parameters, negative: str, token_ids: tuple[tuple[int, ...], ...]
) -> dict[str, object]:
    """Every field of the request with its final value, the mode and the kind of checkpoint, as JSON values."""
    request, model = draft.request, draft.model
    values: dict[str, object] = {"mode": parameters.mode, "checkpoint_kind": model.kind}
    for name in SPECS:
        values[name] = getattr(parameters if hasattr(parameters, name) else request, name)
    values["quantization"] = model.quantization and model.quantization.record()
    values["adapters"] = [adapter.record() for adapter in model.adapters]
    values["size"] = f"{parameters.width}x{parameters.height}"
    if request.negative_prompt_token_ids is None:
        values["negative_prompt"] = negative
    values["image"] = _shown(request.image)
    values["video"] = _shown(request.video)
    values["sound_path"] = _shown(request.sound_path)
    values |= dict.fromkeys(CONTROLS)
    values |= {} if draft.action is None else draft.action.effective()
    values |= {} if draft.transfer is None else draft.transfer.effective()
    values["latents"] = sorted(request.latents) if request.latents else None
    values["prompt_tokens"] = [len(ids) for ids in token_ids]
    if len(draft.chunks) > 1:
        values["num_video_frames_per_chunk"] = _facts(draft).num_frames
    values["output_size"] = _output_size(draft.chunks[0], model)
    return values


def _output_size(streams: Sequence[StreamPlan], model: ModelConfig) -> str:
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
