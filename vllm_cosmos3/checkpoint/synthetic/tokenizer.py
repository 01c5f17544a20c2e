"""A small tokenizer of the same kind as the published one: Qwen's byte-level BPE and its markup.

It is trained on the package's own corpus, so that a tiny checkpoint reads and writes real text. Its
ids differ from the published ones: every reader asks the tokenizer for the id of a markup token.
"""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

LEARNED = 1024  # tokens of plain text: 256 bytes and what the corpus teaches

# Markup in the published order. The first group is special: it is left out of decoded text.
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

# Qwen's word boundaries: contractions, words, single digits, punctuation, line ends, spaces.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer() -> Tokenizer:
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
        vocab_size=LEARNED, show_progress=False, initial_alphabet=ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(_data("tokenizer_corpus.txt").splitlines(), trainer)
    tokenizer.add_special_tokens([_added(token, special=True) for token in SPECIAL])
    tokenizer.add_tokens([_added(token, special=False) for token in PLAIN])
    return tokenizer


def token_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Id of every markup token."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    return {token: vocabulary[token] for token in (*SPECIAL, *PLAIN)}


def spoken_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids of whole words and of the end of a message: what a random reasoner should babble in."""
    words = [
        id
        for token, id in tokenizer.get_vocab(with_added_tokens=False).items()
        if re.fullmatch("Ġ[A-Za-z]{2,}", token)  # Ġ stands for the space before a word
    ]
    return [*words, token_ids(tokenizer)["<|im_end|>"]]


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write every file that Qwen's tokenizer classes look for, chat template included."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    template = _data("chat_template.jinja")
    texts = {
        "vocab.json": json.dumps(model["vocab"], ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
        "added_tokens.json": json.dumps(token_ids(tokenizer), indent=2),
        "special_tokens_map.json": json.dumps(_roles(), indent=2),
        "tokenizer_config.json": json.dumps(_tokenizer_config(tokenizer, template), indent=2),
        "chat_template.jinja": template,
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def _roles() -> dict[str, Any]:
    return {
        "additional_special_tokens": list(SPECIAL[1:]),
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }


def _tokenizer_config(tokenizer: Tokenizer, template: str) -> dict[str, Any]:
    added = {
        str(id): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token in SPECIAL,
        }
        for token, id in token_ids(tokenizer).items()
    }
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        **_roles(),
        "bos_token": None,
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": 262144,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def _added(token: str, *, special: bool) -> AddedToken:
    return AddedToken(token, special=special, normalized=False)


def _data(name: str) -> str:
    return files("vllm_cosmos3").joinpath("data", name).read_text(encoding="utf-8")
