"""The served reasoner against transformers' own model, in float32, on the tiny checkpoint.

Both read the same folder; transformers is the reference. Wrong weights, pictures or positions
change these numbers by 0.08 and more, rounding by 2e-6.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from media_files import clip, data_url, picture, png
from peft import PeftModel
from servers import Server
from transformers import (
    AutoProcessor,
    Cosmos3EdgeForConditionalGeneration,
    Cosmos3OmniForConditionalGeneration,
)

from vllm_cosmos3.checkpoint.config import read_json

pytestmark = [pytest.mark.parity, pytest.mark.serve]

MODELS = {
    "cosmos3_omni": Cosmos3OmniForConditionalGeneration,
    "cosmos3_edge": Cosmos3EdgeForConditionalGeneration,
}
TOKENS = 16
TEXT = {"type": "text", "text": "describe the image in detail"}
# Pictures by seed, the sampling rate of a clip (0: none asked for), or neither.
CASES: dict[str, dict[str, Any]] = {
    "text": {},
    "one image": {"images": [1]},
    "two images": {"images": [1, 2]},
    "video": {"fps": 0},
    "video at 4 fps": {"fps": 4},
}


@cache
def reference(checkpoint: Path) -> tuple[Any, Any]:
    processor = AutoProcessor.from_pretrained(checkpoint)
    kind = MODELS[read_json(checkpoint / "config.json")["model_type"]]
    model = kind.from_pretrained(checkpoint, dtype=torch.float32)
    return processor, model.eval()


@cache
def expected(checkpoint: Path, case: str, video: Path) -> tuple[list[int], list[int], np.ndarray]:
    """Prompt ids, greedy tokens and their log-probabilities [TOKENS, vocabulary]."""
    return of(*reference(checkpoint), case, video)


def of(
    processor: Any, model: Any, case: str, video: Path
) -> tuple[list[int], list[int], np.ndarray]:
    ask = CASES[case]
    inputs: dict[str, Any] = {}
    parts = [{"type": "image"} for _ in ask.get("images", [])]
    if parts:
        inputs["images"] = [picture(seed=seed) for seed in ask["images"]]
    if "fps" in ask:
        parts = [{"type": "video"}]
        frames, fps = decode(video)
        metadata = {"total_num_frames": len(frames), "fps": fps, "duration": len(frames) / fps}
        inputs |= {"videos": [frames], "video_metadata": [metadata], "do_sample_frames": True}
        inputs |= {"fps": ask["fps"]} if ask["fps"] else {}
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [*parts, TEXT]}], add_generation_prompt=True
    )
    batch = processor(text=[prompt], return_tensors="pt", **inputs)
    with torch.inference_mode():
        out = model.generate(
            **batch,
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    length = batch["input_ids"].shape[1]
    logprobs = torch.log_softmax(torch.cat(out.logits).double(), dim=-1)
    return batch["input_ids"][0].tolist(), out.sequences[0, length:].tolist(), logprobs.numpy()


def served(
    server: Server, case: str, video: Path, name: str | None = None
) -> tuple[list[int], list[int], np.ndarray]:
    ask = CASES[case]
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": data_url(png(picture(seed=seed)), "image/png")}}
        for seed in ask.get("images", [])
    ]
    extra: dict[str, Any] = {"return_token_ids": True, "return_tokens_as_token_ids": True}
    if "fps" in ask:
        parts = [{"type": "video_url", "video_url": {"url": video.as_uri()}}]
    if ask.get("fps"):
        extra["mm_processor_kwargs"] = {"fps": ask["fps"], "do_sample_frames": True}
    answer = server.client().chat.completions.create(
        model=name or server.model,
        messages=[{"role": "user", "content": [*parts, TEXT]}],  # type: ignore[list-item]
        max_tokens=TOKENS,
        temperature=0,
        logprobs=True,
        top_logprobs=-1,
        extra_body=extra | {"ignore_eos": True, "min_tokens": TOKENS},
    )
    choice = answer.choices[0]
    assert choice.logprobs is not None
    content = choice.logprobs.content
    assert content is not None
    logprobs = np.full((TOKENS, len(content[0].top_logprobs)), np.nan)
    for row, token in enumerate(content):
        for entry in token.top_logprobs:
            logprobs[row, int(entry.token.removeprefix("token_id:"))] = entry.logprob
    prompt = answer.model_extra["prompt_token_ids"]  # type: ignore[index]
    return prompt, choice.model_extra["token_ids"], logprobs  # type: ignore[index]


def decode(video: Path) -> tuple[np.ndarray, float]:
    capture = cv2.VideoCapture(str(video))
    fps = capture.get(cv2.CAP_PROP_FPS)
    frames = []
    while (read := capture.read())[0]:
        frames.append(cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB))
    return np.stack(frames), fps


def check(server: Server, checkpoint: Path, case: str, video: Path) -> None:
    """Prompt, greedy tokens and log-probabilities are those of transformers."""
    prompt, tokens, logprobs = expected(checkpoint, case, video)
    served_prompt, served_tokens, served_logprobs = served(server, case, video)
    assert served_prompt == prompt
    assert served_tokens == tokens
    assert np.abs(served_logprobs - logprobs).max() < 1e-4


@pytest.fixture(scope="session")
def video(media_folder: Path) -> Path:
    return clip(media_folder / "parity.mp4", frames=60, fps=24)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_log_probabilities_equal_those_of_transformers(
    case: str, ranks: int, video: Path, tiny_checkpoint_fp32: Path, request: pytest.FixtureRequest
) -> None:
    fixture = {1: "reasoner_server", 2: "reasoner_server_tp2"}[ranks]
    check(request.getfixturevalue(fixture), tiny_checkpoint_fp32, case, video)


def test_vllms_lora_is_what_peft_computes(
    video: Path,
    tiny_checkpoint_fp32: Path,
    reasoner_server_tp2: Server,
    reasoner_adapters: tuple[Path, Path],
) -> None:
    """``--enable-lora --lora-modules``: names of transformers and of the checkpoint, on two ranks."""
    processor, _ = reference(tiny_checkpoint_fp32)
    model = Cosmos3OmniForConditionalGeneration.from_pretrained(tiny_checkpoint_fp32, dtype=torch.float32)  # fmt: skip
    adapted = PeftModel.from_pretrained(model, reasoner_adapters[0]).eval()
    prompt, tokens, logprobs = of(processor, adapted, "one image", video)
    _, _, plain = expected(tiny_checkpoint_fp32, "one image", video)
    assert np.abs(logprobs[0] - plain[0]).max() > 0.1
    for folder in reasoner_adapters:
        found = served(reasoner_server_tp2, "one image", video, folder.name)
        assert found[:2] == (prompt, tokens)
        assert np.abs(found[2] - logprobs).max() < 1e-4
