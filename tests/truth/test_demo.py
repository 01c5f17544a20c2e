"""`make demo`: its three clips show what was asked, are seen in a terminal, and the reasoner says so."""

from __future__ import annotations

import io

import pytest
from PIL import Image
from rich.console import Console
from servers import Server

import demo as tool

pytestmark = pytest.mark.serve


@pytest.fixture(scope="module")
def shown() -> io.StringIO:
    return io.StringIO()


@pytest.fixture(scope="module")
def made(shown: io.StringIO, tmp_path_factory: pytest.TempPathFactory) -> list[tool.Made]:
    """The clips, made for a terminal of 24-bit colours."""
    terminal = Console(file=shown, force_terminal=True, color_system="truecolor", width=100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tool, "console", terminal)
        return tool.make_clips(tmp_path_factory.mktemp("made"))


def words(text: str) -> set[str]:
    """The colours and shapes that a text names, and whether there is a gripper."""
    known = {"red", "green", "blue", "yellow", "purple", "orange", "square", "circle", "triangle", "gripper"}  # fmt: skip
    return known & set(text.lower().replace(",", " ").replace(".", " ").split())


def test_the_clips_show_what_was_asked(made: list[tool.Made]) -> None:
    prompt, picture, policy = made
    assert all(one.file.stat().st_size > 1000 for one in made)
    assert words(prompt.seen) == words(prompt.asked.prompt)
    assert words(picture.seen) == words(picture.asked.prompt)
    assert "; a tone of rubber after " in picture.seen
    assert words(policy.asked.prompt) <= words(policy.seen)
    assert policy.seen.endswith(f"the {named(policy)} is lifted")
    assert len(policy.clip) == 33


def named(one: tool.Made) -> str:
    """The thing that a policy is told to pick up."""
    return one.asked.prompt.removeprefix("pick up the ")


def test_they_are_seen_in_a_terminal(made: list[tool.Made], shown: io.StringIO) -> None:
    text = shown.getvalue()
    assert text.count("▀") > 3 * 19 * 5 * 4
    assert "38;2;" in text
    with Image.open(made[0].file.with_name("sheet.png")) as sheet:
        assert sheet.size == (5 * 160, 3 * 96)


def test_the_reasoner_says_so(made: list[tool.Made], server: Server) -> None:
    said = tool.answers(made, f"{server.url}/v1")
    asked = [words(one.asked.prompt) for one in made]
    assert [words(text) for text in said[:2]] == asked[:2]
    assert asked[2] | {"gripper"} <= words(said[2])  # beside what else is there
