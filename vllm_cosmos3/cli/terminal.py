"""What the command line shows while it works: progress, and nothing of the libraries below."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
    """A bar with steps and the time left on a terminal; one line per phase in a log."""
    if not terminal:
        seen: set[str] = set()

        def line(progress: Progress) -> None:
            if progress.phase not in seen:
                seen.add(progress.phase)
                steps = f" {progress.steps} steps" if progress.phase == "denoise" else ""
                print(f"{progress.phase}{steps}", file=sys.stderr)

        yield line
        return

    from tqdm import tqdm

    form = (
        "{desc:8}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"
        "{postfix}"
    )
    with tqdm(desc="encode", total=1, unit="step", bar_format=form, dynamic_ncols=True) as bar:

        def move(progress: Progress) -> None:
            bar.total = progress.steps
            bar.set_description_str(progress.phase, refresh=False)
            if progress.phase == "denoise" and progress.step == 0:
                bar.unpause()  # the time left is that of the steps alone
            if progress.reused:
                bar.set_postfix_str(f"{progress.reused} reused", refresh=False)
            bar.update(progress.step - bar.n)
            bar.refresh()

        yield move
