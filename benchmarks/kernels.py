"""Kernels alone, at the shapes of a checkpoint: attention, matrix products, element-wise passes.

    vllm-cosmos3 make-checkpoint NANO --size nano --no-weights
    python benchmarks/kernels.py NANO --device cuda --json kernels.json

Reads the configuration only. Each figure is the mean of calls back to back between two events, so
the smallest shapes measure how fast the host launches. What a backend cannot do is said in its row.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from clock import mean_seconds
from machine import heading, provenance
from vllm_cosmos3.checkpoint.config import TransformerConfig, read_config
from vllm_cosmos3.compat import fused_qk_norm_rope
from vllm_cosmos3.engine_options import ParallelConfig
from vllm_cosmos3.errors import Cosmos3Error
from vllm_cosmos3.parallel.attention import make_attend
from vllm_cosmos3.parallel.mesh import building_layers, close_mesh, init_mesh

TEXT = 512  # tokens that the generation tower attends to beside its own
ROWS = {  # generation tokens of a request
    "t2i-256p": 60,
    "t2i-720p": 920,
    "t2v-256p": 2880,
    "t2v-480p": 18720,
    "t2v-720p": 44160,
}
SDPA = {  # torch's backends, and whether each key head is repeated for the queries that share it
    "sdpa default": (None, False),
    "sdpa flash": (SDPBackend.FLASH_ATTENTION, False),
    "sdpa cudnn": (SDPBackend.CUDNN_ATTENTION, False),
    "sdpa cudnn, keys repeated": (SDPBackend.CUDNN_ATTENTION, True),
    "sdpa efficient, keys repeated": (SDPBackend.EFFICIENT_ATTENTION, True),
}
Call = Callable[[], object]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [S, H, D], k and v [K, h, D]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One kernel at one shape. ``work`` is FLOP, or bytes of element-wise passes."""

    kind: str
    shape: str
    kernel: str
    work: float
    seconds: float | None
    obstacle: str = ""


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    device = torch.device(args.device)
    try:
        config = read_config(args.model).transformer
    except Cosmos3Error as error:
        print(f"kernels: {error}", file=sys.stderr)
        return 2
    facts = provenance(device)
    print(heading(facts), flush=True)
    dtype = getattr(torch, args.dtype)
    lengths = {name: args.tokens or ROWS[name] for name in args.rows}
    figures = []
    with torch.inference_mode():
        for kind, measure in KINDS.items():
            mine = list(measure(config, lengths, device, dtype, args))
            print(table(kind, mine), flush=True)
            figures += mine
    if args.json:
        report = {"machine": facts, "figures": [asdict(figure) for figure in figures]}
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def attention_figures(
    config: TransformerConfig,
    lengths: Mapping[str, int],
    device: torch.device,
    dtype: torch.dtype,
    args: argparse.Namespace,
) -> Iterator[Figure]:
    """Queries of the generation tower, keys and values of the text before them too."""
    heads, kv_heads, head = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    for name, length in lengths.items():
        q = torch.randn(length, heads, head, device=device, dtype=dtype)
        k, v = torch.randn(2, length + TEXT, kv_heads, head, device=device, dtype=dtype)
        for backend, attend in attentions(device, dtype, head, flashinfer=args.flashinfer):
            yield timed(
                partial(attend, q, k, v),
                device,
                kind="attention",
                shape=f"{name}: {length:,} x {length + TEXT:,}",
                kernel=backend,
                work=4 * length * (length + TEXT) * heads * head,
            )


def attentions(
    device: torch.device, dtype: torch.dtype, head: int, *, flashinfer: bool
) -> Iterator[tuple[str, Attention]]:
    """What may be there, by name. Those that are not fail when they are called."""
    ours = make_attend(device=device, dtype=dtype, head_dim=head)
    yield "the package's choice", partial(ours, causal=False)
    for name, (backend, repeated) in SDPA.items():
        yield name, partial(sdpa, backend, repeated)
    if device.type == "cuda":
        yield from ((f"FlashAttention {n}", partial(flash, n)) for n in (2, 3))
    if flashinfer:
        yield "FlashInfer", flash_infer


def sdpa(
    backend: SDPBackend | None,
    repeated: bool,  # noqa: FBT001
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> Tensor:
    """torch's own."""
    if repeated:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    q, k, v = (x.movedim(1, 0).unsqueeze(0) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    with nullcontext() if backend is None else sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v, enable_gqa=grouped)


def flash(version: int, q: Tensor, k: Tensor, v: Tensor, **scales: Tensor) -> Tensor:
    """vLLM's own build of FlashAttention. ``scales`` are those of FP8 tensors."""
    from vllm.vllm_flash_attn import fa_version_unsupported_reason, flash_attn_varlen_func

    if obstacle := fa_version_unsupported_reason(version):
        raise RuntimeError(obstacle)
    output: Tensor = flash_attn_varlen_func(
        q=q,
        k=k,
        v=v,
        max_seqlen_q=len(q),
        cu_seqlens_q=bounds(len(q), q.device),
        max_seqlen_k=len(k),
        cu_seqlens_k=bounds(len(k), k.device),
        fa_version=version,
        **scales,
    )
    return output


@lru_cache
def bounds(length: int, device: torch.device) -> Tensor:
    """Kept: making it would stop the device in each call."""
    return torch.tensor([0, length], dtype=torch.int32, device=device)


def flash_infer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compiles itself when it is first called, which takes minutes and a CUDA compiler."""
    import flashinfer

    output: Tensor = flashinfer.single_prefill_with_kv_cache(q, k, v, causal=False)
    return output


def product_figures(
    config: TransformerConfig,
    lengths: Mapping[str, int],
    device: torch.device,
    dtype: torch.dtype,
    _args: argparse.Namespace,
) -> Iterator[Figure]:
    """The four matrices of a layer, merged as the package merges them."""
    width, inner = config.hidden_size, config.intermediate_size
    query = config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    matrices = {
        "qkv": (width, query + 2 * key),
        "out": (query, width),
        "gate_up": (width, len(config.backbone.mlp_inputs) * inner),
        "down": (inner, width),
    }
    for name, length in lengths.items():
        for matrix, (inputs, outputs) in matrices.items():
            x = torch.randn(length, inputs, device=device, dtype=dtype)
            weight = torch.randn(outputs, inputs, device=device, dtype=dtype)
            yield timed(
                partial(linear, x, weight),
                device,
                kind="products",
                shape=f"{name}: {length:,}",
                kernel=f"{matrix} {inputs} to {outputs}",
                work=2 * length * inputs * outputs,
            )


def elementwise_figures(
    config: TransformerConfig,
    lengths: Mapping[str, int],
    device: torch.device,
    dtype: torch.dtype,
    _args: argparse.Namespace,
) -> Iterator[Figure]:
    """vLLM's passes beside the same in torch operations. Work is what must be read and written."""
    for name, length in lengths.items():
        for kernel, call, values in passes(config, length, device, dtype):
            yield timed(
                call,
                device,
                kind="element-wise",
                shape=f"{name}: {length:,}",
                kernel=kernel,
                work=values * dtype.itemsize,
            )


def passes(
    config: TransformerConfig, length: int, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, Call, int]]:
    """Name, call, and values moved of each pass over ``length`` tokens."""
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.layernorm import RMSNorm

    width, inner, head, eps = (
        config.hidden_size,
        config.intermediate_size,
        config.head_dim,
        config.rms_norm_eps,
    )
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    mesh = init_mesh(ParallelConfig())
    with building_layers(mesh), device:
        norm, act = RMSNorm(width, eps, dtype=dtype), SiluAndMul()
    close_mesh(mesh)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    x, residual = noise(length, width), noise(length, width)
    yield "add and norm", lambda: norm(x, residual), 4 * x.numel()
    yield "add and norm, torch", lambda: plain_norm(x, residual, norm.weight, eps), 4 * x.numel()

    weight, table = noise(head), noise(length, head)
    fused, rows = fused_qk_norm_rope(head, dtype, device), torch.arange(length, device=device)
    qkv = noise(length, (heads + 2 * kv_heads) * head)
    values = 2 * length * (heads + kv_heads) * head
    if fused is not None:
        sizes = (heads, kv_heads, kv_heads, head)
        norm_and_rotate = partial(*(fused, qkv, *sizes, eps, weight, weight, table, True, rows))
        yield "norm and rotate queries and keys", norm_and_rotate, values
    qk = qkv.unflatten(1, (-1, head))[:, : heads + kv_heads]
    plain = partial(plain_norm_rotate, qk, weight, table, eps)
    yield "norm and rotate queries and keys, torch", plain, values

    gates = noise(length, 2 * inner)
    yield "SiLU and multiply", lambda: act(gates), 3 * length * inner
    yield "SiLU and multiply, torch", lambda: plain_gate(gates), 3 * length * inner

    k, k_text = noise(length, 2 * kv_heads * head), noise(TEXT, 2 * kv_heads * head)
    yield (
        "join text's keys and values",
        lambda: torch.cat([k_text, k]),
        2 * (k_text.numel() + k.numel()),
    )


def plain_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    residual = x + residual
    wide = residual.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight, residual


def plain_norm_rotate(x: Tensor, weight: Tensor, table: Tensor, eps: float) -> Tensor:
    wide = x.float()
    x = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight
    first, second = x.chunk(2, dim=-1)
    cos, sin = table.unsqueeze(1).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def plain_gate(gates: Tensor) -> Tensor:
    gate, up = gates.chunk(2, dim=-1)
    return silu(gate) * up


KINDS: dict[str, Callable[..., Iterator[Figure]]] = {
    "attention": attention_figures,
    "products": product_figures,
    "element-wise": elementwise_figures,
}


def timed(call: Call, device: torch.device, **what: Any) -> Figure:
    """Calls for about a third of a second after a few warm ones, or why there are none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of why a backend was not chosen
            for _ in range(3):
                call()
        once = mean_seconds(call, device, 1)
    except (RuntimeError, ImportError, NotImplementedError) as error:
        return Figure(**what, seconds=None, obstacle=str(error).strip().split("\n")[0][:120])
    return Figure(**what, seconds=mean_seconds(call, device, min(200, max(3, int(0.3 / once)))))


def table(kind: str, figures: list[Figure]) -> str:
    """Markdown."""
    unit, scale = ("GB/s", 1e9) if kind == "element-wise" else ("TFLOP/s", 1e12)
    lines = ["", f"| {kind}: shape | kernel | ms | {unit} |", "|---|---|---|---|"]
    for figure in figures:
        cells = [figure.shape, figure.kernel]
        if figure.seconds is None:
            cells += ["", figure.obstacle.replace("|", "/")]
        else:
            rate = figure.work / figure.seconds / scale
            cells += [f"{1000 * figure.seconds:.3f}", f"{rate:.3g}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", type=Path, help="checkpoint folder; no weights are read")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--tokens", type=int, help="of every row, instead of its own number")
    parser.add_argument(
        "--flashinfer", action="store_true", help="FlashInfer too, which compiles for minutes"
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
