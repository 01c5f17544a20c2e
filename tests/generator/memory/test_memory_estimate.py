"""The estimates against recorded measurements of a GPU, and against each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_cosmos3.checkpoint.config import ModelConfig
from vllm_cosmos3.cli.plan import known_model
from vllm_cosmos3.engine_options import EngineConfig
from vllm_cosmos3.errors import OutOfMemory
from vllm_cosmos3.generator.memory import (
    Work,
    check_weights,
    estimate,
    resolve_residency,
    suggestions,
)

GIB = 2**30
NANO = known_model("nano", None)
SUPER = known_model("super", None)
ENGINE = EngineConfig(model=Path("/"), device="cuda", und_residency="gpu")


def work(size: str, frames: int, text: tuple[int, ...] = (512, 512)) -> Work:
    width, height = (int(n) // 16 for n in size.split("x"))
    shape = (1, 48, 1 + (frames - 1) // 4, height, width)
    return Work(streams=(("vision", shape),), text=text, branches=len(text))


RECORDED = [  # docs/numbers.md, "Generator, Nano size, one GPU": random weights on an H100
    ("320x192", 1, (48, 29), 30.7),
    ("1280x720", 1, (49, 30), 33.8),
    ("320x192", 189, (66, 1904), 31.0),
    ("832x480", 189, (66, 1904), 33.3),
    ("1280x720", 189, (512, 512), 37.6),
]


@pytest.mark.parametrize(("size", "frames", "text", "gib"), RECORDED)
def test_the_plan_of_nano_is_what_a_gpu_measured(
    size: str, frames: int, text: tuple[int, ...], gib: float
) -> None:
    engine = replace(ENGINE, load_format="dummy")
    planned = estimate(NANO, engine, work(size, frames, text)).peak / GIB
    assert abs(planned - gib) <= 0.05 * gib


HOST, STREAMED = {"und_residency": "host"}, {"enable_layerwise_offload": True}
PHASES = [  # docs/numbers.md, "Memory, Nano size, one GPU": start, text, denoise, decode
    ({}, 1, (30.66, 30.10, 30.25, 33.83)),
    ({}, 189, (30.66, 30.13, 35.12, 36.40)),
    (HOST, 1, (16.94, 17.75, 16.50, 20.08)),
    (HOST, 189, (16.94, 17.77, 21.36, 22.64)),
    (STREAMED, 1, (17.75, 17.17, 18.03, 20.90)),
    (STREAMED, 189, (17.75, 17.19, 22.90, 23.46)),
    (HOST | STREAMED, 1, (4.00, 4.81, 4.27, 7.13)),
    (HOST | STREAMED, 189, (4.00, 4.83, 9.14, 9.70)),
]


@pytest.mark.parametrize(("placement", "frames", "gib"), PHASES)
def test_every_phase_is_near_what_a_gpu_measured(
    placement: dict[str, Any], frames: int, gib: tuple[float, ...]
) -> None:
    engine = replace(ENGINE, load_format="dummy", **placement)
    memory = estimate(NANO, engine, work("1280x720", frames))
    phases = [memory.resident + memory.phases[name] for name in ("text", "denoise", "decode")]
    for measured, planned in zip(gib, (memory.loading, *phases), strict=True):
        assert abs(planned / GIB - measured) <= 0.04 * measured


SHAPES = st.builds(
    work,
    st.sampled_from(["320x192", "832x480", "720x1280"]),
    st.integers(0, 50).map(lambda k: 4 * k + 1),
    st.lists(st.integers(1, 4096), min_size=1, max_size=2).map(tuple),
)


@settings(max_examples=30, deadline=None)
@given(
    shape=SHAPES,
    model=st.sampled_from([NANO, SUPER]),
    field=st.sampled_from(["tensor_parallel_size", "ulysses_degree"]),
)
def test_more_ranks_need_less(shape: Work, model: ModelConfig, field: str) -> None:
    peaks = [estimate(model, replace(ENGINE, **{field: n}), shape).peak for n in (1, 2, 4)]
    assert peaks == sorted(peaks, reverse=True)


@settings(max_examples=30, deadline=None)
@given(shape=SHAPES, model=st.sampled_from([NANO, SUPER]))
def test_what_rests_on_the_host_is_not_on_the_device(shape: Work, model: ModelConfig) -> None:
    plain = estimate(model, ENGINE, shape)
    text = estimate(model, replace(ENGINE, und_residency="host"), shape)
    both = estimate(
        model, replace(ENGINE, und_residency="host", enable_layerwise_offload=True), shape
    )
    assert both.peak < text.peak < plain.peak
    for memory in (plain, text, both):
        assert memory.resident + sum(memory.host.values()) == plain.resident
        assert 0 < memory.held < memory.request


def test_auto_moves_the_text_tower_only_where_it_must() -> None:
    engine, shape = replace(ENGINE, und_residency="auto"), work("1280x720", 189)
    assert resolve_residency(NANO, engine, shape, 80 * GIB).und_residency == "gpu"
    assert resolve_residency(NANO, engine, shape, 36 * GIB).und_residency == "host"
    assert resolve_residency(NANO, engine, shape, None).und_residency == "gpu"
    assert resolve_residency(NANO, ENGINE, shape, 1).und_residency == "gpu"  # the user's word


def test_weights_that_do_not_fit_are_told_with_what_would() -> None:
    shape = work("1280x720", 189)
    check_weights(SUPER, ENGINE, shape, None)
    check_weights(NANO, ENGINE, shape, 32 * GIB)
    with pytest.raises(OutOfMemory, match=r"12\d.* GiB.* start with --und-residency host$"):
        check_weights(SUPER, ENGINE, shape, 80 * GIB)


def test_suggestions_fit_and_name_flags() -> None:
    shape = work("1280x720", 189)
    found = dict(suggestions(NANO, ENGINE, shape, 24 * GIB))
    assert max(found.values()) <= 24 * GIB
    assert "--und-residency host --enable-layerwise-offload" in found
    assert suggestions(SUPER, ENGINE, shape, GIB) == []
