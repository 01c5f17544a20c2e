"""Pools of training data."""

from __future__ import annotations

import torch

from training.pools import draw
from training.scenes import Canvas


def test_drawing_in_this_process_leaves_it_its_threads() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        drawn = draw(0, 3, Canvas(96, 64, 5), grown=True, workers=1)
        assert (len(drawn.plain), torch.get_num_threads()) == (3, 2)
        apart = draw(0, 3, Canvas(96, 64, 5), grown=True, workers=2)
        assert apart.plain == drawn.plain
        assert torch.equal(apart.packed.things, drawn.packed.things)
    finally:
        torch.set_num_threads(threads)
