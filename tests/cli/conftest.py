"""Fixtures of the command line's tests."""

from __future__ import annotations

import os

import pytest


@pytest.fixture
def environment_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """``serve`` becomes vLLM, for which it sets variables."""
    monkeypatch.setattr("vllm_cosmos3.cli.serve.os.environ", dict(os.environ))
