"""The allocator refuses inside a step: the request fails with a suggestion, and the next one works."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
from limits import HANG
from short_stage import EVERYWHERE, LAST_RANK, ShortPipeline

from vllm_cosmos3 import Cosmos3
from vllm_cosmos3.checkpoint.config import read_config
from vllm_cosmos3.engine_options import EngineConfig
from vllm_cosmos3.errors import OutOfMemory
from vllm_cosmos3.generator.pipeline import RequestState
from vllm_cosmos3.request.plan import Plan
from vllm_cosmos3.request.planner import make_plan
from vllm_cosmos3.request.prompts import load_tokenizer
from vllm_cosmos3.request.request import GenerateRequest
from vllm_cosmos3.stage import runners
from vllm_cosmos3.stage.client import StageClient
from vllm_cosmos3.stage.config import StageConfig

REQUEST = {"prompt": "A boat", "num_frames": 5, "size": "64x64", "num_inference_steps": 3}
WORDS = r"out of memory in .*Tried to allocate 2.00 GiB.*fewer frames or a smaller size"


def test_in_the_calling_process(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runners, "Pipeline", ShortPipeline)
    states: list[weakref.ref[object]] = []

    def stepping(pipeline: ShortPipeline, state: RequestState) -> None:
        states.append(weakref.ref(state.streams[0].x) if state.streams else weakref.ref(pipeline))
        original(pipeline, state)

    original = ShortPipeline.step
    monkeypatch.setattr(ShortPipeline, "step", stepping)
    with Cosmos3(tiny_checkpoint, device="cpu", enable_layerwise_offload=True) as model:
        before = model.generate(**REQUEST, seed=1).video
        states.clear()
        with pytest.raises(OutOfMemory, match=WORDS) as failed:
            model.generate(**REQUEST, seed=EVERYWHERE)
        assert failed.value.code == "out_of_memory"
        gc.collect()
        assert states[-1]() is None  # nothing holds the latents, though the error is still at hand
        assert np.array_equal(model.generate(**REQUEST, seed=1).video, before)


@pytest.mark.parametrize(
    ("seed", "grace", "restarts"), [(EVERYWHERE, HANG, 0), (LAST_RANK, 0.5, 1)]
)
def test_on_ranks(tiny_checkpoint_fp32: Path, seed: int, grace: float, restarts: int) -> None:
    """On all ranks, where they stay in step and go on, and on one, where they are replaced."""
    engine = EngineConfig(
        model=tiny_checkpoint_fp32,
        dtype="float32",
        ulysses_degree=2,
        und_residency="host",
        enable_layerwise_offload=True,
    )
    stage = StageConfig(engine=engine, stage="short_stage:ShortPipeline", grace=grace)
    client = StageClient(stage)
    try:
        client.wait_ready(HANG)
        before = client.submit(planned(tiny_checkpoint_fp32, 1)).result(HANG).video
        with pytest.raises(OutOfMemory, match=WORDS):
            client.submit(planned(tiny_checkpoint_fp32, seed)).result(HANG)
        again = client.submit(planned(tiny_checkpoint_fp32, 1)).result(HANG).video
        assert np.array_equal(again, before)
        assert client.status().restarts == restarts
    finally:
        client.close()


def planned(folder: Path, seed: int) -> Plan:
    request = GenerateRequest(**REQUEST, seed=seed)
    return make_plan(request, read_config(folder), load_tokenizer(folder))
