"""Checks of engine options about ranks and kernels, before there are any. Loads no torch."""

from __future__ import annotations

from vllm_cosmos3.checkpoint.config import TransformerConfig
from vllm_cosmos3.engine_options import ParallelConfig
from vllm_cosmos3.errors import InvalidRequest

ATTENTION_BACKENDS = ("flash", "sdpa")


def check_degrees(
    parallel: ParallelConfig,
    transformer: TransformerConfig,
    *,
    guided: bool = True,
    devices: int | None = None,
) -> None:
    """Raise InvalidRequest for the first degree that this checkpoint or machine cannot have.

    Each key-value head lives on one rank, so the tensor-parallel and Ulysses degrees together
    divide their number. ``guided`` is false for distilled checkpoints, which have no guidance to
    share. ``devices`` is how many accelerators there are; None means any number.
    """
    kv_heads = transformer.num_key_value_heads
    legal = [n for n in range(1, kv_heads + 1) if kv_heads % n == 0]
    tp, ulysses = parallel.tensor_parallel_size, parallel.ulysses_degree
    tp_legal = [n for n in legal if transformer.intermediate_size % n == 0]
    _check("tensor_parallel_size", tp, tp_legal, f"({kv_heads} key-value heads)")
    beside = [n for n in legal if kv_heads % (n * tp) == 0]
    reason = f"(tensor_parallel_size is {tp}, {kv_heads} key-value heads)"
    _check("ulysses_degree", ulysses, beside, reason)
    branches = ([1, 2], "(guidance has two branches)")
    without = ([1], "(a distilled checkpoint has no guidance)")
    _check("cfg_parallel_size", parallel.cfg_parallel_size, *(branches if guided else without))
    if devices is not None and parallel.world_size > devices:
        raise InvalidRequest(
            "tensor_parallel_size x cfg_parallel_size x ulysses_degree",
            parallel.world_size,
            f"at most {devices}, the number of devices",
        )


def check_backend(name: str) -> None:
    """Raise InvalidRequest unless ``name`` is "auto" or one of ATTENTION_BACKENDS."""
    if name != "auto" and name not in ATTENTION_BACKENDS:
        raise InvalidRequest(
            "attention_backend", name, f"one of auto, {', '.join(ATTENTION_BACKENDS)}"
        )


def _check(field: str, value: int, legal: list[int], reason: str) -> None:
    if value not in legal:
        *most, last = map(str, legal)
        either = f"{', '.join(most)} or {last}" if most else last
        raise InvalidRequest(field, value, f"{either} {reason}")
