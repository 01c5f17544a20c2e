"""Write vllm_cosmos3/request/keywords.py, the keyword arguments of `Cosmos3.generate`, from the fields.

    python tools/keywords.py

Editors complete from it, and the documentation lists it. A test holds that it is what this makes.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import textwrap
from pathlib import Path

from vllm_cosmos3.request.fields import Spec
from vllm_cosmos3.request.request import GenerateRequest

PLACE = Path(__file__).resolve().parents[1] / "vllm_cosmos3/request/keywords.py"
TYPES = {
    "text": "str",
    "int": "int",
    "float": "float",
    "bool": "bool",
    "size": "str",
    "ints": "int | Sequence[int]",
    "pair": "Sequence[float]",
    "numbers": "Sequence[float] | Array",
    "rows": "Sequence[Sequence[float]] | Array",
    "control": "bool | VideoSource | Mapping[str, object]",
    "image": "ImageSource",
    "video": "VideoSource",
    "sound": "SoundSource",
    "arrays": "Mapping[str, Array]",
}
CAPTIONS = ("prompt", "negative_prompt")  # text, or an object that becomes one
HEAD = '''"""Keyword arguments of `Cosmos3.generate`, for editors and readers. Made by tools/keywords.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict

if TYPE_CHECKING:
    import numpy as np
    import torch

    from vllm_cosmos3.media import ImageSource, SoundSource, VideoSource

    Array: TypeAlias = np.ndarray[Any, Any] | torch.Tensor


class Keywords(TypedDict, total=False):
    """Fields of a request. One that is left out takes the default of its mode."""
'''


def keywords() -> str:
    """The text of the module."""
    parts = [HEAD]
    for item in dataclasses.fields(GenerateRequest):
        spec: Spec = item.metadata["spec"]
        kind = (
            f"Literal[{', '.join(map(repr, spec.choices))}]" if spec.choices else TYPES[spec.kind]
        )
        if item.name in CAPTIONS:
            kind += " | Mapping[str, object]"
        if item.default is None:
            kind += " | None"
        sentence = spec.sentence(item.default)
        wrapped = "\n    ".join(textwrap.wrap(f'"""{sentence}"""', 96))
        parts.append(f"\n    {item.name}: {kind}\n    {wrapped}\n")
    command = [sys.executable, "-m", "ruff", "format", "--stdin-filename", str(PLACE), "-"]
    made = subprocess.run(command, input="".join(parts), capture_output=True, text=True, check=True)
    return made.stdout


if __name__ == "__main__":
    PLACE.write_text(keywords())
