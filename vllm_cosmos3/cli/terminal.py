"""What the command line shows while it works: progress, and nothing of the libraries below."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vllm_cosmos3.bars import request_bars
from vllm_cosmos3.progress import Progress


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Errors alone from vLLM and torch: what else they say is for servers and tears the bar.

    A VLLM_LOGGING_LEVEL that the user has set is left to do its work.
    """
    if "VLLM_LOGGING_LEVEL" in os.environ:
        yield
        return
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"  # of a vLLM that is imported or started from here on
    loggers = [logging.getLogger(name) for name in ("vllm", "torch._library.triton")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        del os.environ["VLLM_LOGGING_LEVEL"]
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


@contextmanager
def progress_shown(*, terminal: bool) -> Iterator[Callable[[Progress], None]]:
    """A bar for each phase on a terminal; one line per phase in a log."""
    if not terminal:
        seen: set[str] = set()

        def line(progress: Progress) -> None:
            if progress.phase not in seen:
                seen.add(progress.phase)
                steps = f" {progress.steps} steps" if progress.phase == "denoise" else ""
                print(f"{progress.phase}{steps}", file=sys.stderr)

        yield line
        return

    with request_bars() as move:
        yield move
