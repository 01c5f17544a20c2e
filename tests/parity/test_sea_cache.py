"""SeaCache against the hook of diffusers: the same steps are reused, and the latents are equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Cosmos3OmniPipeline, SeaCacheConfig
from diffusers.hooks.sea_cache import SeaCacheRootHook
from oracles import guided
from test_full_runs import BOUND, Case, fields, furthest, reference, source

from vllm_cosmos3.engine import Cosmos3
from vllm_cosmos3.generator.sampling.step_cache import Reuse

pytestmark = pytest.mark.parity

CASES = {
    "video": Case(steps=20),
    "odd latent size with sound": Case(steps=12, height=80, width=112, sound=True),
    "image-to-video": Case(steps=12, source="image"),
    "video-to-video": Case(steps=12, source="video", frames=13),
    "no guidance": Case(steps=12, guidance=1.0),
    "image": Case(steps=12, frames=1),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "order 0": {"residual_order": 0},
    "many in a row": {"threshold": 2.0, "max_consecutive_cached": 5},
    "small": {"threshold": 0.1},
}
OURS = {
    "threshold": "step_cache_threshold",
    "residual_order": "step_cache_order",
    "max_consecutive_cached": "step_cache_max_reused",
}


@pytest.fixture(scope="module")
def oracle(tiny_checkpoint_fp32: Path) -> Cosmos3OmniPipeline:
    return guided(tiny_checkpoint_fp32)


@pytest.mark.parametrize(
    ("name", "setting"),
    [*((name, "default") for name in CASES), *(("video", setting) for setting in SETTINGS if setting != "default")],
)  # fmt: skip
def test_steps_and_latents(
    oracle: Cosmos3OmniPipeline,
    ours: Cosmos3,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    setting: str,
) -> None:
    case, given = CASES[name], source(CASES[name], 1)
    theirs, mine = [], []
    prepare, decide = SeaCacheRootHook.prepare_decoder_stack, Reuse.decide

    def prepared(self: Any, *arguments: Any) -> Any:
        made = prepare(self, *arguments)
        theirs.append(made[2])
        return made

    def decided(self: Reuse, index: int, sigma: float, latents: Any, groups: Any) -> Any:
        made = decide(self, index, sigma, latents, groups)
        mine.extend(branch not in made for group in groups for branch in group)
        return made

    monkeypatch.setattr(SeaCacheRootHook, "prepare_decoder_stack", prepared)
    monkeypatch.setattr(Reuse, "decide", decided)
    oracle.transformer.enable_cache(SeaCacheConfig(**SETTINGS[setting]))
    try:
        expected = reference(oracle, case, 11, given)
    finally:
        oracle.transformer.disable_cache()
    chosen = {OURS[key]: value for key, value in SETTINGS[setting].items()}
    output = ours.generate(
        **fields(oracle, case), **given, **chosen, seed=11, noise="torch", step_cache="sea"
    )
    assert mine == theirs
    assert 0 < output.reused_steps == case.steps - sum(theirs[:: 2 if case.guidance != 1 else 1])
    assert furthest(output.latents, expected) <= BOUND
    exact = ours.generate(**fields(oracle, case), **given, seed=11, noise="torch").latents
    assert furthest(output.latents, exact) > BOUND


def test_torch_is_the_same_filter() -> None:
    """Bit by bit, as a decision may hang on the last one."""
    from diffusers.hooks.sea_cache import _apply_sea_filter

    from vllm_cosmos3.generator.sampling.step_cache import filtered

    for index, sigma in enumerate((1.0, 0.999, 0.5, 0.01)):
        x = torch.randn(1, 48, 3, 5, 7, generator=torch.Generator().manual_seed(index))
        theirs = _apply_sea_filter(x[0].movedim(0, -1), sigma, 3.0)
        assert torch.equal(filtered(x, sigma), theirs)
