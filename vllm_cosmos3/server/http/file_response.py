"""Finished files as answers: whole or in ranges, to the end even if they are deleted meanwhile."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from fastapi.responses import FileResponse
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from vllm_cosmos3.server.http.api_errors import ApiError, error_response

RANGE = re.compile(r"(\d*)-(\d*)", re.ASCII)


class StoredFile(FileResponse):
    """A file that is open from now on, so that nobody can take it away.

    A ``Range`` is what RFC 9110 says: one that cannot be read is ignored, as is one whose If-Range
    does not hold; of several those outside of the file are left out, and 416 is for no other.

    Raises:
        FileNotFoundError: it is not there.
    """

    def __init__(self, file: Path, **options: Any) -> None:
        self._file = file.open("rb")
        number = self._file.fileno()
        super().__init__(f"/proc/self/fd/{number}", stat_result=os.fstat(number), **options)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._file:
            size = os.fstat(self._file.fileno()).st_size
            asked = scope["method"] == "GET"  # RFC 9110, 14.2: of no other method
            ranges = self._ranges(Headers(scope=scope), size) if asked else None
            if ranges == []:
                error = ApiError(
                    "range_not_satisfiable",
                    f"the range is outside of the file, which has {size} bytes",
                    headers={"Content-Range": f"bytes */{size}"},
                )
                await error_response(error)(scope, receive, send)
                return
            others = [pair for pair in scope["headers"] if pair[0] not in (b"range", b"if-range")]
            if ranges is not None:  # in the one form that every version of Starlette reads
                text = ",".join(f"{first}-{last}" for first, last in ranges)
                others.append((b"range", f"bytes={text}".encode()))
            await super().__call__({**scope, "headers": others}, receive, send)

    def _ranges(self, headers: Headers, size: int) -> list[tuple[int, int]] | None:
        """First and last byte of each range that the file has; None if the whole is to be sent."""
        known = (self.headers["etag"], self.headers["last-modified"])
        if "range" not in headers or headers.get("if-range", known[0]) not in known:
            return None
        unit, _, text = headers["range"].partition("=")
        found = [RANGE.fullmatch(part.strip()) for part in text.split(",") if part.strip()]
        if unit.strip().lower() != "bytes" or not found:
            return None
        ranges = []
        for match in found:
            if match is None or not any(match.groups()):
                return None
            first, last = (int(digits) if digits else None for digits in match.groups())
            if first is None:  # so many at the end
                first, last = max(0, size - (last or 0)), size - 1
            elif last is not None and last < first:
                return None
            ranges.append((first, size - 1 if last is None else min(last, size - 1)))
        return [(first, last) for first, last in ranges if first < size]
