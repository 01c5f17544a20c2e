"""Whole requests to Edge and to its policy against Cosmos3OmniPipeline of diffusers, float32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Cosmos3OmniPipeline, UniPCMultistepScheduler
from oracles import edge
from safetensors.torch import load_file
from test_action_runs import Case as ActionCase
from test_action_runs import assert_close
from test_action_runs import fields as action_fields
from test_action_runs import reference as action_reference
from test_full_runs import BOUND, CASES, fields, furthest, reference, source

from vllm_cosmos3.engine import Cosmos3
from vllm_cosmos3.engine_options import EngineConfig, ParallelConfig
from vllm_cosmos3.generator import prediction
from vllm_cosmos3.generator.pipeline import Pipeline
from vllm_cosmos3.parallel.mesh import close_mesh, init_mesh
from vllm_cosmos3.request.planner import make_plan
from vllm_cosmos3.request.request import from_fields

pytestmark = pytest.mark.parity

EDGE_CASES = {
    name: CASES[name]
    for name in ("four steps", "image", "image-to-video", "video-to-video", "odd latent size")
}
ACTIONS = {
    "forward dynamics": ActionCase(mode="forward_dynamics", domain="av"),
    "inverse dynamics": ActionCase(mode="inverse_dynamics", domain="umi", fps=20),
    "policy": ActionCase(mode="policy", domain="droid_lerobot", guidance=3.0, steps=4),
}


@pytest.fixture(scope="module")
def ours(tiny_edge_fp32: Path) -> Iterator[Cosmos3]:
    with Cosmos3(tiny_edge_fp32, dtype="float32", device="cpu") as model:
        yield model


@pytest.fixture(scope="module")
def oracle(tiny_edge_fp32: Path) -> Cosmos3OmniPipeline:
    return edge(tiny_edge_fp32)


@pytest.mark.parametrize("name", EDGE_CASES)
def test_final_latents(oracle: Cosmos3OmniPipeline, ours: Cosmos3, name: str) -> None:
    case, seed = EDGE_CASES[name], 11
    given = source(case, 1)
    mine = ours.generate(**fields(oracle, case), **given, seed=seed, noise="torch").latents
    assert furthest(mine, reference(oracle, case, seed, given)) <= BOUND


@pytest.mark.parametrize("name", ACTIONS)
def test_actions(oracle: Cosmos3OmniPipeline, ours: Cosmos3, name: str) -> None:
    case = ACTIONS[name]
    oracle.video_processor.register_to_config(do_resize=False)
    mine = ours.generate(**action_fields(case), flow_shift=10.0)
    video, action = action_reference(oracle, case)
    assert_close(mine.latents["vision"], video)
    if case.mode != "forward_dynamics":
        assert_close(mine.action, action)


def test_prompts_are_framed_as_the_checkpoint_does(
    oracle: Cosmos3OmniPipeline, ours: Cosmos3
) -> None:
    """Nemotron's template opens the thoughts of the answer, and there is no system prompt."""
    case = replace(EDGE_CASES["four steps"], steps=1)
    request = fields(oracle, case)
    ids = request.pop("prompt_token_ids")
    request.pop("negative_prompt_token_ids")
    words = {"prompt": "A paper boat floats down a stream", "negative_prompt": "blurry, shaky"}
    effective = ours.plan(**request, **words).effective
    assert effective["prompt_tokens"][0] == len(ids)


def test_the_second_keys_are_what_the_generator_sees(
    oracle: Cosmos3OmniPipeline, ours: Cosmos3, tiny_edge_fp32: Path
) -> None:
    """Swapping those norms must be far beyond the bound: it is they that are compared."""
    name = "layers.1.self_attn.k_norm_und_for_gen.weight"
    stored = {
        key: value
        for file in (tiny_edge_fp32 / "transformer").glob("*.safetensors")
        for key, value in load_file(file).items()
    }
    norm = oracle.transformer.layers[1].self_attn.k_norm_und_for_gen
    assert torch.equal(norm.weight, stored[name])
    case = EDGE_CASES["four steps"]
    request = fields(oracle, case)
    mine = ours.generate(**request, seed=3, noise="torch").latents
    with torch.no_grad():
        norm.weight.mul_(-1)
        try:
            assert furthest(mine, reference(oracle, case, 3, {})) > 100 * BOUND
        finally:
            norm.weight.mul_(-1)


POLICY = ActionCase(mode="policy", domain="droid_lerobot", fps=15)
LEFT_OUT = ("num_inference_steps", "guidance_scale")  # for the defaults of the policy


def test_the_policy_with_its_defaults(
    oracle: Cosmos3OmniPipeline, tiny_edge_fp32: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four steps, of which the first is guided: five forwards on both sides, and the same actions."""
    mesh = init_mesh(ParallelConfig())
    try:
        config = EngineConfig(
            model=tiny_edge_fp32, dtype="float32", checkpoint_kind="edge-policy-droid"
        )
        pipeline = Pipeline.load(config, mesh, "cpu")
    finally:
        close_mesh(mesh)
    monkeypatch.setattr(prediction, "JOINED_TOKENS", 0)  # one forward for each branch
    ours, theirs = [], []
    pipeline.transformer.register_forward_hook(lambda *_: ours.append(1))
    hook = oracle.transformer.register_forward_hook(lambda *_: theirs.append(1))
    asked = {k: v for k, v in action_fields(POLICY).items() if k not in LEFT_OUT}
    state = pipeline.encode(make_plan(from_fields(asked), pipeline.model, pipeline.tokenizer))
    while not state.done:
        pipeline.step(state)
    pipeline.decode(state)
    mine = pipeline.finish(state).samples[0]

    def unguided(pipe: Any, *_: Any) -> dict[str, Any]:
        pipe._guidance_scale = 1.0  # from the second step on
        return {}

    usual = oracle.scheduler
    oracle.scheduler = UniPCMultistepScheduler.from_config(usual.config, flow_shift=5.0)
    case = replace(POLICY, steps=4, guidance=3.0)
    try:
        video, action = action_reference(oracle, case, callback_on_step_end=unguided)
    finally:
        oracle.scheduler = usual
        hook.remove()
    assert (len(ours), len(theirs)) == (5, 5)
    assert mine.latents is not None
    assert_close(mine.latents["vision"], video)
    assert action is not None
    assert_close(np.asarray(mine.action), action)
