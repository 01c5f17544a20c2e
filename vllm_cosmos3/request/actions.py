"""The actions of a request: which rows the model is given, which it makes, and in which units.

The rows of the stream are the history, then the state at the first frame, then the chunk. They count
frames without a gap: the chunk has frames 1, 2, ..., so that the state is at frame 0, and without a
state the history ends there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vllm_cosmos3.checkpoint.config import ModelConfig
from vllm_cosmos3.checkpoint.kinds import check_mode
from vllm_cosmos3.checkpoint.latents import latent_frames
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.request.embodiments import VIEWS, Embodiment, find_embodiment
from vllm_cosmos3.request.plan import ActionRows, StreamPlan
from vllm_cosmos3.request.request import SPECS, GenerateRequest

Rows = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModeInputs:
    """Inputs of an action mode: the chunk, and the whole video or its first frame alone."""

    chunk: bool
    video: bool


MODE_INPUTS = {
    "forward_dynamics": ModeInputs(chunk=True, video=False),
    "inverse_dynamics": ModeInputs(chunk=False, video=True),
    "policy": ModeInputs(chunk=False, video=False),
}
WITHOUT_MODE = (
    "domain_name",
    "domain_id",
    "raw_action_dim",
    "action_chunk_size",
    "action",
    "action_path",
    "action_history",
    "action_state",
    "action_stats_path",
    "view_point",
    "view_description",
    "image_size",
)
SMALLEST_SCALE = 1e-8  # of a number that never changes in the statistics


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Action:
    """Actions of a request, resolved. ``chunk`` is None where it is made, else the rows of
    all chunks of a rollout [chunks * T_a, channels].

    ``history`` [H, channels] and ``state`` [0 or 1, channels] are float32 in the model's units, and
    so is ``chunk``; ``scale`` and ``offset`` lead from these units to the user's.
    """

    mode: ModeInputs
    embodiment: Embodiment
    channels: int
    chunk_size: int
    known_frames: tuple[int, ...]  # latent ones, that the input supplies
    view_point: str
    view: str
    image_size: int
    fps: float
    history: np.ndarray
    state: np.ndarray
    chunk: np.ndarray | None
    scale: np.ndarray
    offset: np.ndarray
    warnings: tuple[str, ...]

    @property
    def num_frames(self) -> int:
        return self.chunk_size + 1

    @property
    def rows(self) -> ActionRows | None:
        """How to read the actions that were made; None if none were."""
        if self.chunk is not None:
            return None
        start = len(self.history) + len(self.state)
        return ActionRows(start=start, channels=self.channels, scale=self.scale, offset=self.offset)

    def effective(self) -> dict[str, object]:
        """The fields of the request with their final values."""
        return {
            "domain_name": self.embodiment.name,
            "domain_id": self.embodiment.domain_id,
            "raw_action_dim": self.channels,
            "action_chunk_size": self.chunk_size,
            "view_point": self.view_point,
            "image_size": self.image_size,
            "action": None if self.chunk is None else list(self.chunk.shape),
        }


def resolve_action(request: GenerateRequest, model: ModelConfig) -> Action | None:
    """The actions of a request, or None if it is not about actions. Reads its JSON files.

    Raises:
        InvalidRequest: the fields contradict each other, the embodiment or the checkpoint.
    """
    if request.action_mode is None:
        _check_without_mode(request)
        return None
    check_mode(model.kind, request.mode)
    mode = MODE_INPUTS[request.action_mode]
    _check_model(request, model)
    _check_others(request)
    _check_inputs(request, mode)
    embodiment = find_embodiment(request.domain_name, request.domain_id)
    _check_history(request)
    given = _rows_given(request)
    channels = _channels(request, embodiment, given, model)
    chunk_size = _chunk_size(request, embodiment, given)
    _check_frames(request, model, mode, chunk_size)
    units = scale, offset = _units(request, channels)
    chunk, warnings = _chunk(given, chunk_size * request.num_chunks)
    if early := chunk_size % model.vae.scale_factor_temporal:
        warnings.append(
            f"action_chunk_size {chunk_size} is not a multiple of {model.vae.scale_factor_temporal}:"
            f" the video ends {early} frames early"
        )
    known = range(latent_frames(chunk_size + 1, model.vae)) if mode.video else (0,)
    view_point = request.view_point or embodiment.view_point
    state = None if request.action_state is None else (request.action_state,)
    chunk_name = "action" if request.action_path is None else "action_path"
    return Action(
        mode=mode,
        embodiment=embodiment,
        channels=channels,
        chunk_size=chunk_size,
        known_frames=tuple(known),
        view_point=view_point,
        view=" ".join(filter(None, (VIEWS[view_point], request.view_description))),
        image_size=request.image_size or embodiment.image_size,
        fps=request.fps or embodiment.fps,
        history=_normalized("action_history", request.action_history, *units),
        state=_normalized("action_state", state, *units),
        chunk=None if chunk is None else _normalized(chunk_name, chunk, *units),
        scale=scale,
        offset=offset,
        warnings=tuple(warnings),
    )


def action_stream(action: Action, model: ModelConfig, chunk: int = 0) -> StreamPlan:
    """The rows as a stream as wide as the model's: those that are given, and zeros.

    The history of a later ``chunk`` is what was carried out before it.
    """
    width, start = model.transformer.action_dim, chunk * action.chunk_size
    before = given = np.concatenate([action.history, action.state])
    if action.chunk is not None:
        given = np.concatenate([before, action.chunk])
        given = given[start : start + len(before) + action.chunk_size]
    source = np.zeros((len(before) + action.chunk_size, width), np.float32)
    source[: len(given), : action.channels] = given
    return StreamPlan(
        name="action",
        shape=source.shape,
        rate=action.fps,
        known=tuple(range(len(given))),
        source=source,
        channels=action.channels,
        first_frame=1 - len(before),
    )


def too_long(request: GenerateRequest, size: int, most: int, where: str = "") -> InvalidRequest:
    """The refusal of a chunk of more than ``most`` actions, by the field that its ``size`` follows from."""
    value: object
    if request.action_chunk_size is not None:
        name, value, possible = "action_chunk_size", size, f"at most {most}"
    elif request.num_frames is not None:
        name, value, possible = "num_frames", size + 1, f"at most {most + 1}"
    else:
        name = "action" if request.action_path is None else "action_path"
        value, possible = f"{size} rows a chunk", f"at most {most} rows a chunk"
    return InvalidRequest(name, value, possible + where, "too_large")


# The rules that join several fields.


def _check_without_mode(request: GenerateRequest) -> None:
    for name in WITHOUT_MODE:
        value = getattr(request, name)
        if value is None or (name == "image_size" and request.controls):
            continue
        raise InvalidRequest(name, value, "left out, or given with action_mode", "conflict")


def _check_model(request: GenerateRequest, model: ModelConfig) -> None:
    if not model.transformer.action_gen:
        possible = "left out: this checkpoint knows no actions"
        raise InvalidRequest("action_mode", request.action_mode, possible, "unsupported_by_model")


def _check_others(request: GenerateRequest) -> None:
    """Nothing is asked for that does not go with actions."""
    if request.generate_sound:
        possible = "False, as action_mode is given"
        raise InvalidRequest(
            "generate_sound", request.generate_sound, possible, "unsupported_combination"
        )
    if request.num_frames == 1:
        possible = "left out, as num_frames=1 makes an image"
        raise InvalidRequest(
            "action_mode", request.action_mode, possible, "unsupported_combination"
        )
    for name in ("seconds", "condition_frame_indexes_vision"):
        if (value := getattr(request, name)) is not None:
            possible = "left out: it follows from action_mode and action_chunk_size"
            raise InvalidRequest(name, value, possible, "conflict")
    if request.image_size is not None and (request.size or request.width):
        possible = "left out, as a size is given"
        raise InvalidRequest("image_size", request.image_size, possible, "conflict")


def _check_inputs(request: GenerateRequest, mode: ModeInputs) -> None:
    """The picture or clip, and the chunk, are there exactly if the mode takes them."""
    for_mode = f"for action_mode {request.action_mode}"
    if mode.video and request.image is not None:
        possible = f"left out; give a video {for_mode}"
        raise InvalidRequest("image", request.image, possible, "conflict")
    if request.image is None and request.video is None:
        name = "video" if mode.video else "image"
        raise InvalidRequest(name, None, f"given {for_mode}", "missing_required")
    if request.action is not None and request.action_path is not None:
        possible = "left out, as action is given"
        raise InvalidRequest("action_path", request.action_path, possible, "conflict")
    if mode.chunk and request.action is None and request.action_path is None:
        raise InvalidRequest("action", None, f"given {for_mode}", "missing_required")
    for name in () if mode.chunk else ("action", "action_path"):
        if (value := getattr(request, name)) is not None:
            raise InvalidRequest(name, value, f"left out {for_mode}, which predicts it", "conflict")


def _check_history(request: GenerateRequest) -> None:
    """The past is no longer than the longest chunk: each of its rows is a token of every step."""
    rows, most = len(request.action_history or ()), int(SPECS["action_chunk_size"].high)
    if rows > most:
        possible = f"at most {most} rows, the last ones"
        raise InvalidRequest("action_history", f"{rows} rows", possible, "too_large")


def _channels(
    request: GenerateRequest,
    embodiment: Embodiment,
    given: Rows | None,
    model: ModelConfig,
) -> int:
    """The width of an action row: as asked, as given, or the usual one of the embodiment."""
    width = request.raw_action_dim or embodiment.raw_action_dim
    if request.raw_action_dim is None and given and len(given[0]) in embodiment.widths:
        width = len(given[0])
    allowed = " or ".join(map(str, embodiment.widths))
    if width is None:
        possible = f"given for {embodiment.name}: {allowed}"
        raise InvalidRequest("raw_action_dim", None, possible, "missing_required")
    if width not in embodiment.widths:
        possible = f"{allowed} or left out, as the embodiment is {embodiment.name}"
        raise InvalidRequest("raw_action_dim", width, possible, "conflict")
    most = model.transformer.action_dim
    if width > most:
        possible = f"at most {most}, the actions of this checkpoint"
        raise InvalidRequest("raw_action_dim", width, possible, "unsupported_by_model")
    domains = model.transformer.num_embodiment_domains
    if embodiment.domain_id >= domains:
        possible = f"below {domains}, the embodiments of this checkpoint"
        raise InvalidRequest("domain_id", embodiment.domain_id, possible, "unsupported_by_model")
    return width


def _chunk_size(
    request: GenerateRequest,
    embodiment: Embodiment,
    given: Rows | None,
) -> int:
    """Actions in the chunk: as asked, or by the frames, the rows, or the embodiment."""
    frames = request.num_frames
    size = request.action_chunk_size
    if size is None and frames is not None:
        size = frames - 1
    if size is None:
        size = embodiment.action_chunk_size
        size = -(-len(given) // request.num_chunks) if given else size
    if frames is not None and frames != size + 1:
        possible = f"{size + 1} or left out, as action_chunk_size is {size}"
        raise InvalidRequest("num_frames", frames, possible, "conflict")
    most = int(SPECS["action_chunk_size"].high)
    if size > most:
        raise too_long(request, size, most)
    return size


def _check_frames(
    request: GenerateRequest, model: ModelConfig, mode: ModeInputs, size: int
) -> None:
    """Given actions make new frames, and a chunk that another follows ends on its last action.

    The model makes several frames at once: another chunk would go on from one before that action.
    """
    least = model.vae.scale_factor_temporal
    if request.num_chunks > 1 and size % least:
        possible, frames = f"a multiple of {least}", f"{least}k + 1"
        why = "as num_chunks is above 1"
    elif mode.chunk and size < least:
        possible, frames = f"at least {least}", f"at least {least + 1}"
        why = "as fewer actions make no new frame"
    else:
        return
    if request.action_chunk_size is None and request.num_frames is not None:
        raise InvalidRequest("num_frames", size + 1, f"{frames}, {why}")
    value = request.action_chunk_size or f"{size} (by the rows of action)"
    raise InvalidRequest("action_chunk_size", value, f"{possible}, {why}")


def _chunk(given: Rows | None, size: int) -> tuple[Rows | None, list[str]]:
    """The given rows, brought to ``size`` of them, with a warning where that was needed."""
    if given is None or len(given) == size:
        return given, []
    if len(given) > size:
        used = f"action has {len(given)} rows, of which the first {size} are used"
        return given[:size], [f"{used}; num_chunks uses more of them"]
    missing = size - len(given)
    return given + given[-1:] * missing, [
        f"action has {len(given)} rows; the last one is repeated {missing} times"
    ]


def _matrix(name: str, rows: Rows | None, channels: int) -> np.ndarray:
    if rows is None:
        return np.zeros((0, channels), np.float32)
    if len(rows[0]) != channels:
        possible = f"{channels} numbers wide, the raw_action_dim"
        raise InvalidRequest(name, f"{len(rows[0])} numbers wide", possible, "conflict")
    return np.array(rows, np.float32)


# Files.


def _rows_given(request: GenerateRequest) -> Rows | None:
    if request.action_path is None:
        return request.action
    rows: Rows = SPECS["action"].checked("action_path", _json("action_path", request.action_path))
    return rows


def _units(request: GenerateRequest, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale and offset [channels] of the statistics file; 1 and 0 without one."""
    path = request.action_stats_path
    if path is None:
        return np.ones(channels, np.float32), np.zeros(channels, np.float32)
    value = _json("action_stats_path", path)
    method = request.action_normalization
    key = "global_raw" if method == "quantile_rot" else "global"
    values = value.get(key, value) if isinstance(value, Mapping) else value
    names = {"meanstd": ("mean", "std"), "minmax": ("min", "max")}.get(method, ("q01", "q99"))
    first, second = (_statistic(path, values, name, channels) for name in names)
    least = np.zeros(channels) if method == "meanstd" else first
    if (second < least).any():
        below = "0" if method == "meanstd" else names[0]
        possible = f"a JSON file whose {names[1]} is nowhere below {below}"
        raise InvalidRequest("action_stats_path", path, possible)
    if method == "meanstd":
        return np.maximum(second, SMALLEST_SCALE), first
    return np.maximum(second / 2 - first / 2, SMALLEST_SCALE / 2), first / 2 + second / 2


def _normalized(name: str, rows: Rows | None, scale: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Rows of a field in the model's units: float32 [N, channels], N = 0 without the field."""
    with np.errstate(over="ignore", invalid="ignore"):
        matrix: np.ndarray = (_matrix(name, rows, len(scale)) - offset) / scale
    if rows is not None and not np.isfinite(matrix).all():
        row, column = np.argwhere(~np.isfinite(matrix))[0]
        possible = "within the range of float32, in the units of the model as well"
        raise InvalidRequest(name, rows[row][column], possible)
    return matrix


def _statistic(path: str, values: object, name: str, channels: int) -> np.ndarray:
    """One list of the statistics file, as long as an action."""
    numbers = values.get(name) if isinstance(values, Mapping) else None
    try:
        with np.errstate(over="ignore"):
            column = np.array(numbers, np.float32)
    except (TypeError, ValueError):
        column = np.zeros(0, np.float32)
    if column.shape != (channels,) or not np.isfinite(column).all():
        possible = f"a JSON file with {channels} finite numbers under {name}"
        raise InvalidRequest("action_stats_path", path, possible)
    return column


def _json(field: str, path: str) -> object:
    try:
        value: object = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InvalidRequest(field, path, f"a JSON file that can be read ({reason})") from None
    return value
