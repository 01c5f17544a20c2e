"""Pools of training data."""

from __future__ import annotations

import torch
from ranks import in_new_process

from training.pools import draw
from training.scenes import Canvas


def drawn_in_both_ways() -> tuple[int, int, bool]:
    """How many are drawn in this process, the threads that it has then, and whether others draw the same."""
    torch.set_num_threads(2)
    drawn = draw(0, 3, Canvas(96, 64, 5), grown=True, workers=1)
    threads = torch.get_num_threads()
    apart = draw(0, 3, Canvas(96, 64, 5), grown=True, workers=2)
    same = torch.equal(apart.packed.things, drawn.packed.things) and apart.plain == drawn.plain
    return len(drawn.plain), threads, same


def test_drawing_in_this_process_leaves_it_its_threads() -> None:
    assert in_new_process(drawn_in_both_ways) == (3, 2, True)
