"""Imports without the garbage collector, for those of vLLM: five thousand modules.

The collector starts again and again while they are read, looks at all that there is by then and
finds nothing: a fifth of the time until a command, a server or a stage is up.
"""

from __future__ import annotations

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
