"""Progress bars: while weights are loaded, and one for each phase of a request.

On a terminal, or as widgets in a notebook; each ends full when its work has ended.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from vllm_cosmos3.progress import Progress, Report

STEPS = "{desc:8}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]{postfix}"
SHARE = "{desc:8}{percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"
WHOLE = "{desc:8}{percentage:3.0f}%|{bar}| [{elapsed}]"  # of what is done at once


def are_seen() -> bool:
    """Whether bars are for anyone: on a terminal or in a notebook, and under torchrun on rank 0."""
    first = os.environ.get("RANK", "0") == "0"
    return first and (sys.stderr.isatty() or "ipykernel" in sys.modules)


@contextmanager
def loading_bar(total: int) -> Iterator[Callable[[int], None]]:
    """A bar in percent. What it gives is told how many of ``total`` values are in place."""
    with _bar("load", total, SHARE) as bar:
        yield lambda done: _move(bar, done)
        _move(bar, total)


@contextmanager
def request_bars(*, leave: bool = True) -> Iterator[Report]:
    """A bar for each phase of a request. What it gives is called with its progress.

    Without ``leave`` they vanish, each as the next one begins.
    """
    bar: Any = None

    def ended() -> None:
        if bar is not None:
            _move(bar, bar.total)
            bar.close()

    def show(progress: Progress) -> None:
        nonlocal bar
        if bar is None or bar.desc != progress.phase:
            ended()
            stepped = progress.phase == "denoise"
            total, form = (progress.steps, STEPS) if stepped else (1, WHOLE)
            bar = _bar(progress.phase, total, form, leave=leave)
        if progress.phase == "denoise":
            if progress.reused:
                bar.set_postfix_str(f"{progress.reused} reused", refresh=False)
            _move(bar, progress.step)

    try:
        yield show
        ended()
    finally:
        if bar is not None:
            bar.close()


@contextmanager
def requests_bar(count: int) -> Iterator[Callable[[object], None]]:
    """A bar of requests that run at the same time. What it gives is called as each has ended."""
    with _bar("requests", count, STEPS, unit="request") as bar:
        yield lambda _: _move(bar, bar.n + 1)


def each_of(count: int) -> Iterator[AbstractContextManager[Report]]:
    """`request_bars` of one request after the other, under a bar of them all."""
    with _bar("requests", count, STEPS, unit="request") as bar:
        for _ in range(count):
            yield request_bars(leave=False)
            _move(bar, bar.n + 1)


def _bar(name: str, total: int, form: str, *, leave: bool = True, unit: str = "step") -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a notebook without widgets gets text
        from tqdm.auto import tqdm

        return tqdm(
            desc=name, total=total, unit=unit, bar_format=form, dynamic_ncols=True, leave=leave
        )


def _move(bar: Any, done: int) -> None:
    bar.update(min(done, bar.total) - bar.n)
    bar.refresh()
