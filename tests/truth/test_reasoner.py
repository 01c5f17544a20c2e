"""The demo's reasoner says what clips show, of the world's own clips and of the generator's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from training.captions import Caption, canonical
from training.observing import confirm, observe
from training.rendering import true_clip
from training.scenes import Scene
from vllm_cosmos3 import Cosmos3, Question, Reasoner
from vllm_cosmos3.media import write_video

pytestmark = pytest.mark.serve

DEMO = Path(__file__).parents[2] / "checkpoints" / "demo"


@pytest.fixture(scope="module")
def reasoner() -> Iterator[Reasoner]:
    with Reasoner(DEMO, enforce_eager=True, max_model_len=1024) as model:
        yield model


def described(reasoner: Reasoner, clips: list[Path]) -> list[str]:
    asked = [
        Question(prompt="What happens in the video?", video=str(clip), max_new_tokens=48)
        for clip in clips
    ]
    return [answer.text.strip() for answer in reasoner.ask(asked)]


def test_true_clips(reasoner: Reasoner, asked: list[tuple[Scene, Caption]], tmp_path: Path) -> None:
    files = []
    for scene, _ in asked:
        files.append(tmp_path / f"{scene.seed}.mp4")
        write_video(files[-1], true_clip(scene).numpy(), fps=scene.canvas.fps)
    said = described(reasoner, files)
    right = [text == canonical(scene) for text, (scene, _) in zip(said, asked, strict=True)]
    assert sum(right) >= 5, said


def test_generated_clips(
    reasoner: Reasoner, demo: Cosmos3, asked: list[tuple[Scene, Caption]], tmp_path: Path
) -> None:
    """Colours, motion and gripper of a confirmed clip are named as they were asked for."""
    for scene, caption in asked[:2]:
        clip = demo.generate(
            prompt=caption.text, size="320x192", num_frames=17, fps=scene.canvas.fps, seed=0,
            num_inference_steps=16, guidance_scale=3.0, generate_sound=False,
        ).video  # fmt: skip
        assert confirm(scene, caption, observe(clip))["motion"]
        file = tmp_path / f"{scene.seed}.mp4"
        write_video(file, clip, fps=scene.canvas.fps)
        (said,) = described(reasoner, [file])
        for thing in scene.things:
            assert thing.colour in said
        assert ("gripper" in said) == (scene.gripper is not None)
