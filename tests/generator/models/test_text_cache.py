"""Texts read lately: which are kept, and that an answer does not depend on it."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_cosmos3.generator.models.text_cache import TextKVCache
from vllm_cosmos3.generator.models.transformer import TextKV


def text(length: int) -> TextKV:
    return TextKV(layers=(torch.zeros(length, 2, 1, 2), torch.zeros(length, 2, 1, 2)))


def test_bytes_are_those_of_all_layers() -> None:
    assert text(3).nbytes == 2 * 3 * 2 * 2 * 4


@given(st.lists(st.integers(1, 9), max_size=30), st.integers(0, 600))
def test_the_latest_are_kept_within_the_limit(lengths: list[int], limit: int) -> None:
    texts = TextKVCache(limit)
    for length in lengths:
        texts.keep((length,), text(length))
    latest = list(dict.fromkeys(reversed(lengths)))
    kept = [length for length in latest if texts.find((length,)) is not None]
    assert kept == latest[: len(kept)]
    assert sum(text(length).nbytes for length in kept) <= limit
    if len(kept) < len(latest):
        assert sum(text(length).nbytes for length in latest[: len(kept) + 1]) > limit


def test_looking_up_changes_nothing() -> None:
    texts = TextKVCache(text(5).nbytes)
    texts.keep((1,), text(2))
    texts.keep((2,), text(3))
    assert texts.find((1,)) is not None
    texts.keep((3,), text(1))
    assert texts.find((1,)) is None
    assert texts.find((2,)) is not None
