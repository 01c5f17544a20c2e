"""Device placement of replicas: the devices of each, and its part of those that several share."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_cosmos3.engine import device_indices
from vllm_cosmos3.engine_options import EngineConfig
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.stage.placement import (
    Placement,
    max_replicas_per_device,
    parse_devices,
    placements_of,
    visible_devices,
)

GIB = 2**30


def engine(replicas: int, ranks: int = 1, **options: Any) -> EngineConfig:
    return EngineConfig(
        model=Path("/"), device="cuda", data_parallel_size=replicas, ulysses_degree=ranks, **options
    )


def placements(listed: str, *args: Any, memory: int | None = 80 * GIB, **options: Any) -> list[Any]:
    found = placements_of(
        engine(*args, **options), parse_devices(listed), memory, field="generator_devices"
    )
    return [(placement.devices, placement.memory_limit) for placement in found]


@pytest.mark.parametrize(
    ("listed", "replicas", "ranks", "expected"),
    [
        ("0,1,2,3,4,5", 3, 2, [("0,1", None), ("2,3", None), ("4,5", None)]),
        ("3, 4,5,6,7", 2, 2, [("3,4", None), ("5,6", None)]),
        ("0,0", 2, 1, [("0", 40), ("0", 40)]),
        ("0,1,1,0", 2, 2, [("0,1", 40), ("1,0", 40)]),
        ("0,0,0,1", 4, 1, [("0", 80 / 3)] * 3 + [("1", None)]),
        ("0,1,1,2", 2, 2, [("0,1", 40), ("1,2", 40)]),
        ("GPU-a,GPU-a", 2, 1, [("GPU-a", 40), ("GPU-a", 40)]),
    ],
)
def test_replicas_take_the_devices_in_their_order(
    listed: str, replicas: int, ranks: int, expected: list[Any]
) -> None:
    assert placements(listed, replicas, ranks) == expected


@pytest.mark.parametrize(
    ("listed", "replicas", "ranks", "words"),
    [
        ("0,0", 1, 2, "generator_devices is '0,0', must be different devices for the 2 ranks"),
        ("0,1,2,2", 2, 2, "must be different devices for the 2 ranks of each replica"),
        ("0,0,1", 2, 1, "must be different devices, or 2, one for each rank of each replica"),
        ("0,0", 1, 1, "must be different devices, or 1, one for each rank of each replica"),
        ("0,0,0", 4, 1, "data_parallel_size is 4, must be at most 3: 3 devices, 1 for each"),
        ("0,1,0,1,0,1,2", 4, 2, "data_parallel_size is 4, must be at most 3: 7 devices, 2 for"),
    ],
)
def test_impossible_placements_are_refused(
    listed: str, replicas: int, ranks: int, words: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        placements(listed, replicas, ranks)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("option", "fits", "words"),
    [
        ("memory_limit", 26.66, "memory_limit is 26.67 GiB, must be at most 26.66 GiB, as 3 "),
        ("gpu_memory_utilization", 0.33, "gpu_memory_utilization is 0.34, must be at most 0.33"),
    ],
)
def test_limits_of_those_that_share_a_device_fit_into_it(
    option: str, fits: float, words: str
) -> None:
    listed = "0,1,1,1"
    assert {limit for _, limit in placements(listed, 4, **{option: fits})} == {None}  # as it says
    assert placements("0,1", 2, **{option: fits * 2})  # nobody shares
    with pytest.raises(InvalidRequest) as refused:
        placements(listed, 4, **{option: round(fits + 0.01, 2)})
    assert words.replace(" GiB, must", ", must") in str(refused.value)


@given(
    replicas=st.integers(1, 6),
    ranks=st.sampled_from([1, 2, 4]),
    names=st.lists(st.sampled_from("01234567"), min_size=1, max_size=24),
    memory=st.integers(8, 200),
)
def test_what_is_assigned_fits_on_every_device(
    replicas: int, ranks: int, names: list[str], memory: int
) -> None:
    try:
        found = placements_of(engine(replicas, ranks), names, memory * GIB, field="device")
    except InvalidRequest:
        assigned = [names[at * ranks : (at + 1) * ranks] for at in range(replicas)]
        twice = any(len(set(devices)) < ranks for devices in assigned)
        left = len(names) > replicas * ranks and len(set(names)) < len(names)
        assert twice or left or (replicas > 1 and len(names) < replicas * ranks)
        return
    used: Counter[str] = Counter()
    shared: Counter[str] = Counter()
    for placement in found:
        assert len(set(placement.device_names())) == len(placement.device_names())
        for name in placement.device_names():
            shared[name] += 1
            used[name] += memory if placement.memory_limit is None else placement.memory_limit  # type: ignore[assignment]
    assert all(part <= memory or math.isclose(part, memory) for part in used.values())
    assert max_replicas_per_device(found, list(used)) == max(shared.values())


def test_replicas_are_counted_by_device() -> None:
    found = [Placement(devices="0,1"), Placement(devices="1,2"), Placement(devices="1,3")]
    assert [max_replicas_per_device(found, [name]) for name in "01234"] == [1, 3, 1, 1, 0]
    assert max_replicas_per_device(found, ["4", "0"]) == 1
    assert max_replicas_per_device([Placement()], ["0"]) == 0


def test_devices_are_called_as_the_environment_has_them() -> None:
    assert visible_devices(2, {}) == visible_devices(2, {"CUDA_VISIBLE_DEVICES": ""}) == ["0", "1"]
    assert visible_devices(2, {"CUDA_VISIBLE_DEVICES": "7, 3"}) == ["7", "3"]


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (None, (None, ())),
        ("cuda:1", ("cuda:1", ())),
        ("cuda:0,0,1", ("cuda", (0, 0, 1))),
        ("cuda:0,x", ("cuda:0,x", ())),
    ],
)
def test_indices_of_devices(device: str | None, expected: Any) -> None:
    assert device_indices(device) == expected
