"""The command itself: how it is started, and what it says of a mistake."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vllm_cosmos3.version import __version__


@pytest.mark.parametrize("module", ["vllm_cosmos3", "vllm_cosmos3.cli"])
def test_the_package_and_its_command_line_run_as_modules(module: str) -> None:
    command = [sys.executable, "-m", module, "--version"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout == f"vllm-cosmos3 {__version__}\n"
