"""The soak of damaged files in small."""

from __future__ import annotations

from soak_files import damaged, problems, readers, whole

from vllm_cosmos3.errors import InvalidRequest


def test_damaged_files_are_read_or_refused_and_keep_nothing() -> None:
    assert not problems(range(60))


def test_undamaged_files_are_read() -> None:
    """By both surfaces: else nothing would be tested. Bare streams are read by chat alone."""
    for data in whole():
        pictures = ("read_image", "picture of chat")
        clips = (
            ("clip of chat",)
            if data[:4] == bytes((0, 0, 0, 1))
            else ("first frames", "clip of chat")
        )
        for name in clips if _is_clip(data) else pictures:
            readers()[name](data)


def _is_clip(data: bytes) -> bool:
    try:
        return bool(readers()["is_clip"](data))
    except InvalidRequest:
        return True


def test_files_are_made_again() -> None:
    assert damaged(7) == damaged(7) != damaged(8)
