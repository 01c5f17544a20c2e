"""The table of modalities: each row agrees with itself and with the geometry of latents."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vllm_cosmos3.checkpoint.config import read_config
from vllm_cosmos3.checkpoint.latents import token_count
from vllm_cosmos3.checkpoint.tensors import transformer_tensors
from vllm_cosmos3.generator.models.modalities import MODALITIES, adapters, timestep_conditioned
from vllm_cosmos3.generator.models.stored_modalities import adapter_weights
from vllm_cosmos3.generator.pipeline import _shapes
from vllm_cosmos3.generator.sampling.packing import start_stream
from vllm_cosmos3.request.plan import StreamPlan

PLANS = {
    "vision": StreamPlan(name="vision", shape=(1, 48, 3, 3, 5), rate=24.0, known=(0,)),
    "sound": StreamPlan(name="sound", shape=(64, 7), rate=25.0),
    "action": StreamPlan(name="action", shape=(4, 64), rate=24.0, known=(0,), channels=10),
}


@pytest.mark.parametrize("name", MODALITIES)
def test_a_row_agrees_with_itself(name: str, tiny_checkpoint_fp32: Path) -> None:
    config = read_config(tiny_checkpoint_fp32).transformer
    plan, patch = PLANS[name], config.latent_patch_size
    noise = torch.randn(plan.shape)
    mask = MODALITIES[name].denoise_mask(plan)
    stream = start_stream(
        name, noise=noise, clean_latent=torch.zeros(plan.shape), denoise_mask=mask
    )
    tokens = token_count(name, plan.shape, patch)
    known = len(plan.known) * tokens // plan.length
    assert int(timestep_conditioned(stream, patch).sum()) == tokens - known
    assert MODALITIES[name].positions(plan, 100.0, config).shape == (3, tokens)
    adapter = adapters(config, torch.float32)[name]
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter)
    x_SD = adapter.embed(stream.x, 1)
    assert x_SD.shape == (tokens, config.hidden_size)
    assert adapter.velocity(x_SD, plan.shape, 1).shape == plan.shape


def test_every_parameter_of_the_adapters_has_a_name_in_the_checkpoint(
    tiny_checkpoint_fp32: Path,
) -> None:
    config = read_config(tiny_checkpoint_fp32).transformer
    named = adapter_weights(config)
    parameters = dict(adapters(config, torch.float32).named_parameters(prefix="adapters"))
    assert sorted(named.values()) == sorted(parameters)
    assert named.keys() <= transformer_tensors(config).keys()


def test_noise_is_drawn_in_the_order_of_the_table() -> None:
    assert list(MODALITIES) == ["vision", "sound", "action"]
    assert list(_shapes([*reversed(PLANS.values()), PLANS["vision"]])) == list(MODALITIES)
