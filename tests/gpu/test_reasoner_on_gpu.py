"""The demo checkpoint's reasoner on a GPU, through vLLM's own engine: it says what true clips show."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.captions import canonical
from training.questions import CAPTION
from training.yardstick import held_out_prompts
from vllm_cosmos3.media import write_image, write_video
from vllm_cosmos3.reasoner.offline import Reasoner
from vllm_cosmos3.request.questions import Question

pytestmark = pytest.mark.gpu


def test_clips_and_pictures_are_read(
    tmp_path: Path, vllm_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # This process has counted its devices, after which a fork of it cannot use CUDA.
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    prompts = held_out_prompts(8)
    questions = []
    for index, prompt in enumerate(prompts):
        clip = prompt.frames(prompt.scene.canvas.frames)
        file, picture = tmp_path / f"{index}.mp4", tmp_path / f"{index}.png"
        write_video(file, clip, fps=prompt.scene.canvas.fps)
        write_image(picture, clip[0])
        questions += [
            Question(prompt=CAPTION[0], video=str(file), max_new_tokens=48),
            Question(prompt=CAPTION[0], image=str(picture), max_new_tokens=48),
        ]
    with Reasoner("demo", max_model_len=4096, gpu_memory_utilization=0.3) as reasoner:
        answers = [answer.text.strip() for answer in reasoner.ask(questions)]
    assert all(answers)
    exact = [said == canonical(p.scene) for p, said in zip(prompts, answers[::2], strict=True)]
    assert sum(exact) >= 6, list(zip(answers[::2], (canonical(p.scene) for p in prompts), strict=True))  # fmt: skip
