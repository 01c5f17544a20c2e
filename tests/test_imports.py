"""Imports without the garbage collector."""

from __future__ import annotations

import gc

import pytest

from vllm_cosmos3.imports import uncollected


def test_the_collector_is_afterwards_as_it_was() -> None:
    with uncollected():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError), uncollected():
        raise ImportError
    assert gc.isenabled()
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
