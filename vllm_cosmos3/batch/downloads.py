"""Files behind the URLs of a record, or of a request from Python: fetched before anything is planned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vllm_cosmos3.batch.locations import fetch, is_url, shown
from vllm_cosmos3.request.controls import CONTROLS
from vllm_cosmos3.request.request import GenerateRequest
from vllm_cosmos3.request.world import SessionRequest

FILES = (
    "image",
    "video",
    "sound_path",
    "action_path",
    "action_stats_path",
)  # fields of files, beside controls


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
            fetch(field, url, path)
            self._known[url] = path
        return str(self._known[url])


def urls_of(request: GenerateRequest) -> dict[str, str]:
    """The URLs among the files of a request, by field, as they are shown. Controls are left out."""
    given = {name: getattr(request, name) for name in FILES}
    return {name: shown(value) for name, value in given.items() if is_url(value)}


@contextmanager
def local_files(request: GenerateRequest) -> Iterator[GenerateRequest]:
    """The request with files instead of its URLs, which are there within the block.

    Raises:
        InvalidRequest: of a field whose URL cannot be fetched.
    """
    clips = {name: control.clip for name, control in request.controls.items()}
    given: dict[str, Any] = {name: getattr(request, name) for name in FILES} | clips
    urls = {name: str(value) for name, value in given.items() if is_url(value)}
    if not urls:
        yield request
        return
    with TemporaryDirectory(prefix="cosmos3-input-") as folder:
        downloads = Downloads(Path(folder))
        files: dict[str, Any] = {name: downloads.file(name, url) for name, url in urls.items()}
        for name in files.keys() & CONTROLS:
            files[name] = replace(request.controls[name], clip=files[name])
        yield replace(request, **files)


@contextmanager
def local_image(request: SessionRequest) -> Iterator[SessionRequest]:
    """The same for the picture that a session begins with."""
    if not is_url(request.image):
        yield request
        return
    with TemporaryDirectory(prefix="cosmos3-input-") as folder:
        yield replace(request, image=Downloads(Path(folder)).file("image", str(request.image)))
