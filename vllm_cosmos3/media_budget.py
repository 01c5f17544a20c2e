"""Decoded-media budget: bytes of pixels that one request, and all requests together, may hold.

A few kilobytes of a picture or clip can stand for gigabytes of pixels, so whoever decodes reserves
the bytes first. Both surfaces share the budget of their process: the generator's planner, and the
reasoner's loaders in the API process of vLLM.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from vllm_cosmos3.errors import Busy, InvalidRequest

LIMIT = "VLLM_COSMOS3_MAX_MEDIA_GIB"  # the operator's, in the environment
DEFAULT_GIB = 8.0  # of all requests at once; one request may hold half of it
GIB = 2**30


class MediaBudget:
    """Bytes of decoded media in one process: at most ``total``, of one request ``per_request``."""

    def __init__(self, *, per_request: int, total: int) -> None:
        self.per_request, self.total = per_request, total
        self._used = 0
        self._lock = threading.RLock()  # a finalizer may give back meanwhile

    @property
    def used(self) -> int:
        """Bytes that are reserved now."""
        return self._used

    def lease(self) -> Lease:
        """The reservations of one request: none yet."""
        return Lease(self)

    def take(self, size: int) -> None:
        """Reserve ``size`` bytes of the total.

        Raises:
            Busy: other requests hold them; try again later.
        """
        with self._lock:
            if self._used + size > self.total:
                raise Busy(
                    f"the media of this request need {_mib(size)} MiB of decoded pixels, and other requests"
                    f" hold {_mib(self._used)} of {_mib(self.total)}; send it again later"
                )
            self._used += size

    def give_back(self, size: int) -> None:
        """Return ``size`` bytes that were taken."""
        with self._lock:
            self._used -= size


class Lease:
    """Decoded bytes of one request, given back when it ends: ``with budget.lease() as lease``.

    For several threads at once. `release` may be called again, and by a finalizer of the pixels.
    """

    def __init__(self, budget: MediaBudget) -> None:
        self._budget = budget
        self._held = 0
        self._lock = threading.RLock()  # a finalizer may give back meanwhile

    @property
    def per_request(self) -> int:
        """Bytes that it may hold at most."""
        return self._budget.per_request

    def reserve(self, size: int, field: str) -> None:
        """Ask for ``size`` more bytes before the media of ``field`` is decoded into them.

        Raises:
            InvalidRequest: the request would hold more than it may (413).
            Busy: all requests together would (429).
        """
        with self._lock:
            most = self._budget.per_request
            if self._held + size > most:
                held = f", {_mib(self._held)} of them in use" if self._held else ""
                possible = f"at most {_mib(most)} MiB of decoded pixels in a request{held}"
                given = f"{_mib(size)} MiB when decoded"
                raise InvalidRequest(field, given, possible, "payload_too_large")
            self._budget.take(size)
            self._held += size

    @contextmanager
    def during(self, size: int, field: str) -> Iterator[None]:
        """`reserve` for as long as something is decoded or resized."""
        self.reserve(size, field)
        try:
            yield
        finally:
            self._give_back(size)

    def moved(self) -> Lease:
        """The same reservations in a lease of their own, which outlives this one's block."""
        other = Lease(self._budget)
        with self._lock:
            other._held, self._held = self._held, 0
        return other

    def release(self) -> None:
        """Give all bytes back."""
        self._give_back(self._held)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def _give_back(self, size: int) -> None:
        with self._lock:
            size = min(size, self._held)  # nothing after `release`
            self._held -= size
            self._budget.give_back(size)


@functools.cache
def media_budget() -> MediaBudget:
    """The budget of this process, of the size that the environment says.

    Raises:
        InvalidRequest: the environment says no size.
    """
    text = os.environ.get(LIMIT, str(DEFAULT_GIB))
    try:
        total = float(text) * GIB
    except ValueError:
        total = 0.0
    if not 0 < total < math.inf:
        raise InvalidRequest(LIMIT, text, "a number of GiB above 0")
    return MediaBudget(per_request=int(total / 2), total=int(total))


def _mib(size: int) -> str:
    return f"{math.ceil(size / 2**20):,}"
