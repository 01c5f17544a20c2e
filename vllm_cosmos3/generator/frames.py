"""Frames of a result on the host: copied while the next ones are decoded, joined, and written as they come."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from vllm_cosmos3.media import Clip, VideoWriter
from vllm_cosmos3.request.plan import Plan

SILENT_RATE = 48_000  # of a file without sound


def on_host(chunks: Iterable[Tensor]) -> Iterator[np.ndarray]:
    """Each chunk as an array, copied from an accelerator while the next one is being made.

    The copy goes through pinned memory, which torch keeps and uses again.
    """
    waiting: deque[tuple[Tensor, torch.Event]] = deque()
    for chunk in chunks:
        if chunk.device.type == "cpu":
            yield chunk.numpy()
            continue
        pinned = torch.empty(chunk.shape, dtype=chunk.dtype, pin_memory=True)
        pinned.copy_(chunk, non_blocking=True)
        copied = torch.Event(chunk.device)
        copied.record()
        waiting.append((pinned, copied))
        if len(waiting) > 1:
            yield _arrived(*waiting.popleft())
    while waiting:
        yield _arrived(*waiting.popleft())


def _arrived(pinned: Tensor, copied: torch.Event) -> np.ndarray:
    copied.synchronize()
    array: np.ndarray = pinned.numpy().copy()
    return array


def shown_frames(
    plan: Plan, before: Sequence[Tensor], last: Iterable[np.ndarray]
) -> Iterator[np.ndarray]:
    """The frames of a sample in order: of earlier chunks, then of the last without its overlap.

    What is shown beside them is joined on; frames beyond those that were asked for are left out.
    """
    at, hidden = 0, plan.overlap if before else 0
    for part in chain((chunk.numpy() for chunk in before), _without(last, hidden)):
        frames = part[: plan.parameters.num_frames - at]
        beside = [shown[at : at + len(frames)] for shown in plan.side_by_side]
        at += len(frames)
        yield np.concatenate([*beside, frames], axis=2) if beside else frames


def _without(chunks: Iterable[np.ndarray], hidden: int) -> Iterator[np.ndarray]:
    """All chunks without the first ``hidden`` frames."""
    for chunk in chunks:
        if hidden < len(chunk):
            yield chunk[hidden:]
        hidden = max(0, hidden - len(chunk))


def written(
    frames: Iterable[np.ndarray],
    clip: Clip | None,
    *,
    fps: float,
    waveform: np.ndarray | None,
    sample_rate: int | None,
) -> np.ndarray:
    """All frames, written to ``clip`` as they come."""
    writing: AbstractContextManager[VideoWriter | None] = nullcontext()
    if clip is not None:
        rate = sample_rate or SILENT_RATE
        writing = VideoWriter(clip.path, fps=fps, sound=waveform, sample_rate=rate, crf=clip.crf)
    parts = []
    with writing as writer:
        for part in frames:
            parts.append(part)
            if writer is not None:
                writer.write(part)
    return np.concatenate(parts)
