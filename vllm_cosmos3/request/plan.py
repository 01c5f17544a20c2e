"""Plan of a request: plain frozen data, no tensors, no weights, picklable.

`planner` writes it; below that nobody asks which mode a request had. Streams are in the order of the
generation sequence.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

import numpy as np

from vllm_cosmos3.checkpoint.latents import time_steps
from vllm_cosmos3.request.defaults import Parameters


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StreamPlan:
    """Stream of one modality: the shape of its latents and which of them are given.

    ``shape`` is vision [1, 48, T, h, w], sound [64, T_s] or action [T_a, 64]. ``known`` are the
    positions on the time axis that are given rather than generated; ``source`` is what their
    latents are made from: for vision uint8 pixels [frames, H, W, 3] from frame 0 up to the last known
    position, which the encoder may see more of than the stream's shape keeps at the right and bottom; for
    action float32 rows of the whole shape, for sound its float32 samples [2, N]. ``rate`` is what a second
    holds of the material: pixel frames, sound latents, action rows. Of action, ``channels`` carry numbers
    and the rest is zero, and row 0 belongs to pixel frame ``first_frame``. Pixels that a later chunk takes
    over are filled up to ``canvas`` (height, width), as the source of the first was, if there is one.

    ``hidden_in_branches`` are the branches of guidance whose sequence leaves the stream out.
    ``positions_after`` says that its positions begin after those of the stream before, not beside
    them. With a ``control_weight`` the stream is one of several controls that the others attend to
    in turn: they take that part of the mean.
    """

    name: str
    shape: tuple[int, ...]
    rate: float
    known: tuple[int, ...] = ()
    source: np.ndarray | None = None
    channels: int = 0
    first_frame: int = 0
    canvas: tuple[int, int] | None = None
    hidden_in_branches: tuple[int, ...] = ()
    positions_after: bool = False
    control_weight: float | None = None

    @property
    def generated(self) -> bool:
        """Whether anything of it is made rather than given."""
        return len(self.known) < self.length

    @property
    def length(self) -> int:
        """Positions on the time axis."""
        return time_steps(self.name, self.shape)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ActionRows:
    """How the latents of the action stream become the actions of a result.

    Rows from ``start`` on and the first ``channels`` of each are kept; ``scale`` and ``offset``
    [channels] lead from the values that the model works with to the user's.
    """

    start: int
    channels: int
    scale: np.ndarray
    offset: np.ndarray

    def read(self, latents: np.ndarray) -> np.ndarray:
        """Actions float32 [T_a, channels] from latents [rows, 64]."""
        rows: np.ndarray = latents[self.start :, : self.channels] * self.scale + self.offset
        return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Requests with an equal one may be denoised in one forward, at most ``size`` of them."""

    key: Hashable
    size: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plan:
    """Everything that the four calls of the pipeline need to know about one request.

    ``token_ids`` has one list per guidance branch: the prompt, then the negative prompt unless the
    guidance scale is 1; with controls the prompt again between the two, for the branch without
    them. ``streams`` are in the order of the sequence; of several with one name the last is the
    result. ``parameters`` are the numbers of the request, of all chunks together.

    A long video is made in chunks: ``later_chunks`` has the streams of all but the first, in the
    same shapes, and each takes its first ``overlap`` pixel frames over from the end of the one
    before; of all together ``parameters.num_frames`` are kept, to the right of the clips
    ``side_by_side`` [num_frames, H, W, 3]. ``sound`` is the sound of the result where it is given,
    float32 [2, N]. ``seeds`` has one seed per result, of which ``together`` are denoised in one forward;
    those of other requests with the same ``batch`` may be in it as well. ``initial`` replaces
    the seeds' noise by stream name. ``decoded`` is false if the latents alone are wanted.
    ``domain_id`` is the embodiment of the actions, ``actions`` how to read them if they are
    generated. ``effective`` is the record of all parameters under their public names,
    JSON-serialisable. ``truncated`` are sentences on the prompts that were cut.
    """

    token_ids: tuple[tuple[int, ...], ...]
    streams: tuple[StreamPlan, ...]
    parameters: Parameters
    solver: str
    seeds: tuple[int, ...]
    decoded: bool
    together: int = 1
    batch: Batch | None = None
    domain_id: int = 0
    actions: ActionRows | None = None
    later_chunks: tuple[tuple[StreamPlan, ...], ...] = ()
    overlap: int = 0
    side_by_side: tuple[np.ndarray, ...] = ()
    sound: np.ndarray | None = None
    initial: Mapping[str, np.ndarray] = field(default_factory=dict)
    effective: Mapping[str, object] = field(default_factory=dict)
    truncated: tuple[str, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences for the user."""
        return (*self.parameters.warnings, *self.truncated)

    @property
    def steps(self) -> int:
        """Calls of the pipeline's ``step`` that the request takes."""
        rounds = -(-len(self.seeds) // self.together)
        return self.parameters.num_inference_steps * len(self.chunks) * rounds

    @property
    def pixel_bytes(self) -> int:
        """Bytes of the pixels that it carries until the request has ended."""
        sources = [stream.source for chunk in self.chunks for stream in chunk]
        arrays = [*(each for each in sources if each is not None), *self.side_by_side]
        arrays += [] if self.sound is None else [self.sound]  # which may be a source, too
        return sum(array.nbytes for array in {id(array): array for array in arrays}.values())

    def seen(self, branch: int) -> tuple[int, ...]:
        """Places of the streams that a branch of guidance has in its sequence."""
        return tuple(
            place
            for place, stream in enumerate(self.streams)
            if branch not in stream.hidden_in_branches
        )

    @property
    def chunks(self) -> tuple[tuple[StreamPlan, ...], ...]:
        """The streams of every chunk."""
        return (self.streams, *self.later_chunks)
