"""Prompts as the transformer reads them: facts about the clip, the chat frame, two closing tokens."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from training.scenes import Canvas

# What dropped prompts become: the checkpoint's assets/negative_prompt.json, and no text at all.
NEGATIVES = ("{}", "")
# Of clips that follow a control: the reference's words, slips included.
SYSTEM_TRANSFER = (
    "You are a helpful assistant that generates images or videos following the user's instructions"
    " and control signals (edge maps, blur, depth, or segmentation)."
)
FOLLOW = (
    "Follow the {control} control video precisely: shape, contour, silhouette, position, and motion of"
    " every visible structure must align with the {control} signal at every frame."
)
_RATIOS = {(256, 256): "1,1", (320, 192): "16,9", (192, 320): "9,16"}


def framed(text: str, canvas: Canvas, *, negative: bool = False) -> str:
    """A prompt with its facts, as a text that the tokenizer turns into all of its tokens.

    A JSON caption gets the facts as keys; a negative prompt gets them as sentences in any case.
    """
    return _opened(_with_facts(text, canvas, negative=negative))


def framed_transfer(text: str, control: str | None, canvas: Canvas) -> str:
    """A prompt for a clip that follows a control, or without one, what stands for a dropped prompt."""
    user = _with_facts(text, canvas, negative=control is None)
    if control is not None:
        user = f"{user.rstrip()} {FOLLOW.format(control=control)}"
    return _turn("system", SYSTEM_TRANSFER) + _opened(user)


def _opened(user: str) -> str:
    """The user's turn, the assistant's, which is empty, and the start of the generated part."""
    return f"{_turn('user', user)}<|im_start|>assistant\n<|im_end|><|vision_start|>"


def _turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def framed_action(text: str, view: str, canvas: Canvas) -> str:
    """An instruction as the caption of a robot's clip, as a text of all of its tokens.

    ``view`` is the sentence on the camera of the embodiment.
    """
    minutes, seconds = divmod(round(canvas.frames / canvas.fps), 60)
    described = text if text.endswith((".", "!", "?")) else f"{text}."
    whole = {"time": f"0:00-{minutes}:{seconds:02d}", "description": described}
    caption = {"cinematography": {"framing": view}, "actions": [whole]}
    return _opened(_with_keys(caption, canvas, shaped=True))


def _with_facts(text: str, canvas: Canvas, *, negative: bool) -> str:
    if not negative and text.startswith("{"):
        return _with_keys(json.loads(text), canvas)
    for sentence in _sentences(canvas):
        text = text.strip().rstrip(".")
        text = f"{text}. {sentence}" if text else sentence
    return text


def _sentences(canvas: Canvas) -> list[str]:
    size = f"{canvas.height}x{canvas.width} resolution."
    if canvas.frames == 1:
        return [f"This image is of {size}"]
    seconds = canvas.frames / canvas.fps
    return [
        f"The video is {seconds:.1f} seconds long and is of {canvas.fps:.0f} FPS.",
        f"This video is of {size}",
    ]


def _with_keys(caption: dict[str, Any], canvas: Canvas, *, shaped: bool = False) -> str:
    """The caption with its facts; ``shaped`` tells the shape of unusual sizes too."""
    if canvas.frames > 1:
        caption["duration"] = f"{int(canvas.frames / canvas.fps)}s"
        caption["fps"] = float(canvas.fps)
    caption["resolution"] = {"H": canvas.height, "W": canvas.width}
    common = math.gcd(canvas.width, canvas.height)
    ratio = _RATIOS.get((canvas.width, canvas.height))
    if ratio is None and shaped:
        ratio = f"{canvas.width // common},{canvas.height // common}"
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
