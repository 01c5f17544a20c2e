"""Presets: what each comes to for a checkpoint, and what an operator can forbid or force."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vllm_cosmos3.checkpoint.config import ModelConfig, read_config
from vllm_cosmos3.checkpoint.synthetic import write_checkpoint
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.request.parameters import prompt_parameters
from vllm_cosmos3.request.presets import PresetRule
from vllm_cosmos3.request.request import GenerateRequest


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelConfig]:
    found = {}
    for name, options in {
        "base": {},
        "fp8": {"quantization": "fp8"},
        "distilled": {"kind": "distilled-t2i"},
    }.items():
        folder = tmp_path_factory.mktemp("presets") / name
        write_checkpoint(folder, weights=False, **options)
        found[name] = read_config(folder)
    return found


IMAGE, VIDEO = {"num_frames": 1}, {"num_frames": 9}
INTERVAL = (400.0, 1000.0)


@pytest.mark.parametrize(
    ("model", "fields", "expected"),
    [
        ("base", VIDEO, ("exact", "none", None)),
        ("base", VIDEO | {"preset": "exact"}, ("exact", "none", None)),
        ("base", VIDEO | {"preset": "high"}, ("high", "none", None)),
        ("base", VIDEO | {"preset": "fast"}, ("fast", "sea", None)),
        ("base", IMAGE | {"preset": "exact"}, ("exact", "none", None)),
        ("base", IMAGE | {"preset": "high"}, ("high", "none", INTERVAL)),
        ("base", IMAGE | {"preset": "fast"}, ("fast", "sea", INTERVAL)),
        ("base", VIDEO | {"step_cache": "sea"}, (None, "sea", None)),
        ("base", VIDEO | {"preset": "high", "step_cache": "sea"}, ("high", "sea", None)),
        ("base", VIDEO | {"preset": "fast", "step_cache": "none"}, ("fast", "none", None)),
        ("base", IMAGE | {"preset": "fast", "guidance_interval": (0, 9)}, ("fast", "sea", (0.0, 9.0))),
        ("fp8", VIDEO, (None, "none", None)),
        ("fp8", VIDEO | {"preset": "fast"}, ("fast", "sea", None)),
        ("distilled", IMAGE | {"preset": "fast"}, ("fast", "none", None)),
    ],
)  # fmt: skip
def test_what_a_preset_comes_to(
    models: dict[str, ModelConfig], model: str, fields: dict[str, Any], expected: Any
) -> None:
    made = prompt_parameters(GenerateRequest(prompt="x", **fields), models[model])
    assert (made.preset, made.step_cache, made.guidance_interval) == expected


def test_numbers_of_the_cache_count_under_a_preset(models: dict[str, ModelConfig]) -> None:
    fields = {"preset": "fast", "step_cache_threshold": 0.5}
    made = prompt_parameters(GenerateRequest(prompt="x", **fields), models["base"])
    assert made.step_cache_threshold == 0.5
    assert not [text for text in made.warnings if "step_cache" in text]


@pytest.mark.parametrize(
    ("model", "fields", "words"),
    [
        ("fp8", {"preset": "exact"}, "preset is 'exact', must be high or fast, or left out"),
        ("base", {"preset": "exact", "step_cache": "sea"}, "step_cache is 'sea', must be none"),
    ],
)
def test_exact_is_exact(
    models: dict[str, ModelConfig], model: str, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidRequest, match=words):
        prompt_parameters(GenerateRequest(prompt="x", **fields), models[model])


@pytest.mark.parametrize(
    ("options", "fields", "expected"),
    [
        (("", ""), {}, None),
        (("", ""), {"preset": "fast"}, "fast"),
        (("high", ""), {}, "high"),
        (("high", ""), {"preset": "exact"}, "exact"),
        (("", "exact"), {}, "exact"),  # the only one is the default
        (("", "fast, high"), {}, "fast"),
        (("fast", "fast"), {"step_cache_threshold": 0.1}, "fast"),
    ],
)
def test_the_operators_default(
    options: tuple[str, str], fields: dict[str, Any], expected: str | None
) -> None:
    assert PresetRule.read(*options).applied(fields).get("preset") == expected


@pytest.mark.parametrize(
    ("options", "fields", "words"),
    [
        (("", "exact"), {"preset": "fast"}, "preset is 'fast', must be exact, which the operator"),
        (("", "exact"), {"step_cache": "sea"}, "step_cache is 'sea', must be left out"),
        (("", "fast"), {"step_cache": "none"}, "step_cache is 'none', must be left out"),
        (("fast", "exact,high"), {}, "preset is 'fast', must be one of presets: exact, high"),
        (("", "best"), {}, "presets is 'best', must be names joined by commas"),
    ],
)
def test_what_the_operator_forbids(
    options: tuple[str, str], fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidRequest, match=words):
        PresetRule.read(*options).applied(fields)


def test_an_answer_says_its_preset(tiny_checkpoint_fp32: Path) -> None:
    from vllm_cosmos3 import Cosmos3

    with Cosmos3(tiny_checkpoint_fp32, dtype="float32", device="cpu") as model:
        made = model.generate(
            prompt="x", size="64x64", num_frames=5, num_inference_steps=6, preset="fast",
            step_cache_threshold=2.0, output_type="latent", seed=1,
        )  # fmt: skip
    assert made.effective["preset"] == "fast"
    assert made.effective["step_cache"] == "sea"
    assert made.effective["quantization"] is None
    assert made.reused_steps == 3
