"""Noise by two published rules, drawn on the CPU in float32: equal on every device and every rank.

``numpy`` restarts the same generator for every stream, so streams share their leading numbers; this
is what the models' own framework does. ``torch`` draws the streams from one generator, one after the
other; this is what diffusers does.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

RULES = ("numpy", "torch")
_ORDER = ("vision", "sound", "action")

Shapes = Mapping[str, tuple[int, ...]]


def initial_noise(shapes: Shapes, *, seed: int, rule: str, chunk: int = 0) -> dict[str, Tensor]:
    """Standard normal noise for each stream name in ``shapes``. ``seed`` in [0, 2**32).

    A later ``chunk`` of a long video has the next seed with ``numpy``; with ``torch`` the generator
    goes on.
    """
    if rule == "numpy":
        return {name: _numpy(shape, (seed + chunk) % 2**32) for name, shape in shapes.items()}
    generator = torch.Generator().manual_seed(seed)
    for _ in range(chunk):
        _drawn(shapes, generator)
    return _drawn(shapes, generator)


def step_noise(shapes: Shapes, *, seed: int, rule: str, index: int) -> dict[str, Tensor]:
    """The noise that a stochastic solver adds at step ``index``.

    ``numpy`` seeds a torch generator with ``seed + index``. ``torch`` goes on where the initial
    noise ended; it is drawn again from the start, which needs no state and is cheap for the few
    steps of a distilled checkpoint.
    """
    if rule == "numpy":
        return _drawn(shapes, torch.Generator().manual_seed(seed + index))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(index + 1):
        _drawn(shapes, generator)
    return _drawn(shapes, generator)


def _numpy(shape: tuple[int, ...], seed: int) -> Tensor:
    drawn = np.random.RandomState(seed).standard_normal(shape)
    return torch.from_numpy(drawn.astype(np.float32))


def _drawn(shapes: Shapes, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        name: torch.randn(shapes[name], generator=generator) for name in _ORDER if name in shapes
    }
