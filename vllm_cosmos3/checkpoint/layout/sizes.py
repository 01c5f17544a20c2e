"""Sizes of checkpoints: those of the released models, and a tiny one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What distinguishes the members of the family."""

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_axes: tuple[int, int, int]
    intermediate_size: int
    vocab_size: int | None  # None: as many as the tokenizer has
    vision_depth: int = 27
    vision_hidden: int = 1152
    vision_heads: int = 16
    vision_intermediate: int = 4304
    vision_positions: int = 2304
    vision_deepstack: tuple[int, ...] = (8, 16, 24)
    projector_hidden: int = 11520  # of Edge, which merges patches after its encoder
    image_pixels: tuple[int, int] = (65536, 16777216)  # smallest and largest area of an image
    video_pixels: tuple[int, int] = (4096, 25165824)  # the same for all frames of a video together
    vae_base: int = 160
    vae_decoder_base: int = 256
    sound_decoder_dim: int = 320
    sound_encoder_dim: int = 192


SIZES = {
    "tiny": Size(
        hidden_size=64,
        layers=3,
        heads=8,
        kv_heads=4,
        head_dim=32,  # the smallest head that vLLM's CPU attention takes
        rope_axes=(6, 5, 5),
        intermediate_size=128,
        vocab_size=None,
        vision_depth=4,
        vision_hidden=64,
        vision_heads=4,
        vision_intermediate=128,
        vision_positions=64,
        vision_deepstack=(1, 2, 3),
        projector_hidden=96,
        image_pixels=(4096, 65536),
        video_pixels=(4096, 131072),
        vae_base=4,
        vae_decoder_base=4,
        sound_decoder_dim=4,
        sound_encoder_dim=4,
    ),
    "nano": Size(
        hidden_size=4096,
        layers=36,
        heads=32,
        kv_heads=8,
        head_dim=128,
        rope_axes=(24, 20, 20),
        intermediate_size=12288,
        vocab_size=151936,
    ),
    "super": Size(
        hidden_size=5120,
        layers=64,
        heads=64,
        kv_heads=8,
        head_dim=128,
        rope_axes=(24, 20, 20),
        intermediate_size=25600,
        vocab_size=151936,
    ),
    "edge": Size(
        hidden_size=2048,
        layers=28,
        heads=16,
        kv_heads=8,
        head_dim=128,
        rope_axes=(24, 20, 20),
        intermediate_size=9216,
        vocab_size=131072,
        vision_positions=256,
    ),
}
