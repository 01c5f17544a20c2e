"""How much work a request is, and how long it takes at best on the device at hand.

Two FLOP for each multiply-add. The floor is the time of the matrix products at the rate of one
large product, of the attention at the rate of the largest attention, both measured on this device
in the same run, and of reading the weights where there are too few tokens to hide that. It leaves
out norms, rotation, activations and everything between kernels: no run reaches it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import linear
from torch.utils.flop_counter import FlopCounterMode

from clock import seconds
from vllm_cosmos3.checkpoint.config import ModelConfig, TransformerConfig
from vllm_cosmos3.checkpoint.latents import token_count
from vllm_cosmos3.generator.models.vae import VideoVAE
from vllm_cosmos3.parallel.attention import make_attend
from vllm_cosmos3.parallel.axis import Axis
from vllm_cosmos3.request.plan import Plan

LARGE = {"product": 8192, "queries": 44160, "keys": 44672, "copy": 2**30}  # 720p, 189 frames
SMALL = {"product": 512, "queries": 256, "keys": 320, "copy": 2**20}  # a CPU is done in a moment
ALONE = Axis("world", 1, 0, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What the device does at best: FLOP/s of products and of attention, bytes/s of reading."""

    product: float
    attention: float
    read: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """FLOP of products and of attention, and bytes of weights that are read."""

    product: float = 0.0
    attention: float = 0.0
    weights: float = 0.0

    @property
    def total(self) -> float:
        return self.product + self.attention

    def __add__(self, other: Work) -> Work:
        return Work(
            product=self.product + other.product,
            attention=self.attention + other.attention,
            weights=self.weights + other.weights,
        )

    def floor(self, rates: Rates) -> float:
        """Seconds."""
        products = max(self.product / rates.product, self.weights / rates.read)
        return products + self.attention / rates.attention


def measure_rates(config: TransformerConfig, device: torch.device, dtype: torch.dtype) -> Rates:
    """Takes about two seconds on a GPU."""
    sizes = SMALL if device.type == "cpu" else LARGE
    side, queries, keys = sizes["product"], sizes["queries"], sizes["keys"]
    heads, kv_heads, head = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    a, b = noise(side, side), noise(side, side)
    product = seconds(lambda: linear(a, b), device, repeat=20, warm=5)
    q, k, v = noise(queries, heads, head), noise(keys, kv_heads, head), noise(keys, kv_heads, head)
    attend = make_attend(device=device, dtype=dtype, head_dim=head)
    attention = seconds(lambda: attend(q, k, v, causal=False), device, repeat=8, warm=3)
    source = torch.zeros(sizes["copy"], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = seconds(lambda: target.copy_(source), device, repeat=10, warm=2)
    return Rates(
        product=2 * side**3 / product,
        attention=4 * queries * keys * heads * head / attention,
        read=2 * sizes["copy"] / copy,
    )


def tokens(plan: Plan, patch: int) -> dict[str, int]:
    """Tokens of the generation sequence by stream, and of each text."""
    counts = {}
    for stream in plan.streams:
        counts[stream.name] = token_count(stream.name, stream.shape, patch)
    texts = dict(zip(("prompt", "negative_prompt"), map(len, plan.token_ids), strict=False))
    return counts | texts


def text_work(config: TransformerConfig, plan: Plan) -> Work:
    """Reading the texts, once."""
    works = (tower_work(config, len(ids), (len(ids) + 1) / 2) for ids in plan.token_ids)
    return sum(works, Work())


def step_work(config: TransformerConfig, plan: Plan) -> Work:
    """One step of all branches and of the samples that make it together: the weights are read once.

    The adapters of the streams, under 1 %, are left out.
    """
    counts = tokens(plan, config.latent_patch_size)
    generated = sum(counts[stream.name] for stream in plan.streams)
    tokens_of_all = generated * plan.together
    works = [tower_work(config, tokens_of_all, generated + len(ids)) for ids in plan.token_ids]
    return replace(sum(works, Work()), weights=works[0].weights)


def tower_work(config: TransformerConfig, length: int, attended: float) -> Work:
    """One tower on ``length`` tokens of which each attends to ``attended`` on average."""
    query = config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    mlp = (len(config.backbone.mlp_inputs) + 1) * config.intermediate_size
    matrices = config.hidden_size * (2 * query + 2 * key + mlp)
    layers = config.num_hidden_layers
    return Work(
        product=2 * layers * length * matrices,
        attention=4 * layers * length * attended * query,
        weights=2 * layers * matrices,  # two bytes each
    )


def decode_work(config: ModelConfig, shape: tuple[int, ...]) -> Work:
    """The video autoencoder's decoder on latents [1, 48, T, h, w], counted on tensors without data.

    Its attention is counted with the convolutions. All latent frames after the first are alike.
    """
    _, channels, frames, height, width = shape
    with torch.device("meta"):
        vae = VideoVAE(config.vae, ALONE, "off").to(torch.bfloat16)
        latents = torch.empty(1, channels, min(frames, 2), height, width)
    counts = list(_counted(vae.decode(latents)))
    return Work(product=counts[0] + (frames - 1) * counts[-1])


def _counted(chunks: Iterator[torch.Tensor]) -> Iterator[int]:
    """FLOP of each chunk."""
    while True:
        with FlopCounterMode(display=False) as counter:
            if next(chunks, None) is None:
                return
        yield counter.get_total_flops()
