"""Positions: the published examples, and that they advance as they should."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vllm_cosmos3.checkpoint.config import TransformerConfig
from vllm_cosmos3.generator.sampling import positions as p


def config(**changes: Any) -> TransformerConfig:
    """Numbers of Nano that positions depend on."""
    values: dict[str, Any] = dict.fromkeys(f.name for f in dataclasses.fields(TransformerConfig))
    values |= {
        "head_dim": 128,
        "rope_theta": 5e6,
        "rope_axes_dim": (24, 20, 20),
        "base_fps": 24.0,
        "enable_fps_modulation": True,
        "temporal_margin": 15000,
        "sound_latent_fps": 25.0,
    }
    return TransformerConfig(**(values | changes))


NANO = config()
START = p.generation_start(100, NANO)


def times(positions_3S: Tensor) -> list[float]:
    return positions_3S[0].tolist()


@pytest.mark.parametrize(
    ("fps", "expected"),
    [
        (24.0, [15100, 15101, 15102, 15103]),
        (30.0, [15100.0, 15100.8, 15101.6, 15102.4]),
        (16.0, [15100, 15101.5, 15103]),
        (5.0, [15100, 15104.8, 15109.6, 15114.4, 15119.2]),
    ],
)
def test_published_video_times(fps: float, expected: list[float]) -> None:
    ids = p.vision_positions(len(expected), 1, 1, start=START, fps=fps, config=NANO)
    assert times(ids) == pytest.approx(expected, abs=2e-3)


def test_published_sound_times() -> None:
    ids = times(p.sound_positions(197, start=START, config=NANO))
    assert ids[1] == pytest.approx(15100.96, abs=2e-3)
    assert ids[196] == pytest.approx(15288.16, abs=2e-3)


@pytest.mark.parametrize(
    ("fps", "first", "length", "expected"),
    [
        (5.0, 1, 16, {0: 15101.2, 1: 15102.4, 15: 15119.2}),
        (24.0, 1, 16, {0: 15100.25, 15: 15104.0}),
        (15.0, 0, 33, {0: 15100.0, 1: 15100.4, 32: 15112.8}),
    ],
)
def test_published_action_times(
    fps: float, first: int, length: int, expected: dict[int, float]
) -> None:
    ids = times(p.action_positions(length, start=START, fps=fps, first=first, config=NANO))
    for row, value in expected.items():
        assert ids[row] == pytest.approx(value, abs=2e-3)


def test_the_base_rate_of_the_checkpoint_counts() -> None:
    ids = p.vision_positions(3, 1, 1, start=0.0, fps=16.0, config=config(base_fps=16.0))
    assert times(ids) == [0, 1, 2]


@pytest.mark.parametrize("modulated", [True, False])
def test_a_single_frame_and_unmodulated_frames_count_whole(modulated: bool) -> None:
    cfg = config(enable_fps_modulation=modulated)
    assert times(p.vision_positions(1, 1, 1, start=START, fps=10.0, config=cfg)) == [15100]
    two = times(p.vision_positions(2, 1, 1, start=START, fps=10.0, config=cfg))
    assert two == pytest.approx([15100, 15102.4 if modulated else 15101], abs=2e-3)


@given(
    frames=st.integers(1, 50),
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    fps=st.floats(1, 60),
    text=st.integers(0, 4096),
)
def test_video_positions_are_a_grid(
    frames: int, rows: int, columns: int, fps: float, text: int
) -> None:
    start = p.generation_start(text, NANO)
    ids = p.vision_positions(frames, rows, columns, start=start, fps=fps, config=NANO)
    assert ids.shape == (3, frames * rows * columns)
    grid = ids.view(3, frames, rows, columns)
    assert (grid[0] == grid[0, :, :1, :1]).all()
    assert (grid[0, 1:] > grid[0, :-1]).all()
    assert grid[0].min() == start
    assert (grid[1] == torch.arange(rows).view(1, rows, 1)).all()
    assert (grid[2] == torch.arange(columns)).all()
    assert p.next_start(ids) > ids.max()


@given(fps=st.sampled_from([5.0, 10.0, 15.0, 24.0, 30.0]), frames=st.integers(2, 20))
def test_an_action_lies_where_its_frame_lies(fps: float, frames: int) -> None:
    """Row 4k - 1 leads to pixel frame 4k, the first pixel frame of latent frame k."""
    video = p.vision_positions(frames, 1, 1, start=START, fps=fps, config=NANO)
    rows = p.action_positions(4 * (frames - 1), start=START, fps=fps, first=1, config=NANO)
    torch.testing.assert_close(rows[0, 3::4], video[0, 1:], atol=2e-3, rtol=0)


@given(length=st.integers(1, 300))
def test_text_counts_on_all_axes(length: int) -> None:
    assert p.text_positions(length).tolist() == [list(range(length))] * 3


def test_frequencies_take_turns() -> None:
    assert p.frequency_axes(64, (24, 20, 20)) == (0, 1, 2) * 20 + (0,) * 4
    counts = [p.frequency_axes(16, (6, 5, 5)).count(axis) for axis in range(3)]
    assert counts == [6, 5, 5]


def test_published_frequencies() -> None:
    unit = torch.eye(3)  # one step along each axis
    cos, sin = p.rotary_table(unit, NANO)
    angle = torch.atan2(sin, cos)
    assert angle[0, 0] == pytest.approx(1.0, abs=1e-6)
    assert angle[1, 1] == pytest.approx(0.785830, abs=1e-6)
    assert angle[0, 63] == pytest.approx(2.545e-7, abs=1e-10)
    assert angle[1, 0] == angle[2, 1] == angle[0, 1] == 0
    assert cos.dtype == torch.float32
