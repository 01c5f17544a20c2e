"""The decoded-media budget: what one request may hold, what all together, and that all comes back."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from vllm_cosmos3.errors import Busy, InvalidRequest
from vllm_cosmos3.media_budget import LIMIT, MediaBudget, media_budget

MIB = 2**20


def budget() -> MediaBudget:
    return MediaBudget(per_request=4 * MIB, total=8 * MIB)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    media_budget.cache_clear()
    yield monkeypatch
    media_budget.cache_clear()


def test_a_request_that_needs_too_much_is_refused_with_the_figure() -> None:
    pixels = budget()
    with pixels.lease() as lease:
        lease.reserve(3 * MIB, "image")
        with pytest.raises(InvalidRequest, match=r"edge.control is '2 MiB when decoded'.* at most 4 MiB") as refused:  # fmt: skip
            lease.reserve(2 * MIB, "edge.control")
        assert refused.value.code == "payload_too_large"
        assert pixels.used == 3 * MIB


def test_requests_that_need_too_much_together_are_asked_to_come_again() -> None:
    pixels = budget()
    with pixels.lease() as first, pixels.lease() as second, pixels.lease() as third:
        first.reserve(4 * MIB, "video")
        second.reserve(3 * MIB, "video")
        with pytest.raises(Busy, match=r"need 2 MiB .* hold 7 of 8"):
            third.reserve(2 * MIB, "video")
        second.release()
        third.reserve(2 * MIB, "video")


def test_everything_comes_back_also_after_an_error_and_only_once() -> None:
    pixels = budget()
    lease = pixels.lease()
    lease.reserve(MIB, "image")

    def decode() -> None:
        with lease, lease.during(2 * MIB, "image"):
            assert pixels.used == 3 * MIB
            raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"):
        decode()
    lease.release()
    assert pixels.used == 0


def test_threads_never_hold_more_than_the_total() -> None:
    pixels, most = MediaBudget(per_request=MIB, total=3 * MIB), []

    def decode() -> None:
        for _ in range(200):
            with pixels.lease() as lease:
                try:
                    lease.reserve(MIB, "image")
                except Busy:
                    continue
                most.append(pixels.used)

    threads = [threading.Thread(target=decode) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) <= 3 * MIB
    assert pixels.used == 0


def test_the_operator_sets_the_size(environment: pytest.MonkeyPatch) -> None:
    environment.setenv(LIMIT, "0.5")
    assert media_budget().total == 2**29
    assert media_budget().per_request == 2**28
    assert media_budget() is media_budget()


@pytest.mark.parametrize("text", ["0", "-1", "much", "nan", "inf", ""])
def test_a_size_that_is_none_is_named(environment: pytest.MonkeyPatch, text: str) -> None:
    environment.setenv(LIMIT, text)
    with pytest.raises(InvalidRequest, match=LIMIT):
        media_budget()
