"""Imports without the garbage collector, for those of vLLM: five thousand modules.

The collector starts again and again while they are read, looks at all that there is by then and
finds nothing: a fifth of the time until a command, a server or a stage is up. At the end of the process
it would look once more.
"""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """A block of imports; afterwards the collector is as it was."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def end_at_once() -> None:
    """Let this process, which is a command's own, end without a search for what it would free anyway."""
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)
