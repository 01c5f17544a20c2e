"""Every example script runs against a real server and leaves behind what it promises."""

from __future__ import annotations

import ast
import io
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import av
import pytest
from limits import HANG
from PIL import Image, ImageChops
from servers import Server

import client
import scenes

EXAMPLES = Path(__file__).parents[2] / "examples" / "reasoner"
SCRIPTS = sorted(
    path.stem for path in EXAMPLES.glob("*.py") if path.stem not in ("answers", "client", "scenes")
)


def run_example(script: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A script as its command runs it, in this process, which has imported openai."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    words = [str(EXAMPLES / f"{script}.py"), *arguments]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        patch.setattr(sys, "argv", words)
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:  # with a status, or with what is the matter
            status = end.code if isinstance(end.code, int) else 1
            err.write(f"{end}\n" if status == 1 else "")
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all pictures and clips, so that they are drawn once."""
    folder = tmp_path_factory.mktemp("examples")
    for name in scenes.MEDIA:
        scenes.media(name, folder)
    return folder


@pytest.mark.serve
@pytest.mark.parametrize("script", SCRIPTS)
def test_script(script: str, reasoner_server: Server, drawn: Path) -> None:
    # structured answers end by themselves, the free text of a random model does not
    structured = "answers" in (EXAMPLES / f"{script}.py").read_text()
    done = run_example(
        script,
        *("--base-url", f"{reasoner_server.url}/v1", "--out", str(drawn)),
        *("--constrain", "--max-tokens", "2000" if structured else "32"),
        folder=drawn,
    )
    allowed = (0, 3) if script == "physical_plausibility" else (0,)
    assert done.returncode in allowed, done.stderr
    assert done.stdout.strip()
    if script in ("grounding", "trajectory"):
        original = Image.open(scenes.media("table.png", drawn)).convert("RGB")
        picture = Image.open(drawn / f"{script}.png")
        assert picture.size == original.size
        assert ImageChops.difference(picture, original).getbbox() is not None


@pytest.mark.serve
def test_pictures_and_clips_of_the_user(reasoner_server: Server, drawn: Path) -> None:
    clip = str(scenes.media("doorway.mp4", drawn))
    command = [sys.executable, str(EXAMPLES / "caption.py"), "--video", clip, "--max-tokens", "8"]
    command += ["--base-url", f"{reasoner_server.url}/v1"]
    done = subprocess.run(
        command,
        check=False,
        cwd=drawn,
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{clip}:")
    assert "table.png" not in done.stdout


@pytest.mark.serve
def test_what_the_user_can_mend_is_one_line(reasoner_server: Server, tmp_path: Path) -> None:
    cases = {
        (
            "--base-url",
            "http://127.0.0.1:9/v1",
        ): "No server answers at http://127.0.0.1:9/v1/models",
        ("--base-url", f"{reasoner_server.url}/v1", "--model", "absent"): "The server refused",
        (
            "--base-url",
            f"{reasoner_server.url}/v1",
            "--image",
            "absent.png",
        ): "neither a file nor a URL",
    }
    for arguments, expected in cases.items():
        done = run_example("robot_planning", *arguments, folder=tmp_path)
        assert done.returncode == 1
        assert expected in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.serve
def test_frames_and_usage_come_from_the_server(reasoner_server: Server, drawn: Path) -> None:
    reasoner = client.Reasoner(base_url=f"{reasoner_server.url}/v1", max_tokens=4)
    pieces: list[str] = []
    video = scenes.media("road.mp4", drawn)
    with_video = reasoner.ask("Hello", video=video, show=pieces.append)
    without = reasoner.ask("Hello")
    assert with_video.cut_off
    assert with_video.completion_tokens == 4
    assert "".join(pieces).strip() == with_video.text
    # 4 s at 4 frames a second, two frames a token row
    assert with_video.prompt_tokens > without.prompt_tokens + 8


def test_media_urls(tmp_path: Path) -> None:
    picture = scenes.media("table.png", tmp_path)
    assert client.media_url(picture, "image").startswith("data:image/png;base64,iVBOR")
    assert client.media_url(picture, "image", file_urls=True) == picture.as_uri()
    assert client.media_url(picture.read_bytes(), "image") == client.media_url(picture, "image")
    for url in ("https://example.com/a.mp4", "data:video/mp4;base64,AAAA", "file:///a.mp4"):
        assert client.media_url(url, "video") == url
    with pytest.raises(ValueError, match=r"table\.png is image/png, expected video data"):
        client.media_url(picture, "video")


def test_message_puts_media_before_the_text() -> None:
    message = client.message("What?", image=b"a", video=b"b")
    assert [part["type"] for part in message["content"]] == ["image_url", "video_url", "text"]


def test_sampling_is_as_documented() -> None:
    documented = {
        "top_p": (0.8, 0.95),
        "top_k": (20, 20),
        "repetition_penalty": (1.0, 1.0),
        "presence_penalty": (1.5, 0.0),
        "temperature": (0.7, 0.6),
    }
    assert {k: v[0] for k, v in documented.items()} == client.WITHOUT_REASONING
    assert {k: v[1] for k, v in documented.items()} == client.WITH_REASONING


def test_clips_are_h264_that_moves(drawn: Path) -> None:
    for name in scenes.MEDIA:
        if name.endswith(".mp4"):
            with av.open(str(drawn / name)) as container:
                assert container.streams.video[0].codec_context.name == "h264"
                frames = [frame.to_image() for frame in container.decode(video=0)]
            assert len(frames) == scenes.SECONDS * scenes.FPS
            assert frames[0].size == (scenes.WIDTH, scenes.HEIGHT)
            assert ImageChops.difference(frames[0], frames[-1]).getbbox() is not None


def test_an_unknown_drawing_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match=r"table\.mp4"):
        scenes.media("chair.png", tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_short_and_say_what_they_do(script: str) -> None:
    text = (EXAMPLES / f"{script}.py").read_text()
    assert len(text.splitlines()) <= 40
    assert ast.get_docstring(ast.parse(text))
