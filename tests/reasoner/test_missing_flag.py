"""What the plugin says at the start of a stock ``vllm serve`` that lacks a flag."""

from __future__ import annotations

import pytest

from vllm_cosmos3.compat import has_serve_flag
from vllm_cosmos3.reasoner.startup import TRUST, missing_flag


@pytest.mark.parametrize(
    ("argv", "lacks"),
    [
        (["/bin/vllm", "serve", "nvidia/Cosmos3-Nano"], True),
        (["/bin/vllm", "serve", "nvidia/Cosmos3-Nano", "--trust_request_mm_kwargs"], False),
        (["/bin/vllm", "bench", "serve"], False),
        (["script.py", "serve"], False),
    ],
)
def test_a_flag_that_video_options_need(argv: list[str], lacks: bool) -> None:
    advice = missing_flag(argv)
    assert (advice is not None) == (lacks and has_serve_flag(TRUST.removeprefix("--")))
    assert advice is None or "add that flag, or start with vllm-cosmos3 serve" in advice
