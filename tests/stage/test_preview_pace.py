"""Previews take at most their share of the time in steps, however long they and the steps take."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vllm_cosmos3.stage.preview_pace import PICTURES, SHARE, PreviewPace


@given(
    st.integers(1, 200),
    st.floats(1e-4, 100),
    st.floats(1e-4, 100),
)
def test_the_share_holds_after_every_step(steps: int, step: float, preview: float) -> None:
    pace, previews = PreviewPace(steps), 0
    for index in range(steps):
        pace.stepped(step)
        if pace.due(preview):
            pace.previewed(preview)
            previews += 1
        assert previews * preview <= SHARE * (index + 1) * step * (1 + 1e-9)
    assert previews <= 2 * PICTURES
    if preview <= SHARE * step and steps >= PICTURES:
        assert previews >= PICTURES // 2  # affordable at any time


def test_the_first_one_of_a_process_is_made_to_learn_what_it_takes() -> None:
    pace = PreviewPace(24)
    pace.stepped(1.0)
    assert not pace.due(0.0)  # every other step at most
    pace.stepped(1.0)
    assert pace.due(0.0)
    pace.previewed(1.0)  # as long as a step: 50 steps until it is paid for, and 50 for another
    for _ in range(97):
        pace.stepped(1.0)
        assert not pace.due(1.0)
    pace.stepped(1.0)
    assert pace.due(1.0)
