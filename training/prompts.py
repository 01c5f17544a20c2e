"""Prompts as the transformer reads them: facts about the clip, the chat frame, two closing tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor

from training.scenes import Canvas

# What dropped prompts become: the checkpoint's assets/negative_prompt.json, and no text at all.
NEGATIVES = ("{}", "")
_RATIOS = {(256, 256): "1,1", (320, 192): "16,9", (192, 320): "9,16"}


def framed(text: str, canvas: Canvas, *, negative: bool = False) -> str:
    """A prompt with its facts, as a text that the tokenizer turns into all of its tokens.

    A JSON caption gets the facts as keys; a negative prompt gets them as sentences in any case.
    """
    facts = (text if negative else None) or text
    if not negative and text.startswith("{"):
        facts = _with_keys(text, canvas)
    else:
        for sentence in _sentences(canvas):
            facts = facts.strip().rstrip(".")
            facts = f"{facts}. {sentence}" if facts else sentence
    return f"<|im_start|>user\n{facts}<|im_end|>\n<|im_start|>assistant\n<|im_end|><|vision_start|>"


def _sentences(canvas: Canvas) -> list[str]:
    size = f"{canvas.height}x{canvas.width} resolution."
    if canvas.frames == 1:
        return [f"This image is of {size}"]
    seconds = canvas.frames / canvas.fps
    return [
        f"The video is {seconds:.1f} seconds long and is of {canvas.fps:.0f} FPS.",
        f"This video is of {size}",
    ]


def _with_keys(text: str, canvas: Canvas) -> str:
    caption = json.loads(text)
    if canvas.frames > 1:
        caption["duration"] = f"{int(canvas.frames / canvas.fps)}s"
        caption["fps"] = float(canvas.fps)
    caption["resolution"] = {"H": canvas.height, "W": canvas.width}
    ratio = _RATIOS.get((canvas.width, canvas.height))
    if ratio is not None:
        caption["aspect_ratio"] = ratio
    return json.dumps(caption)


def encoded(
    tokenizer: Tokenizer, texts: Sequence[str], length: int | None = None, multiple: int = 8
) -> tuple[Tensor, Tensor]:
    """Token ids [N, length], filled up with zeros, and how many of each row are real.

    The length is that of the longest text if not given; with 300 patches it becomes, in all, a
    ``multiple``.
    """
    rows = [e.ids for e in tokenizer.encode_batch(list(texts))]
    longest = max(map(len, rows))
    length = length or -(-longest // multiple) * multiple + 4
    if longest > length:
        raise ValueError(f"a text of {longest} tokens does not fit {length}")
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    for row, one in zip(ids, rows, strict=True):
        row[: len(one)] = torch.tensor(one)
    return ids, torch.tensor([len(one) for one in rows])
