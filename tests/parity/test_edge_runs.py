"""Whole requests to Edge against Cosmos3OmniPipeline of diffusers, float32: every mode that Edge has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import Cosmos3OmniPipeline
from oracles import edge
from safetensors.torch import load_file
from test_action_runs import Case as ActionCase
from test_action_runs import assert_close
from test_action_runs import fields as action_fields
from test_action_runs import reference as action_reference
from test_full_runs import BOUND, CASES, fields, furthest, reference, source

from vllm_cosmos3.engine import Cosmos3

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
