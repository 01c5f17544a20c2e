"""Where a value comes from: what the checkpoint's files say, and what this package says for them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from vllm_cosmos3.checkpoint.config import read_config
from vllm_cosmos3.request.planner import make_plan
from vllm_cosmos3.request.prompts import load_tokenizer
from vllm_cosmos3.request.request import GenerateRequest
from vllm_cosmos3.server.jobs.value_sources import sources


@pytest.mark.parametrize(
    ("files", "fields", "source"),
    [
        ((), {}, "default"),
        (("negative_prompt.json",), {}, "checkpoint"),
        (("negative_prompt_i2v.json",), {}, "default"),  # not for a video without a first frame
        (("negative_prompt.json",), {"negative_prompt": "rain"}, "request"),
        (("negative_prompt.json",), {"num_frames": 1}, "default"),  # an image has none
    ],
)
def test_the_negative_prompt(
    files: tuple[str, ...],
    fields: dict[str, object],
    source: str,
    tiny_checkpoint: Path,
    tmp_path: Path,
) -> None:
    shutil.copytree(
        tiny_checkpoint, tmp_path / "c", ignore=shutil.ignore_patterns("*.safetensors", "assets")
    )
    (tmp_path / "c" / "assets").mkdir()
    for name in files:
        (tmp_path / "c" / "assets" / name).write_text('{"description": "fog"}')
    model = read_config(tmp_path / "c")
    plan = make_plan(GenerateRequest(prompt="a boat", **fields), model, load_tokenizer(model.path))
    found = sources(fields, plan.effective, model, upsampled=False)
    assert found["negative_prompt"] == source
