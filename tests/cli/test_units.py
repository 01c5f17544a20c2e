"""Units of flags: what people write, and what it means."""

from __future__ import annotations

import argparse

import pytest

from vllm_cosmos3.cli.flags import add_server_flag
from vllm_cosmos3.cli.units import bytes_of, gib_of, seconds_of, shown_bytes, shown_seconds
from vllm_cosmos3.server.options import OPTIONS


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("100GiB", 100 * 2**30), ("100 gib", 100 * 2**30), ("1.5G", 1_500_000_000), ("7", 7),
        ("2KB", 2000), ("512MiB", 2**29), ("many", "many"), ("1..5G", "1..5G"), ("-1", "-1"),
    ],
)  # fmt: skip
def test_bytes(text: str, size: object) -> None:
    assert bytes_of(text) == size


@pytest.mark.parametrize(
    ("text", "size"), [("40", 40.0), ("40GiB", 40.0), ("512MiB", 0.5), ("0.25", 0.25), ("x", "x")]
)
def test_gib(text: str, size: object) -> None:
    assert gib_of(text) == size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("600", 600.0), ("10m", 600.0), ("1h30m", 5400.0), ("2d", 172_800.0), ("250ms", 0.25),
     ("1.5", 1.5), ("soon", "soon"), ("10m ago", "10m ago")],
)  # fmt: skip
def test_seconds(text: str, seconds: object) -> None:
    assert seconds_of(text) == seconds


def test_a_number_is_shown_as_it_can_be_written() -> None:
    for size in (100 * 2**30, 512 * 2**20, 1000):
        assert bytes_of(shown_bytes(size)) == size
    for seconds in (86_400.0, 604_800.0, 600.0, 30.0):
        assert seconds_of(shown_seconds(seconds)) == seconds


def test_flags_of_the_server_take_them() -> None:
    parser = argparse.ArgumentParser()
    for name in ("storage_quota", "file_ttl", "memory_limit"):
        _, spec, default = OPTIONS[name]
        add_server_flag(parser, name, spec, default)
    args = parser.parse_args(
        ["--storage-quota", "100GiB", "--file-ttl", "2d", "--memory-limit", "40GiB"]
    )
    assert (args.storage_quota, args.file_ttl, args.memory_limit) == (100 * 2**30, 172_800.0, 40.0)
    text = parser.format_help()
    assert "(default: 100GiB)" in text
    assert "(default: 1d)" in text
