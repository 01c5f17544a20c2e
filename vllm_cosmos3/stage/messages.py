"""Messages between a stage process and its client, and where they meet. Loads neither torch nor vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_cosmos3.errors import Cosmos3Error
from vllm_cosmos3.progress import Preview, Progress
from vllm_cosmos3.request.plan import Batch
from vllm_cosmos3.stage.config import StageConfig
from vllm_cosmos3.stage.scheduler import QueueConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """A request. ``plan`` is for the stage; ``deadline`` are seconds from now, waiting included."""

    job: str
    plan: Any
    seconds: float = 0.0  # estimated work
    save: Path | None = None
    clip: Any = None  # for the stage's decode
    deadline: float | None = None
    preview: bool = False  # between steps, as `PreviewPace` allows
    batch: Batch | None = None  # of those that it may be denoised with


@dataclass(frozen=True, slots=True, kw_only=True)
class Maintain:
    """A call to all ranks that no request may be in the midst of: running ones end first, others wait.

    It is given up if they have not ended ``patience`` seconds from now.
    """

    job: str
    method: str
    args: tuple[Any, ...] = ()
    patience: float


@dataclass(frozen=True, slots=True)
class Cancel:
    job: str


@dataclass(frozen=True, slots=True)
class Release:
    """Give up what the ranks keep under this name between requests, after the call under way."""

    name: str


@dataclass(frozen=True, slots=True)
class StatusRequest:
    """Answered with `Status`."""


@dataclass(frozen=True, slots=True)
class Stop:
    """End the process now."""


@dataclass(frozen=True, slots=True)
class Accepted:
    job: str
    position: int


@dataclass(frozen=True, slots=True)
class ProgressUpdate:
    job: str
    progress: Progress


@dataclass(frozen=True, slots=True)
class PreviewUpdate:
    job: str
    preview: Preview


@dataclass(frozen=True, slots=True)
class Done:
    """``value`` are the files written, or the file that holds the pickled result."""

    job: str
    value: Any


@dataclass(frozen=True, slots=True)
class Failure:
    """The end of a request, or with no job the end of the stage."""

    job: str | None
    error: Cosmos3Error


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """``state`` is starting, ready, sleeping, updating, recovering, draining or failed.

    ``weights`` is the version that a trainer has given its last update, None where there was none.
    ``updates`` counts those that the ranks have had since they have loaded the checkpoint.
    ``given_up`` counts the updates that ended because nothing was heard of the trainer any more.

    ``nodes`` are those of a Ray cluster that the ranks are on, by rank.
    ``loaded`` counts the values of the checkpoint that are in place while the ranks start. ``call``
    is what all ranks are computing, if anything, for ``call_seconds`` so far.
    """

    state: str
    waiting: int = 0
    waiting_seconds: float = 0.0
    running: int = 0
    limit: int = 0
    restarts: int = 0
    weights: str | None = None
    updates: int = 0
    given_up: int = 0
    nodes: tuple[str, ...] = ()
    loaded: int = 0
    call: str = ""
    call_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Configuration of a stage process, which its parent sends on standard input."""

    stage: StageConfig
    queue: QueueConfig
    folder: Path  # socket, spooled results, temporary files
    parent: int
    drain_seconds: float


def address(folder: Path) -> str:
    """Address of the stage that works in ``folder``."""
    return f"ipc://{folder}/stage"
