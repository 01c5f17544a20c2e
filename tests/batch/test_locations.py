"""Paths and URLs: how they are joined, and that secrets of a URL are never shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_cosmos3.batch.locations import fetch, is_url, joined, reason_of, redacted, shown
from vllm_cosmos3.errors import InvalidRequest


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("s3://bucket/a.png", True),
        ("HTTPS://example.com/a", True),
        ("hf://datasets/a/b/c.jsonl", True),
        ("C://a", False),
        ("a boat", False),
        (3, False),
    ],
)
def test_what_is_a_url(text: object, url: bool) -> None:
    assert is_url(text) is url


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://me:word@host:80/a b.png?sig=secret#x", "https://host:80/a b.png"),
        ("s3://bucket/a.png?versionId=3", "s3://bucket/a.png"),
        ("hf://datasets/me/set@main/a.jsonl", "hf://datasets/me/set@main/a.jsonl"),
        ("/a?b.png", "/a?b.png"),
    ],
)
def test_what_is_shown_of_a_url(url: str, words: str) -> None:
    assert shown(url) == words


def test_secrets_are_redacted_wherever_they_are() -> None:
    value = {"a": ["see https://me:word@host/x?key=1, then", 3], "b": None}
    assert redacted(value) == {"a": ["see https://host/x then", 3], "b": None}
    error = OSError("cannot reach 'https://host/x?key=1'")
    assert reason_of(error) == "cannot reach 'https://host/x'"


@pytest.mark.parametrize(
    ("folder", "name", "place"),
    [
        (Path("/in"), "a/b.png", "/in/a/b.png"),
        (Path("/in"), "/c.png", "/c.png"),
        (Path("/in"), "s3://bucket/c.png", "s3://bucket/c.png"),
        ("s3://bucket/in", "../b.png", "s3://bucket/b.png"),
        ("memory://in", "b.png", "memory://in/b.png"),
        ("s3://bucket/in", "/c.png", "/c.png"),
    ],
)
def test_files_are_seen_from_their_folder(folder: Path | str, name: str, place: str) -> None:
    assert joined(folder, name) == place


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("memory://none/a.png?key=secret", "no such file"),
        ("http://127.0.0.1:9/a.png?key=secret", "Connect"),
        ("oci://bucket/a.png?key=secret", "nstall"),
    ],
)
def test_what_cannot_be_fetched_says_why(url: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=reason) as raised:
        fetch("image", url, tmp_path / "a")
    assert "secret" not in str(raised.value)
    assert raised.value.code == "fetch_failed"
