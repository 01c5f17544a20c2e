"""Files behind the URLs of a record, or of a request from Python: fetched before anything is planned."""

from __future__ import annotations

import shutil
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.request.controls import CONTROLS
from vllm_cosmos3.request.request import GenerateRequest

SECONDS = 60.0  # without a byte until a URL is given up
FILES = (
    "image",
    "video",
    "sound_path",
    "action_path",
    "action_stats_path",
)  # fields of files, beside controls


def is_url(value: object) -> bool:
    """Whether a value is a URL that has to be fetched."""
    return isinstance(value, str) and value.lower().startswith(("http://", "https://"))


class Downloads:
    """Files of URLs, each fetched once, in a folder that somebody else deletes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, Path] = {}

    def local(self, field: str, value: Any) -> Any:
        """A value with files instead of its URLs."""
        if isinstance(value, Mapping):
            return {name: self.local(f"{field}.{name}", item) for name, item in value.items()}
        return self.file(field, value) if is_url(value) else value

    def file(self, field: str, url: str) -> str:
        """The file of ``url``; InvalidRequest of ``field`` if it cannot be had."""
        if url not in self._known:
            path = self._folder / f"{len(self._known)}{Path(url.split('?')[0]).suffix}"
            try:
                with (
                    urllib.request.urlopen(url, timeout=SECONDS) as answer,
                    path.open("wb") as file,
                ):
                    shutil.copyfileobj(answer, file)
            except (OSError, ValueError, HTTPException) as error:
                reason = " ".join(str(getattr(error, "reason", error)).split())
                possible = f"a URL that can be fetched ({reason})"
                raise InvalidRequest(field, url, possible, "fetch_failed") from None
            self._known[url] = path
        return str(self._known[url])


def urls_of(request: GenerateRequest) -> dict[str, str]:
    """The URLs among the files of a request, by field. Those of controls are not among them."""
    given = {name: getattr(request, name) for name in FILES}
    return {name: value for name, value in given.items() if is_url(value)}


@contextmanager
def local_files(request: GenerateRequest) -> Iterator[GenerateRequest]:
    """The request with files instead of its URLs, which are there within the block.

    Raises:
        InvalidRequest: of a field whose URL cannot be fetched.
    """
    clips = {name: control.clip for name, control in request.controls.items()}
    urls = urls_of(request) | {name: str(clip) for name, clip in clips.items() if is_url(clip)}
    if not urls:
        yield request
        return
    with TemporaryDirectory(prefix="cosmos3-input-") as folder:
        downloads = Downloads(Path(folder))
        files: dict[str, Any] = {name: downloads.file(name, url) for name, url in urls.items()}
        for name in files.keys() & CONTROLS:
            files[name] = replace(request.controls[name], clip=files[name])
        yield replace(request, **files)
