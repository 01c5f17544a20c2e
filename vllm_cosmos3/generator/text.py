"""Text conditioning: what the generation tower sees of the prompts, read once per request and branch."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from vllm_cosmos3.generator.models.modalities import MODALITIES
from vllm_cosmos3.generator.models.rope import Rope
from vllm_cosmos3.generator.models.text_cache import TextKVCache
from vllm_cosmos3.generator.models.transformer import Context, Past, Transformer
from vllm_cosmos3.generator.sampling import positions
from vllm_cosmos3.request.plan import Plan


def read_prompts(
    plan: Plan, branches: Iterable[int], transformer: Transformer, cache: TextKVCache
) -> dict[int, Context]:
    """The context of each of the ``branches`` of guidance.

    A text that another branch or a recent request has read is not read again.
    """
    texts: dict[tuple[int, ...], Past] = {}
    contexts = {}
    for branch in branches:
        ids = tuple(plan.token_ids[branch])
        rope = _rope(plan, branch, transformer)
        if ids not in texts:
            found = cache.find(ids)
            texts[ids] = found or transformer.understand(
                torch.tensor(ids, device=transformer.device)
            )
        contexts[branch] = Context(texts=(texts[ids],), rope=rope)
    return contexts


def keep_texts(plan: Plan, contexts: dict[int, Context], cache: TextKVCache) -> None:
    """Leave what was read to later requests."""
    for branch, context in contexts.items():
        cache.keep(tuple(plan.token_ids[branch]), *context.texts)


def _rope(plan: Plan, branch: int, transformer: Transformer) -> Rope:
    """The rotary tables of all that follows a branch's text."""
    config = transformer.config
    start = positions.generation_start(len(plan.token_ids[branch]), config)
    parts: list[Tensor] = []
    controls = []
    for stream in (plan.streams[place] for place in plan.seen(branch)):
        begin = positions.next_start(parts[-1]) if stream.positions_after and parts else start
        parts.append(MODALITIES[stream.name].positions(stream, begin, config))
        if stream.control_weight is not None:
            controls.append((parts[-1].shape[1], stream.control_weight))
    return transformer.rope(torch.cat(parts, dim=1), tuple(controls))
