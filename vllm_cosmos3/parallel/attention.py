"""Dense attention of one sequence, or of several: a table of backends, chosen by what the device can do.

Shapes: q [S, H, D], k and v [K, h, D], result [S, H, D]. H is a multiple of h; query head j reads
key head j // (H / h). Causal attention needs S = K. Scores are scaled by 1 / sqrt(D). Of several
sequences S and K are the sums, and each attends to itself alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vllm_cosmos3.errors import Unsupported
from vllm_cosmos3.parallel.checks import ATTENTION_BACKENDS, check_backend


@dataclass(frozen=True, slots=True, eq=False)
class Sequences:
    """The lengths of several sequences that follow one another, and int32 [n + 1] where they begin and end."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    query_bounds: Tensor
    key_bounds: Tensor

    @classmethod
    def of(cls, queries: Sequence[int], keys: Sequence[int], device: torch.device) -> Sequences:
        bounds = (
            torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
            for lengths in (queries, keys)
        )
        return cls(tuple(queries), tuple(keys), *bounds)


class Attend(Protocol):
    def __call__(
        self,
        q_SHD: Tensor,
        k_KhD: Tensor,
        v_KhD: Tensor,
        *,
        causal: bool,
        sequences: Sequences | None = None,
    ) -> Tensor: ...


def make_attend(
    name: str = "auto", *, device: torch.device, dtype: torch.dtype, head_dim: int
) -> Attend:
    """The backend ``name`` of BACKENDS, or for "auto" the fastest that can do this.

    Raises InvalidRequest for an unknown name, Unsupported where the device cannot run it.
    """
    check_backend(name)
    obstacle = "" if name == "sdpa" else _flash_obstacle(device, dtype, head_dim)
    if name == "auto":
        name = "sdpa" if obstacle else "flash"
    elif name == "flash" and obstacle:
        raise Unsupported(f"attention_backend flash {obstacle}; use sdpa or auto")
    return BACKENDS[name](head_dim)


def attend_in_turn(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    controls: Sequence[tuple[int, float]],
    q_SHD: Tensor,
    k_KhD: Tensor,
    v_KhD: Tensor,
) -> Tensor:
    """Attention to several controls, which see each other only through the tokens after them.

    ``controls`` are the number of tokens and the share of each, first among the queries; the keys
    have a text before them. Each control and the rest attend to the text, to themselves and to each
    other; of the results for the rest the mean by shares counts.
    """
    counts = [count for count, _ in controls]
    sizes = [*counts, len(q_SHD) - sum(counts)]
    *q_own, q_rest = q_SHD.split(sizes)
    (k_text, *k_own, k_rest), (v_text, *v_own, v_rest) = (
        x.split([len(k_KhD) - len(q_SHD), *sizes]) for x in (k_KhD, v_KhD)
    )
    results, mean = [], torch.zeros_like(q_rest, dtype=torch.float32)
    for (count, share), q, k, v in zip(controls, q_own, k_own, v_own, strict=True):
        own, rest = attend(
            torch.cat([q, q_rest]), torch.cat([k_text, k, k_rest]), torch.cat([v_text, v, v_rest])
        ).tensor_split([count])
        results.append(own)
        mean += share * rest
    return torch.cat([*results, mean.to(q_SHD.dtype)])


def _sdpa(_head_dim: int) -> Attend:
    return _attend_sdpa


def _flash(head_dim: int) -> Attend:
    """FlashAttention 2, 3 or 4, whichever vLLM bundles for this GPU."""
    from vllm.v1.attention.backends.fa_utils import (
        flash_attn_varlen_func,
        get_flash_attn_version,
    )

    version = get_flash_attn_version(head_size=head_dim)
    if version is None:
        raise Unsupported("not part of this vLLM build")
    # Left to itself FlashAttention divides the keys where queries and heads are few, and so adds up
    # in another order on a rank that has a share of the heads.
    kernel = partial(flash_attn_varlen_func, fa_version=version, num_splits=1)
    return partial(_attend_flash, kernel)


BACKENDS: dict[str, Callable[[int], Attend]] = dict(
    zip(ATTENTION_BACKENDS, (_flash, _sdpa), strict=True)
)


def _attend_sdpa(
    q_SHD: Tensor,
    k_KhD: Tensor,
    v_KhD: Tensor,
    *,
    causal: bool,
    sequences: Sequences | None = None,
) -> Tensor:
    if sequences is not None:
        keys = list(sequences.keys)
        parts = q_SHD.split(list(sequences.queries)), k_KhD.split(keys), v_KhD.split(keys)
        return torch.cat([_attend_sdpa(*each, causal=causal) for each in zip(*parts, strict=True)])
    q, k, v = (x.movedim(1, 0).unsqueeze(0) for x in (q_SHD, k_KhD, v_KhD))
    grouped = q.shape[1] != k.shape[1]
    o = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
    return o.squeeze(0).movedim(0, 1)


def _attend_flash(
    varlen: Callable[..., Tensor],
    q_SHD: Tensor,
    k_KhD: Tensor,
    v_KhD: Tensor,
    *,
    causal: bool,
    sequences: Sequences | None = None,
) -> Tensor:
    if sequences is None:
        queries, keys = q_SHD.shape[0], k_KhD.shape[0]
        bounds = _bounds(queries, q_SHD.device), _bounds(keys, q_SHD.device)
        sequences = Sequences((queries,), (keys,), *bounds)
    return varlen(
        q=q_SHD,
        k=k_KhD,
        v=v_KhD,
        max_seqlen_q=max(sequences.queries),
        cu_seqlens_q=sequences.query_bounds,
        max_seqlen_k=max(sequences.keys),
        cu_seqlens_k=sequences.key_bounds,
        causal=causal,
    )


@cache
def _bounds(length: int, device: torch.device) -> Tensor:
    """Start and end of the only sequence, 8 bytes.

    Kept, because building it would stop the device, and for ever, because recorded kernels read it.
    """
    return torch.tensor([0, length], dtype=torch.int32, device=device)


def _flash_obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Why FlashAttention cannot be used here; empty if it can: it is asked with one token."""
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    token = torch.zeros(1, 1, head_dim, dtype=dtype, device=device)
    try:
        _flash(head_dim)(token, token, token, causal=False)
    except (ImportError, RuntimeError, Unsupported) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        return f"cannot take heads of {head_dim} here ({reason})"
    return ""
