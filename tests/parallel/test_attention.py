"""Attention backends against the definition, and the choice between them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_cosmos3.errors import InvalidRequest, Unsupported
from vllm_cosmos3.parallel.attention import Sequences, attend_in_turn, make_attend

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def definition(q_SHD: Tensor, k_KhD: Tensor, v_KhD: Tensor, *, causal: bool) -> Tensor:
    """Softmax of the scores, head by head, in float64."""
    group = q_SHD.shape[1] // k_KhD.shape[1]
    heads = []
    for head in range(q_SHD.shape[1]):
        q, k, v = q_SHD[:, head], k_KhD[:, head // group], v_KhD[:, head // group]
        scores = q.double() @ k.double().T / q.shape[-1] ** 0.5
        if causal:
            later = torch.ones_like(scores, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, float("-inf"))
        heads.append(scores.softmax(-1) @ v.double())
    return torch.stack(heads, dim=1)


@settings(max_examples=40, deadline=None)
@given(
    queries=st.integers(1, 17),
    more_keys=st.integers(0, 9),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    causal=st.booleans(),
)
def test_sdpa_is_attention(
    *, queries: int, more_keys: int, kv_heads: int, group: int, causal: bool
) -> None:
    keys = queries if causal else queries + more_keys
    generator = torch.Generator().manual_seed(queries)
    q = torch.randn(queries, kv_heads * group, 16, generator=generator)
    k, v = (torch.randn(keys, kv_heads, 16, generator=generator) for _ in range(2))
    attend = make_attend("sdpa", device=CPU, dtype=torch.float32, head_dim=16)
    actual = attend(q, k, v, causal=causal)
    torch.testing.assert_close(
        actual.double(), definition(q, k, v, causal=causal), atol=1e-5, rtol=0
    )


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 7), st.integers(1, 9)), min_size=1, max_size=5))
def test_several_sequences_attend_to_themselves_alone(lengths: list[tuple[int, int]]) -> None:
    queries, keys = zip(*lengths, strict=True)
    generator = torch.Generator().manual_seed(len(lengths))
    q = torch.randn(sum(queries), 4, 16, generator=generator)
    k, v = (torch.randn(sum(keys), 2, 16, generator=generator) for _ in range(2))
    attend = make_attend("sdpa", device=CPU, dtype=torch.float32, head_dim=16)
    together = attend(q, k, v, causal=False, sequences=Sequences.of(queries, keys, CPU))
    parts = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
    expected = torch.cat([definition(*each, causal=False) for each in parts])
    torch.testing.assert_close(together.double(), expected, atol=1e-5, rtol=0)


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    rest=st.integers(1, 6),
    texts=st.integers(0, 4),
)
def test_controls_are_attended_to_in_turn(tokens: list[int], rest: int, texts: int) -> None:
    """Each control sees the text, itself and the rest; the rest sees one control at a time."""
    generator = torch.Generator().manual_seed(rest)
    length = sum(tokens) + rest
    q = torch.randn(length, 4, 16, generator=generator)
    k, v = (torch.randn(texts + length, 2, 16, generator=generator) for _ in range(2))
    shares = torch.rand(len(tokens), generator=generator)
    shares = (shares / shares.sum()).tolist()
    attend = make_attend("sdpa", device=CPU, dtype=torch.float32, head_dim=16)
    actual = attend_in_turn(
        partial(attend, causal=False), list(zip(tokens, shares, strict=True)), q, k, v
    )

    expected = torch.zeros_like(q, dtype=torch.float64)
    ends = torch.tensor(tokens).cumsum(0).tolist()
    for count, end, share in zip(tokens, ends, shares, strict=True):
        own = list(range(end - count, end))
        last = list(range(length - rest, length))
        keys = [*range(texts), *(texts + i for i in own + last)]
        found = definition(q[own + last], k[keys], v[keys], causal=False)
        expected[own] = found[:count]
        expected[last] += share * found[count:]
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=0)


def test_auto_finds_a_backend_on_the_cpu() -> None:
    attend = make_attend("auto", device=CPU, dtype=torch.bfloat16, head_dim=32)
    q = torch.randn(5, 4, 32, dtype=torch.bfloat16)
    assert attend(q, q[:, :2], q[:, 2:], causal=False).dtype == torch.bfloat16


def test_an_unknown_backend_lists_the_known_ones() -> None:
    with pytest.raises(InvalidRequest, match="'fast', must be one of auto, flash, sdpa"):
        make_attend("fast", device=CPU, dtype=torch.float32, head_dim=32)


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [(CPU, torch.bfloat16, "needs a CUDA device, not cpu"), (CUDA, torch.float32, "not float32")],
)
def test_flash_says_why_it_cannot_run(
    device: torch.device, dtype: torch.dtype, reason: str
) -> None:
    with pytest.raises(Unsupported, match=reason):
        make_attend("flash", device=device, dtype=dtype, head_dim=32)
