"""Sessions of a causal simulator: what is asked for, and the plan of each of their chunks. No torch.

A session makes one video, latent frame 0 first and then chunk after chunk, each after actions. Frame 0
comes from a picture or is generated. Every chunk is a request of its own, whose plan says which
frames before it are still to be added to the history.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_cosmos3 import media
from vllm_cosmos3.checkpoint.config import ModelConfig
from vllm_cosmos3.checkpoint.kinds import WORLD_MODEL, check_mode
from vllm_cosmos3.checkpoint.latents import vision_shape
from vllm_cosmos3.checkpoint.simulators import (
    FULL_HISTORY,
    TEXT_TOKENS,
    ActionSpace,
    CausalConfig,
)
from vllm_cosmos3.errors import InvalidRequest, did_you_mean
from vllm_cosmos3.request import prompts
from vllm_cosmos3.request.embodiments import VIEWS
from vllm_cosmos3.request.fields import Spec
from vllm_cosmos3.request.request import MAX_SEED
from vllm_cosmos3.request.sizes import aspect_ratio, nearest_size, reduced_ratio

if TYPE_CHECKING:
    from vllm_cosmos3.media import ImageSource

TIER = 480  # of the sizes that simulators were trained with
SIZE = (832, 480)  # width and height without a picture
FPS = 24.0
LONGEST_HISTORY = 4096  # latent frames
COMMITS = ("frame", "chunk")
DomainName = str | Sequence[str] | None  # the embodiment of all rows of actions, or of each


def _field(default: Any, kind: str, words: str, **spec: Any) -> Any:
    return dataclasses.field(
        default=default, metadata={"spec": Spec(kind=kind, help=words, **spec)}
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRequest:
    """What a session starts with. Every value is checked here, once.

    Raises:
        InvalidRequest: a field has a value that it cannot have.
    """

    prompt: str = _field(
        "", "text", "what the world looks like: text, or a JSON caption", high=2**20
    )
    image: ImageSource | None = _field(  # noqa: RUF009
        None, "image", "picture that is latent frame 0 (default: generated)"
    )
    size: str | None = _field(
        None, "size", "of the video, e.g. 832x480 (default: of 480p, after the picture)"
    )
    fps: float = _field(
        FPS, "float", "frame rate in frames per second", low=1, high=60, unit="frames per second"
    )
    seed: int | None = _field(None, "int", "of all noise (default: random)", low=0, high=MAX_SEED)
    domain_name: str | None = _field(
        None, "text", "embodiment of the actions (default: of the checkpoint)", high=256
    )
    view_point: str = _field(
        "ego_view", "choice", "camera position, for JSON captions", choices=tuple(VIEWS)
    )
    history: int = _field(
        FULL_HISTORY,
        "int",
        "latest clean latent frames that are remembered",
        low=1,
        high=LONGEST_HISTORY,
        unit="latent frames",
    )
    sinks: int | None = _field(
        None,
        "int",
        "first latent frames that are never forgotten (default: of the checkpoint)",
        low=0,
        high=LONGEST_HISTORY,
        unit="latent frames",
    )
    commit: str = _field("frame", "choice", "what is added to the history at once: frames one by one, or a whole chunk", choices=COMMITS)  # fmt: skip

    def __post_init__(self) -> None:
        for name, spec in SESSION_SPECS.items():
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, spec.checked(name, value))
            elif SESSION_DEFAULTS[name] is not None:
                raise InvalidRequest(name, value, spec.possible, "missing_required")
        if self.seed is None:
            object.__setattr__(self, "seed", secrets.randbelow(MAX_SEED))


SESSION_SPECS: dict[str, Spec] = {
    field.name: field.metadata["spec"] for field in dataclasses.fields(SessionRequest)
}
SESSION_DEFAULTS: dict[str, Any] = {
    field.name: field.default for field in dataclasses.fields(SessionRequest)
}


def session_request(fields: Mapping[str, Any]) -> SessionRequest:
    """The request with these fields.

    Raises:
        InvalidRequest: a field is unknown, or has a value that it cannot have.
    """
    for name in fields.keys() - SESSION_SPECS.keys():
        hint = did_you_mean(name, SESSION_SPECS)
        raise InvalidRequest(name, fields[name], hint, "unknown_parameter")
    return SessionRequest(**fields)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Opening:
    """What a session is made with: the prompt's tokens, the size of its frames and of its history.

    ``frame`` [1, 48, 1, h, w] is the shape of a latent frame; ``source`` uint8 [1, H, W, 3] the picture
    of the first one, which may have more at the right and bottom. ``tokens`` are those of a frame
    with its actions, ``chunk`` the most frames that are generated at once.
    """

    token_ids: tuple[int, ...]
    frame: tuple[int, ...]
    source: np.ndarray | None
    fps: float
    seed: int
    history: int
    sinks: int
    chunk: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChunkPlan:
    """One chunk of a session: ``frames`` latent frames from ``first`` on.

    ``commits`` are ranges of frames that are added to the history before. ``sigmas`` are the noise
    levels, none where the chunk is given. ``rows`` are float32 [rows of all frames, 64], each of the
    embodiment in ``domain_ids``, None where nothing is done. The first chunk has an ``opening``.
    """

    session: str
    first: int
    frames: int
    commits: tuple[tuple[int, int], ...]
    sigmas: tuple[float, ...]
    rows: np.ndarray | None
    domain_ids: tuple[int, ...]
    opening: Opening | None = None

    @property
    def steps(self) -> int:
        """Calls of the stage's ``step`` that it takes."""
        return len(self.commits) + len(self.sigmas)


@dataclass(slots=True, kw_only=True, eq=False)
class World:
    """A session as its owner keeps it: how far it is. Each plan is made once the one before is done."""

    name: str
    opening: Opening
    causal: CausalConfig
    action_dim: int
    space: ActionSpace
    step_frames: int  # that are committed at once
    next: int = 0
    pending: int = 0  # frames before it that are not in the history yet

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the actions of a step."""
        return self.causal.chunk_size * self.causal.rows_per_frame, self.space.width

    def open(self) -> ChunkPlan:
        """The plan of latent frame 0."""
        return ChunkPlan(
            session=self.name,
            first=0,
            frames=1,
            commits=(),
            sigmas=() if self.opening.source is not None else self.causal.sigmas_at(0),
            rows=None,
            domain_ids=(self.space.domain_id,),
            opening=self.opening,
        )

    def step(self, actions: Any, domain_name: DomainName = None) -> ChunkPlan:
        """The plan of the next chunk after ``actions``: as many rows as it has frames, or None.

        ``domain_name`` is the embodiment of all rows, or of each.

        Raises:
            InvalidRequest: they have another shape, or no such embodiment is known.
        """
        spaces = self._spaces(domain_name)
        first, step = self.next, self.step_frames
        start = first - self.pending
        return ChunkPlan(
            session=self.name,
            first=first,
            frames=self.causal.chunk_size,
            commits=tuple((a, min(a + step, first)) for a in range(start, first, step)),
            sigmas=self.causal.sigmas_at(first),
            rows=None if actions is None else self._rows(actions, spaces),
            domain_ids=tuple(space.domain_id for space in spaces),
        )

    def done(self, plan: ChunkPlan) -> None:
        """This chunk was made."""
        self.next, self.pending = plan.first + plan.frames, plan.frames

    def _spaces(self, names: DomainName) -> list[ActionSpace]:
        """The embodiment of each row."""
        count = self.shape[0]
        if names is None:
            return [self.space] * count
        if isinstance(names, str):
            return [find_space(self.causal, names)] * count
        spaces = [find_space(self.causal, name) for name in names]
        if len(spaces) != count or len({space.width for space in spaces}) > 1:
            possible = f"one name, or {count} of embodiments with rows of one width"
            raise InvalidRequest("domain_name", list(names), possible)
        return spaces

    def _rows(self, actions: Any, spaces: list[ActionSpace]) -> np.ndarray:
        count, width, kinds = self.shape[0], spaces[0].width, list(dict.fromkeys(spaces))
        possible = f"numbers of the shape [{count}, {width}]: a row for each frame that "
        possible += f"{' or '.join(space.name for space in kinds)} leads to"
        try:
            with np.errstate(over="ignore"):
                given = np.asarray(actions, np.float32)
        except (TypeError, ValueError, OverflowError):
            raise InvalidRequest("actions", actions, possible, "invalid_type") from None
        widths = {width, kinds[0].slots} if len(kinds) == 1 else {width}
        if given.ndim != 2 or given.shape[0] != count or given.shape[1] not in widths:
            raise InvalidRequest("actions", list(given.shape), possible)
        rows = np.zeros((count, self.action_dim), np.float32)
        for space in kinds:
            own = np.array([other is space for other in spaces])
            rows[own, : given.shape[1]] = self._in_units_of_the_model(given[own], space)
        return rows

    def _in_units_of_the_model(self, given: np.ndarray, space: ActionSpace) -> np.ndarray:
        if not np.isfinite(given).all() or given[:, space.slots :].any():
            possible = f"finite, and 0 beyond the first {space.slots} numbers of a row"
            raise InvalidRequest("actions", "other numbers", possible)
        if space.offset is not None and space.scale is not None:
            offset, scale = (np.array(x, np.float32) for x in (space.offset, space.scale))
            with np.errstate(over="ignore"):
                given = (given - offset) / scale
            if not np.isfinite(given).all():
                possible = "within the range of float32, in the units of the model as well"
                raise InvalidRequest("actions", "other numbers", possible)
        return given


def make_world(
    request: SessionRequest, model: ModelConfig, tokenizer: prompts.Tokenizer, name: str
) -> World:
    """The session that a request asks for, before its first chunk. Opens its picture.

    Raises:
        InvalidRequest: the checkpoint is no simulator, or a field does not suit it.
    """
    check_mode(model.kind, WORLD_MODEL)
    causal = model.causal
    assert causal is not None  # so says the kind
    space = causal.spaces[causal.default_space]
    if request.domain_name is not None:
        space = find_space(causal, request.domain_name)
    (width, height), (rows, columns), source = _canvas(request)
    ids = _token_ids(request, causal, tokenizer, width, height)
    sinks = causal.sink_frames if request.sinks is None else request.sinks
    assert request.seed is not None
    return World(
        name=name,
        opening=Opening(
            token_ids=ids,
            frame=vision_shape(1, rows, columns, model.vae),
            source=source,
            fps=request.fps,
            seed=request.seed,
            history=request.history,
            sinks=sinks,
            chunk=causal.chunk_size,
        ),
        causal=causal,
        action_dim=model.transformer.action_dim,
        space=space,
        step_frames=1 if request.commit == "frame" else causal.chunk_size,
    )


def find_space(causal: CausalConfig, name: str) -> ActionSpace:
    """The embodiment of this name, in any case; InvalidRequest if the checkpoint has none."""
    space = causal.spaces.get(name.strip().lower())
    if space is None:
        raise InvalidRequest("domain_name", name, f"one of {', '.join(causal.spaces)}")
    return space


def _canvas(request: SessionRequest) -> tuple[tuple[int, int], tuple[int, int], np.ndarray | None]:
    """Width and height of the canvas, height and width of the picture on it, and its pixels."""
    size = None if request.size is None else _size(request.size)
    if request.image is None:
        width, height = size or SIZE
        return (width, height), (height, width), None
    frame = next(media.frames_of([request.image], limit=1, field="image"))
    width, height = size or nearest_size(TIER, frame.shape[1], frame.shape[0])
    pixels, (rows, columns) = media.fit_inside(frame[None], height=height, width=width)
    return (width, height), (rows, columns), pixels


def _size(text: str) -> tuple[int, int]:
    width, height = map(int, text.split("x"))
    if (
        not (width and height)
        or width % 16
        or height % 16
        or width * height > SIZE[0] * SIZE[1] * 4
    ):
        possible = f"multiples of 16 of at most {SIZE[0] * SIZE[1] * 4:,} pixels, such as 832x480"
        raise InvalidRequest("size", text, possible)
    return width, height


def _token_ids(
    request: SessionRequest,
    causal: CausalConfig,
    tokenizer: prompts.Tokenizer,
    width: int,
    height: int,
) -> tuple[int, ...]:
    text = request.prompt.strip()
    if causal.json and text:
        text = _caption(text, VIEWS[request.view_point], width, height)
    ids, _ = prompts.encode(text, tokenizer, system=None, limit=TEXT_TOKENS + 2)
    return ids


def _caption(text: str, view: str, width: int, height: int) -> str:
    """The JSON caption that simulators of cameras were trained with: it knows no duration."""
    shape = aspect_ratio(width, height) or reduced_ratio(width, height)
    facts = {"resolution": {"H": height, "W": width}, "aspect_ratio": shape}
    caption = prompts.json_object(text)
    if caption is not None:
        return json.dumps(caption | {k: v for k, v in facts.items() if k not in caption})
    text = text if text.endswith((".", "!", "?")) else f"{text}."
    framing = {"cinematography": {"framing": view}, "actions": [{"description": text}]}
    return json.dumps(framing | facts)


def opening_of(model: ModelConfig, request: SessionRequest, text: int) -> Opening:
    """The sizes of a session with a text of so many tokens, for estimates."""
    causal = model.causal
    assert causal is not None
    (_, (rows, columns), source) = _canvas(replace(request, image=None))
    return Opening(
        token_ids=(0,) * text,
        frame=vision_shape(1, rows, columns, model.vae),
        source=source,
        fps=request.fps,
        seed=0,
        history=request.history,
        sinks=causal.sink_frames if request.sinks is None else request.sinks,
        chunk=causal.chunk_size,
    )
