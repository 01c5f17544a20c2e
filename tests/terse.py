"""A checkpoint whose reasoner soon closes what it has opened, so that its JSON takes few tokens.

A random model fills every text of a schema to its longest length: three thousand tokens.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from vllm_cosmos3.checkpoint.config import read_json

HEAD = "lm_head.weight"
CLOSING = set('"]}')
LOUD = 16.0  # times as far from the others, in one half of all places to the likely side


def terse(checkpoint: Path, folder: Path) -> Path:
    """A copy of ``checkpoint`` in ``folder`` with larger logits for what closes texts, lists and objects."""
    shutil.copytree(checkpoint, folder)
    tokens = Tokenizer.from_file(str(folder / "text_tokenizer" / "tokenizer.json")).get_vocab()
    closing = [index for token, index in tokens.items() if set(token) <= CLOSING]
    index = read_json(folder / "model.safetensors.index.json")
    file = folder / index["weight_map"][HEAD]
    tensors = load_file(file)
    tensors[HEAD][closing] *= LOUD
    save_file(tensors, file, metadata={"format": "pt"})
    return folder
