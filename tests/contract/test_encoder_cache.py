"""vLLM's scheduler fills batches with clips while another batch runs, given a cache for two of them."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from vllm_cosmos3 import plugin
from vllm_cosmos3.reasoner.startup import let_batches_overlap

BATCH, PROMPT, CLIP, BLOCK = 1600, 230, 200, 16  # tokens; the last of a block of the KV cache


@pytest.fixture(scope="module")
def config(tiny_checkpoint: Path) -> VllmConfig:
    plugin.register()
    return EngineArgs(
        model=str(tiny_checkpoint),
        hf_overrides={"architectures": [plugin.ARCHITECTURE]},
        load_format="dummy",
        max_model_len=1024,
        max_num_batched_tokens=BATCH,
        max_num_seqs=64,
        enable_prefix_caching=False,
        block_size=BLOCK,
    ).create_engine_config()


def batches(config: VllmConfig, clips: int) -> list[int]:
    """Tokens of each batch, with two in flight at a time, of questions about as many clips."""
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
    cache = KVCacheConfig(
        num_blocks=10_000,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
    )
    config.cache_config.num_gpu_blocks = cache.num_blocks
    manager = StructuredOutputManager(config)
    scheduler: Any = AsyncScheduler(config, cache, manager, block_size=BLOCK)
    for number in range(clips):
        scheduler.add_request(question(str(number)))
    flying: deque[Any] = deque()
    tokens, computed = [], dict.fromkeys(map(str, range(clips)), 0)
    while scheduler.get_num_unfinished_requests():
        scheduled = scheduler.schedule()
        if scheduled.total_num_scheduled_tokens:
            tokens.append(scheduled.total_num_scheduled_tokens)
            flying.append(scheduled)
            if len(flying) < 2:
                continue
        ran = flying.popleft()
        for name, count in ran.num_scheduled_tokens.items():
            computed[name] += count
        names = list(ran.num_scheduled_tokens)
        output = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=[[7] if computed[name] >= PROMPT else [] for name in names],
        )
        scheduler.update_from_output(ran, output)
    assert sum(tokens) == clips * PROMPT
    return tokens


def question(name: str) -> Request:
    place = PlaceholderRange(offset=10, length=CLIP)
    clip = MultiModalFeatureSpec(data=None, modality="video", identifier=name, mm_position=place)
    params = SamplingParams(max_tokens=1, ignore_eos=True)
    return Request(name, [3] * PROMPT, params, None, mm_features=[clip])


def test_batches_of_clips_are_full(config: VllmConfig) -> None:
    scheduler = config.scheduler_config
    assert scheduler.encoder_cache_size == 2 * BATCH  # by our hook
    *full, _ = batches(config, clips=40)
    assert min(full) > 0.9 * BATCH, full


def test_without_it_every_second_one_is_nearly_empty(config: VllmConfig) -> None:
    """Where vLLM no longer does this, `let_batches_overlap` can go."""
    scheduler = config.scheduler_config
    try:
        scheduler.encoder_cache_size = BATCH  # vLLM's
        *stock, _ = batches(config, clips=40)
        scheduler.async_scheduling = False
        let_batches_overlap(scheduler)
        assert scheduler.encoder_cache_size == BATCH
    finally:
        scheduler.async_scheduling = None
        let_batches_overlap(scheduler)
    assert sum(tokens < BATCH / 2 for tokens in stock) >= 2, stock
