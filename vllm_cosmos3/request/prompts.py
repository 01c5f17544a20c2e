"""From a prompt to token ids: facts about the output are added to the text, then the chat template.

The sentences and their order are those the model was trained with. A prompt that is a JSON caption
gets the facts as keys instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

from vllm_cosmos3.errors import CheckpointError, InvalidRequest
from vllm_cosmos3.request.sizes import reduced_ratio

# Trained text, word for word: "give" is a slip of the training data.
SYSTEM_IMAGE = "You are a helpful assistant who will generate images from a give prompt."
SYSTEM_VIDEO = "You are a helpful assistant who will generate videos from a give prompt."
SYSTEM_EDIT = "You are a helpful assistant who will edit images based on the user's instructions."
SYSTEM_TRANSFER = (
    "You are a helpful assistant that generates images or videos following the user's instructions"
    " and control signals (edge maps, blur, depth, or segmentation)."
)
FOLLOW = (
    "Follow the {controls} control video precisely: shape, contour, silhouette, position, and motion of"
    " every visible structure must align with the {controls} signal at every frame."
)
DURATION = "The video is {duration:.1f} seconds long and is of {fps:.0f} FPS."
DURATION_INVERSE = "The video is not {duration:.1f} seconds long and is not of {fps:.0f} FPS."
RESOLUTION = "This {kind} is of {height}x{width} resolution."
RESOLUTION_INVERSE = "This {kind} is not of {height}x{width} resolution."
TOKENIZERS = ("Qwen2Tokenizer", "PreTrainedTokenizerFast")  # classes of the published checkpoints
SUFFIX = "<|vision_start|>"  # follows the end-of-text token and opens the generated part


class Tokenizer(Protocol):
    """What is used of the checkpoint's tokenizer."""

    eos_token_id: int

    def apply_chat_template(
        self, conversation: Sequence[Mapping[str, str]], **kwargs: Any
    ) -> Any: ...

    def convert_tokens_to_ids(self, tokens: str) -> int | None: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a prompt may state about the output. ``aspect_ratio`` like "16,9", None if not usual."""

    num_frames: int
    fps: float
    height: int
    width: int
    aspect_ratio: str | None

    @property
    def is_image(self) -> bool:
        return self.num_frames == 1


def positive_text(
    prompt: str, facts: Facts, *, style: str, duration: bool, resolution: bool
) -> str:
    """The prompt with its facts. ``style`` is "plain", "json", or "auto": json if it is an object.

    ``duration`` and ``resolution`` choose the sentences of a plain prompt; a JSON caption always
    gets the keys duration, fps, resolution and aspect_ratio, in this order behind its own keys,
    or in place where it has them.
    """
    caption = json_object(prompt) if style != "plain" else None
    if caption is not None:
        return json.dumps(_with_facts(caption, facts))
    if style == "json":
        raise InvalidRequest("prompt", prompt, "a JSON object, as prompt_format is json")
    return _with_sentences(
        prompt, _sentences(facts, DURATION, RESOLUTION, duration=duration, resolution=resolution)
    )


def action_text(
    prompt: str, facts: Facts, *, style: str, view: str, duration: bool, resolution: bool
) -> str:
    """An instruction as the caption that models with actions were trained on.

    ``view`` is the sentence on the camera. The caption is JSON, with the instruction as what
    happens all the time; ``style`` "plain" makes it a text, whose sentences on length and size
    ``duration`` and ``resolution`` choose. A prompt that is a JSON caption gets its facts alone.
    The caption names the shape of every size, one of the user only that of a trained one.
    """
    caption = json_object(prompt) if style != "plain" else None
    if caption is not None:
        return json.dumps(_with_facts(caption, facts))
    if style == "plain":
        rest = _sentences(facts, DURATION, RESOLUTION, duration=duration, resolution=resolution)
        return _with_sentences(prompt, [view, *rest])
    text = prompt.strip()
    text = text if text.endswith((".", "!", "?")) else f"{text}."
    minutes, seconds = divmod(round(facts.num_frames / facts.fps), 60)
    whole = {"time": f"0:00-{minutes}:{seconds:02d}", "description": text}
    shape = facts.aspect_ratio or reduced_ratio(facts.width, facts.height)
    caption = {"cinematography": {"framing": view}, "actions": [whole]}
    return json.dumps(_with_facts(caption, replace(facts, aspect_ratio=shape)))


def following(text: str, controls: Sequence[str]) -> str:
    """A prompt with its facts, and the sentence on the controls that the video follows."""
    return f"{text.rstrip()} {FOLLOW.format(controls=', '.join(controls))}"


def negative_text(
    prompt: str, facts: Facts, *, metadata: str, duration: bool, resolution: bool
) -> str:
    """The negative prompt; ``metadata`` adds the positive sentences, inverted ones or none.

    They are sentences even after a JSON caption: this is how the reference calls the model.
    """
    if metadata == "none":
        return prompt
    inverse = metadata == "inverse"
    templates = (DURATION_INVERSE, RESOLUTION_INVERSE) if inverse else (DURATION, RESOLUTION)
    return _with_sentences(
        prompt, _sentences(facts, *templates, duration=duration, resolution=resolution)
    )


def encode(
    text: str, tokenizer: Tokenizer, *, system: str | None, limit: int
) -> tuple[tuple[int, ...], int]:
    """Token ids of ``text`` in the chat template, at most ``limit``, and how many were before the cut.

    The cut is at the end of the text; the template, the assistant's header and the two closing
    tokens always stay.
    """
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": text})
    encoded = tokenizer.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, add_vision_id=False, return_dict=True
    )
    ids = list(encoded["input_ids"])
    end, opening = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(SUFFIX)
    if opening is None or end not in ids:
        raise CheckpointError(
            f"the tokenizer has no {SUFFIX} token, or no chat template of Cosmos3"
        )
    suffix = [end, opening]
    length = len(ids) + len(suffix)
    if length > limit:
        header = ids[len(ids) - 1 - ids[::-1].index(end) :]  # from the end of the user's turn on
        ids = ids[: limit - len(header) - len(suffix)] + header
    return (*ids, *suffix), length


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in ``text_tokenizer/`` of a checkpoint folder."""
    place = folder / "text_tokenizer"
    try:
        tokenizer: Tokenizer = _tokenizer_class(place).from_pretrained(place)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{place} cannot be read: {reason}") from None
    return tokenizer


def _tokenizer_class(folder: Path) -> Any:
    """The class that the folder names: as AutoTokenizer finds it, which imports torch and the models for that."""
    import transformers

    try:
        name = json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"]
    except (OSError, ValueError, LookupError, TypeError):
        name = None
    return getattr(transformers, name if name in TOKENIZERS else "AutoTokenizer")


def default_negative(folder: Path, names: Sequence[str]) -> str:
    """The first of ``names`` in the checkpoint's ``assets/``, else the one of this package."""
    file = negative_file(folder, names)
    if file is None:
        own = resources.files("vllm_cosmos3").joinpath("data/negative_prompt.json")
        return json.dumps(json.loads(own.read_text()))
    try:
        return json.dumps(json.loads(file.read_text()))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None


def negative_file(folder: Path, names: Sequence[str]) -> Path | None:
    """The first of ``names`` in the checkpoint's ``assets/``, None if there is none of them."""
    files = (folder / "assets" / name for name in names)
    return next((file for file in files if file.exists()), None)


def as_text(prompt: Any) -> Any:
    """A prompt that stands as an object, as compact JSON; anything else as it is."""
    if not isinstance(prompt, Mapping):
        return prompt
    try:
        return json.dumps(prompt, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError):  # no JSON, which the validator refuses
        return prompt


def json_object(prompt: str) -> dict[str, Any] | None:
    """The caption that a prompt is; None if it is a text."""
    try:
        value = json.loads(prompt)
    except (ValueError, RecursionError):  # the latter for absurdly deep nesting
        return None
    return value if isinstance(value, dict) else None


def stated(facts: Facts) -> dict[str, Any]:
    """The keys of a caption that state the facts, in the order in which one without them gets them."""
    told: dict[str, Any] = {}
    if not facts.is_image:
        told |= {"duration": f"{int(facts.num_frames / facts.fps)}s", "fps": float(facts.fps)}
    told["resolution"] = {"H": facts.height, "W": facts.width}
    return told if facts.aspect_ratio is None else {**told, "aspect_ratio": facts.aspect_ratio}


def _with_facts(caption: dict[str, Any], facts: Facts) -> dict[str, Any]:
    if facts.is_image:
        caption = {k: v for k, v in caption.items() if k not in ("duration", "fps")}
    return caption | stated(facts)


def _sentences(
    facts: Facts, length: str, size: str, *, duration: bool, resolution: bool
) -> list[str]:
    kind = "image" if facts.is_image else "video"
    sentences = []
    if duration and not facts.is_image:
        sentences.append(length.format(duration=facts.num_frames / facts.fps, fps=facts.fps))
    if resolution:
        sentences.append(size.format(kind=kind, height=facts.height, width=facts.width))
    return sentences


def _with_sentences(text: str, sentences: list[str]) -> str:
    for sentence in sentences:
        text = text.strip().rstrip(".")
        text = f"{text}. {sentence}" if text else sentence
    return text
