"""The demo checkpoint behind its API: the reasoner says what clips show, the generator makes those of Python."""

from __future__ import annotations

from pathlib import Path

import httpx
import numpy as np
import pytest
from limits import HANG
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


def test_requests_name_the_checkpoint_as_the_command_did(server: Server) -> None:
    listed = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert [model["id"] for model in listed] == ["demo"]
