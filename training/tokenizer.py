"""The demo's tokenizer: of the package's own kind, taught the words of the world.

``python -m training.tokenizer FILE`` writes it as one JSON file.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from importlib.resources import files

from tokenizers import AddedToken, Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel

from training.captions import canonical, draw_caption
from training.prompts import NEGATIVES, framed
from training.questions import draw_question
from training.scenes import GROWN, Canvas, draw_scene

ROWS = 1024  # of the embedding: bytes, learned tokens, markup
_CANVASES = (Canvas(), Canvas(256, 256, 25, 12), Canvas(192, 320, 9, 8), Canvas(320, 192, 1, 24))


def train_demo_tokenizer(scenes: int = 1500) -> Tokenizer:
    """Train on captions, questions, answers, and the package's corpus. The same every time."""
    from training.package import MARKUP, SPECIAL_MARKUP, plain_tokenizer

    plain = plain_tokenizer()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.decoder = plain.normalizer, plain.decoder
    tokenizer.pre_tokenizer = plain.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=ROWS - len(MARKUP), show_progress=False, initial_alphabet=ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(_corpus(scenes), trainer)
    for token in MARKUP:
        special = token in SPECIAL_MARKUP
        added = AddedToken(token, special=special, normalized=False)
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([added])
    return tokenizer


def _corpus(scenes: int) -> Iterator[str]:
    text = files("vllm_cosmos3").joinpath("data", "tokenizer_corpus.txt").read_text("utf-8")
    for _ in range(8):  # rare beside the world's own words, but learned
        yield from text.splitlines()
    rng = random.Random(0)
    for seed in range(scenes):
        canvas = _CANVASES[seed % len(_CANVASES)]
        scene = draw_scene(seed, canvas, GROWN)
        yield framed(draw_caption(scene, 0.15).text, canvas)
        yield canonical(scene)
        asked = draw_question(scene, rng, 0.3)
        yield f"{asked.question} {asked.answer} <0.2 seconds>"
    yield from NEGATIVES


if __name__ == "__main__":
    train_demo_tokenizer().save(sys.argv[1])
