"""The demo checkpoint behind its API: the reasoner says what clips show, the generator makes those of Python."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
from limits import HANG
from PIL import Image
from servers import Server

from client import message
from training.captions import canonical
from training.yardstick import Prompt
from vllm_cosmos3.media import read_video, write_video

pytestmark = [pytest.mark.serve, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def described(server: Server, clip: np.ndarray, fps: float, folder: Path) -> str:
    """What the reasoner says of a clip that is sent as MP4."""
    file = folder / "clip.mp4"
    write_video(file, clip, fps=fps)
    answer = server.client().chat.completions.create(
        model="demo",
        messages=[message("What happens in the video?", video=file)],  # type: ignore[list-item]
        max_tokens=48,
        temperature=0,
    )
    return (answer.choices[0].message.content or "").strip()


def test_the_reasoner_says_what_true_clips_show(
    server: Server, prompts: list[Prompt], tmp_path: Path
) -> None:
    said = [described(server, p.frames(17), p.scene.canvas.fps, tmp_path) for p in prompts]
    assert sum(s == canonical(p.scene) for s, p in zip(said, prompts, strict=True)) >= 5


def test_the_reasoner_says_what_generated_clips_show(
    server: Server, prompts: list[Prompt], clips: list[np.ndarray], tmp_path: Path
) -> None:
    """Of those that the checker confirms: every word that the prompt told."""
    rows = [(p, c) for p, c in zip(prompts, clips, strict=True) if p.confirmed(c)["all"]]
    said = [described(server, clip, p.scene.canvas.fps, tmp_path) for p, clip in rows]
    told = [
        all(thing.colour in text and thing.shape in text for thing in prompt.scene.things)
        for (prompt, _), text in zip(rows, said, strict=True)
    ]
    assert sum(told) >= len(rows) - 1


def test_the_served_clip_is_that_of_python(
    server: Server, prompts: list[Prompt], clips: list[np.ndarray], tmp_path: Path
) -> None:
    body = prompts[0].fields | {"num_inference_steps": 16, "guidance_scale": 3.0, "seed": 0}
    answer = httpx.post(f"{server.url}/v1/videos/sync", json=body, timeout=HANG)
    assert answer.status_code == 200, answer.text
    write_video(tmp_path / "mine.mp4", clips[0], fps=prompts[0].scene.canvas.fps)
    served = read_video(answer.content, frames=17).astype(int)
    mine = read_video(tmp_path / "mine.mp4", frames=17).astype(int)
    assert np.abs(served - mine).mean() < 0.5
    assert (
        prompts[0].confirmed(served.astype(np.uint8))["all"]
        == prompts[0].confirmed(clips[0])["all"]
    )


def test_a_clip_is_made_and_asked_about(server: Server, tmp_path: Path) -> None:
    """By the example: it prints a line for each question."""
    script = Path(__file__).parents[2] / "examples" / "make_and_ask.py"
    command = [sys.executable, str(script), "--url", server.url, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=False)
    assert done.returncode == 0, done.stderr
    right = (
        "A red square pushes a blue circle to the right",
        "There are two things.",
        "The circle is blue.",
        "It is a square.",
        "Is there a gripper?  No.",
        "They touch after 0.",
        "physically plausible?  Yes.",
        "The blue circle is pushed to the right.",
        "red square in the first frame",
    )
    assert sum(words in done.stdout for words in right) >= 8, done.stdout
    picture = np.asarray(Image.open(tmp_path / "asked.png"))
    assert (picture == 255).all(-1).any(), "a box and a point"


def test_requests_name_the_checkpoint_as_the_command_did(server: Server) -> None:
    listed = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert [model["id"] for model in listed] == ["demo"]
