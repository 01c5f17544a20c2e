"""Every error a user can meet. Errors carry facts; the command line and the server format them."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable
from itertools import islice

# Names that other programs have for fields of ours, which are spelled unlike them.
SYNONYMS = {
    "aspect_ratio": "size", "audio": "generate_sound", "batch_size": "n", "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale", "count": "n", "dimensions": "size", "duration": "seconds",
    "duration_seconds": "seconds", "first_frame": "image", "frames": "num_frames", "length": "seconds",
    "negative": "negative_prompt", "num_images": "n", "num_videos": "n", "resolution": "size",
    "sampler": "schedule", "steps": "num_inference_steps", "text": "prompt",
    "video_length": "num_frames",
}  # fmt: skip
LONGEST = 80  # characters that a message repeats of what was given


class Cosmos3Error(Exception):
    """Base of all errors of this package. ``code`` is a stable slug for programs."""

    code = "internal_error"


class InvalidRequest(Cosmos3Error, ValueError):
    """A request field has a value that cannot be served.

    ``field`` is the public name, ``value`` what was given (None reads as missing), ``possible``
    what would be accepted, as the end of the sentence "... must be". ``code`` says what kind of
    mistake it is: ``invalid_value``, ``invalid_type``, ``missing_required``, ``conflict``,
    ``too_large``, ``unsupported_by_model``, ... With ``unknown_parameter`` the field itself is the
    mistake, and ``possible`` a hint, if there is one.
    """

    def __init__(
        self, field: str, value: object, possible: str, code: str = "invalid_value"
    ) -> None:
        self.field, self.value, self.possible, self.code = field, value, possible, code
        shown = "missing" if value is None else brief(value)
        message = f"{field} is {shown}, must be {possible}"
        if code == "unknown_parameter":  # there is nothing wrong with the value
            place, colon, name = field.rpartition(": ")
            message = f"{place}{colon}unknown field {name}{f'; {possible}' if possible else ''}"
        super().__init__(message)

    def __reduce__(self) -> tuple[type[InvalidRequest], tuple[str, object, str, str]]:
        return type(self), (self.field, self.value, self.possible, self.code)


def brief(value: object) -> str:
    """How a message repeats a value."""
    return cut(repr(_beginning(value)))


def cut(text: str) -> str:
    """How a message repeats a text."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The question with the name that is nearest to an unknown one, empty where none is near.

    ``cutoff`` is how alike they have to be, from 0 to 1; the beginning of one name alone is near as
    well. A name of thousands of characters, which would take seconds to compare, is like none.
    """
    known = list(known)
    if (same := SYNONYMS.get(name)) in known:
        return f"did you mean {same}?"
    near = difflib.get_close_matches(name[: LONGEST + 1], known, n=1, cutoff=cutoff)
    if not near and name:
        near = [each for each in known if each.startswith(name)]
        near = near if len(near) == 1 else []
    return f"did you mean {near[0]}?" if near else ""


def _beginning(value: object) -> object:
    """As much of a value as is shown: to write a long list out takes seconds."""
    if isinstance(value, str | bytes):
        return value[: LONGEST + 1]
    if type(value) is list or type(value) is tuple:
        return type(value)(_beginning(item) for item in value[:LONGEST])
    if type(value) is dict:
        first = islice(value.items(), LONGEST)
        return {_beginning(name): _beginning(item) for name, item in first}
    return value


class Unsupported(Cosmos3Error):
    """The request or checkpoint is understood, but this version cannot serve it."""

    code = "unsupported"


class CheckpointError(Cosmos3Error):
    """The checkpoint is missing, incomplete or corrupt. One sentence, with file and tensor names."""

    code = "checkpoint"


class Busy(Cosmos3Error):
    """The queue is full; try again later."""

    code = "busy"


class Cancelled(Cosmos3Error):
    """The request was cancelled by its owner."""

    code = "cancelled"


class OutOfMemory(Cosmos3Error):
    """The request does not fit into the memory of the device. Says what is needed and free.

    ``crowded`` means that it would fit if no other request were in flight.
    """

    code = "out_of_memory"

    def __init__(self, message: str, *, crowded: bool = False) -> None:
        super().__init__(message)
        self.crowded = crowded


class DeadlineExceeded(Cosmos3Error):
    """The request took longer than it was allowed to."""

    code = "deadline_exceeded"


class WorkerDied(Cosmos3Error):
    """A worker process ended while it was needed, or does not answer."""

    code = "worker_died"


class SessionLost(Cosmos3Error):
    """A session of a simulator is no longer there."""

    code = "session_lost"


class Sleeping(Cosmos3Error):
    """Nothing is made until somebody wakes the generator, or has finished an update of its weights."""

    code = "sleeping"


class DiskFull(Cosmos3Error):
    """A file could not be written as there is no room for it."""

    code = "storage_full"


def file_error(error: OSError) -> Cosmos3Error:
    """What a client is told of an error of files: nothing about where they are."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull("no space left on the disk")
    reason = error.strerror or type(error).__name__
    return Cosmos3Error(f"a file could not be read or written ({reason})")
