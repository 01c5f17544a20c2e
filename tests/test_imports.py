"""Imports without the garbage collector."""

from __future__ import annotations

import gc
import subprocess
import sys

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


@pytest.mark.parametrize(("line", "freed"), [("pass", "a circle\n"), ("end_at_once()", "")])
def test_nothing_is_searched_for_at_the_end(line: str, freed: str) -> None:
    program = (
        f"from vllm_cosmos3.imports import end_at_once\n{line}\n"
        "class Circle:\n"
        "    def __del__(self): print('a circle')\n"
        "it = Circle(); it.itself = it; del it\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == freed
