"""Noise by two published rules, drawn on the CPU in float32: equal on every device and every rank.

``numpy`` restarts the same generator for every stream, so streams share their leading numbers; this
is what the models' own framework does. ``torch`` draws the streams from one generator, one after the
other, in the order of the shapes that are asked for; this is what diffusers does.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

BETWEEN_CHUNKS = 1 << 16  # seeds: more than a request has steps or chunks

LatentShapes = Mapping[str, tuple[int, ...]]


def initial_noise(
    shapes: LatentShapes, *, seed: int, rule: str, chunk: int = 0, fresh: int = 0
) -> dict[str, Tensor]:
    """Standard normal noise for each stream name in ``shapes``. ``seed`` in [0, 2**32).

    A later ``chunk`` of a long video has the next seed with ``numpy``; with ``torch`` the generator
    goes on, after the ``fresh`` draws of `step_noise` in each chunk before.
    """
    if rule == "numpy":
        return {name: _numpy(shape, (seed + chunk) % 2**32) for name, shape in shapes.items()}
    return _after(shapes, seed, chunk * (1 + fresh))


def step_noise(
    shapes: LatentShapes, *, seed: int, rule: str, index: int, chunk: int = 0, fresh: int = 0
) -> dict[str, Tensor]:
    """The noise that a stochastic solver adds at step ``index``, one of ``fresh``, of a ``chunk``.

    ``numpy`` seeds a torch generator with ``seed + index``, and BETWEEN_CHUNKS more for each chunk
    before. ``torch`` goes on where the initial noise of the chunk ended; it is drawn again from the
    start, which needs no state and is cheap for the few steps of a distilled checkpoint.
    """
    if rule == "numpy":
        own = (seed + index + BETWEEN_CHUNKS * chunk) % 2**32
        return _drawn(shapes, torch.Generator().manual_seed(own))
    return _after(shapes, seed, chunk * (1 + fresh) + 1 + index)


# Simulators: pure functions of the seed, of the first latent frame of a chunk and of the step, so that a
# session has no state of a generator. The strides are those of the models' own sampler.
FRAME_STRIDE, STEP_STRIDE = 1_000_003, 9_176


def rollout_noise(shape: tuple[int, ...], *, seed: int, first: int) -> Tensor:
    """Initial noise of a chunk of a rollout: drawn in bfloat16, as in training, float32."""
    generator = torch.Generator().manual_seed(seed + first)
    return torch.randn(shape, generator=generator, dtype=torch.bfloat16).float()


def rollout_step_noise(shape: tuple[int, ...], *, seed: int, first: int, index: int) -> Tensor:
    """The noise that is added after step ``index`` of a chunk of a rollout."""
    own = seed + first * FRAME_STRIDE + (index + 1) * STEP_STRIDE
    return torch.randn(shape, generator=torch.Generator().manual_seed(own))


def _after(shapes: LatentShapes, seed: int, draws: int) -> dict[str, Tensor]:
    """What torch's generator draws after so many others of the same shapes."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(draws):
        _drawn(shapes, generator)
    return _drawn(shapes, generator)


def _numpy(shape: tuple[int, ...], seed: int) -> Tensor:
    drawn = np.random.RandomState(seed).standard_normal(shape)
    return torch.from_numpy(drawn.astype(np.float32))


def _drawn(shapes: LatentShapes, generator: torch.Generator) -> dict[str, Tensor]:
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
