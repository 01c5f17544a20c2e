"""Small tokenizers of the same kind as the published ones: byte-level BPE with Qwen's markup or Nemotron's.

They are trained on the package's own corpus, so that a tiny checkpoint reads and writes real text. Their
ids differ from the published ones: every reader asks the tokenizer for the id of a markup token.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

LEARNED = 1024  # tokens of plain text: 256 bytes and what the corpus teaches


@dataclass(frozen=True, slots=True, kw_only=True)
class Markup:
    """The markup of a tokenizer: its tokens in the order of their ids, and what some of them are for.

    All but the ``plain`` ones are special: they are left out of decoded text. ``first`` says that they
    have the lowest ids, else the highest. ``template`` is the file of the chat template.
    """

    tokens: tuple[str, ...]
    plain: tuple[str, ...]
    first: bool
    roles: dict[str, str | None]
    settings: dict[str, object]  # of the tokenizer's class
    template: str

    @property
    def special(self) -> tuple[str, ...]:
        return tuple(token for token in self.tokens if token not in self.plain)


# Markup in the published order.
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
PLAIN = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
QWEN = Markup(
    tokens=(*SPECIAL, *PLAIN),
    plain=PLAIN,
    first=False,
    roles={
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
    },
    settings={"tokenizer_class": "Qwen2Tokenizer"},
    template="chat_template.jinja",
)
_THOUGHTS = (
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
)  # fmt: skip
NEMOTRON = Markup(
    tokens=(
        "<unk>", "<s>", "</s>", *(f"<SPECIAL_{id}>" for id in range(3, 10)),
        "<|im_start|>", "<|im_end|>", *_THOUGHTS,
        "<|video_pad|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>",
    ),
    plain=_THOUGHTS,
    first=True,
    roles={
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<unk>",
    },
    settings={"return_mm_token_type_ids": True, "tokenizer_class": "PreTrainedTokenizerFast"},
    template="edge_chat_template.jinja",
)  # fmt: skip
MARKUP = {"Qwen3": QWEN, "Nemotron": NEMOTRON}  # of the backbones

# Qwen's word boundaries: contractions, words, single digits, punctuation, line ends, spaces.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(markup: Markup = QWEN) -> Tokenizer:
    """Train on the packaged corpus. The result is the same every time."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = Sequence(
        [
            Split(Regex(_WORDS), behavior="isolated"),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=LEARNED,
        show_progress=False,
        initial_alphabet=ByteLevel.alphabet(),
        special_tokens=list(markup.tokens) if markup.first else [],
    )
    tokenizer.train_from_iterator(_data("tokenizer_corpus.txt").splitlines(), trainer)
    tokenizer.add_special_tokens([_added(token, special=True) for token in markup.special])
    tokenizer.add_tokens([_added(token, special=False) for token in markup.plain])
    return tokenizer


def token_ids(tokenizer: Tokenizer, markup: Markup = QWEN) -> dict[str, int]:
    """Id of every markup token."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    return {token: vocabulary[token] for token in markup.tokens}


def spoken_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids of whole words and of the end of a message: what a random reasoner should babble in."""
    words = [
        id
        for token, id in tokenizer.get_vocab(with_added_tokens=False).items()
        if re.fullmatch("Ġ[A-Za-z]{2,}", token)  # Ġ stands for the space before a word
    ]
    return [*words, tokenizer.get_vocab(with_added_tokens=True)["<|im_end|>"]]


def write_tokenizer(tokenizer: Tokenizer, folder: Path, markup: Markup = QWEN) -> None:
    """Write every file that the tokenizer's class looks for, chat template included."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    template = _data(markup.template)
    texts = {
        "special_tokens_map.json": json.dumps(_roles(markup), indent=2),
        "tokenizer_config.json": json.dumps(
            _tokenizer_config(tokenizer, markup, template), indent=2
        ),
        "chat_template.jinja": template,
    }
    if markup is QWEN:  # whose class reads the parts of tokenizer.json from files of their own
        model = json.loads((folder / "tokenizer.json").read_text())["model"]
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        texts |= {
            "vocab.json": json.dumps(model["vocab"], ensure_ascii=False),
            "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
            "added_tokens.json": json.dumps(token_ids(tokenizer), indent=2),
        }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def _roles(markup: Markup) -> dict[str, Any]:
    given = {role: token for role, token in markup.roles.items() if token is not None}
    return {"additional_special_tokens": list(markup.special[1:]), **given}


def _tokenizer_config(tokenizer: Tokenizer, markup: Markup, template: str) -> dict[str, Any]:
    added = {
        str(id): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token not in markup.plain,
        }
        for token, id in token_ids(tokenizer, markup).items()
    }
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": list(markup.special[1:]),
        **markup.roles,
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": 262144,
        "split_special_tokens": False,
        **markup.settings,
    }


def _added(token: str, *, special: bool) -> AddedToken:
    return AddedToken(token, special=special, normalized=False)


def _data(name: str) -> str:
    return files("vllm_cosmos3").joinpath("data", name).read_text(encoding="utf-8")
