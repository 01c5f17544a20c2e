"""Store of results: a folder of this machine, or of a file system that fsspec can write to.

Names are paths below it with forward slashes. Files appear whole or not at all.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any, Protocol

from vllm_cosmos3.batch.locations import file_system, is_url, reaching, shown
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.files import replacing

# File systems on which a file can be created that must not be there yet, in one step.
EXCLUSIVE = ("memory", "s3", "s3a", "gs", "gcs", "abfs", "az")
CREATING_IN_MEMORY = Lock()  # which fsspec does in two steps
REMOVALS = 9  # of a folder by other runs that end, while a file is made in it
OUT = "a folder to write to"


@dataclass(frozen=True, slots=True)
class Folder:
    """A local folder for the files of one result, which ``publish`` puts in their place.

    ``publish`` takes the name of the file that comes last: with it the result is there.
    """

    path: Path
    publish: Callable[[str], None]
    close: Callable[[], None]


class Store(Protocol):
    """Where results are. ``exclusive`` says whether `create` is one step."""

    called: str
    exclusive: bool

    def read(self, name: str) -> bytes | None:
        """A file; None where there is none."""

    def write(self, name: str, data: bytes) -> None:
        """A file in place of what has its name."""

    def create(self, name: str, data: bytes) -> bool:
        """A new file; False where there is one of that name."""

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""

    def names(self, folder: str) -> list[str]:
        """The names in a folder, in their order; none where there is no such folder."""

    def delete(self, name: str) -> None:
        """Remove a file, or a folder that is empty; nothing where there is none."""

    def put(self, path: Path, name: str) -> None:
        """A local file, moved here."""

    def get(self, name: str, path: Path) -> None:
        """A copy of a file at a local path."""

    def folder(self, name: str) -> Folder:
        """A place to make the files of a result."""


def store_at(location: str) -> Store:
    """The store in a folder or at a URL, made now: an unwritable place fails before the work.

    Raises:
        InvalidRequest: it cannot be written to.
    """
    if not is_url(location):
        return LocalStore(Path(location))
    if location.startswith("file://"):
        return LocalStore(Path(file_system(location)[1]))
    return UrlStore(location)


class LocalStore:
    """A folder of this machine, which others may share."""

    exclusive = True

    def __init__(self, root: Path) -> None:
        self._root, self.called = root, str(root)
        try:
            root.mkdir(parents=True, exist_ok=True)
            TemporaryDirectory(dir=root).cleanup()
        except OSError as error:
            raise InvalidRequest("out", self.called, f"{OUT} ({error.strerror})") from None

    def read(self, name: str) -> bytes | None:
        try:
            return (self._root / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, name: str, data: bytes) -> None:
        def write(path: Path) -> None:
            with replacing(path) as part:
                part.write_bytes(data)

        self._in_its_folder(name, write)

    def create(self, name: str, data: bytes) -> bool:
        def create(path: Path) -> None:
            with path.open("xb") as file:
                file.write(data)

        try:
            self._in_its_folder(name, create)
        except FileExistsError:
            return False
        return True

    def exists(self, name: str) -> bool:
        return (self._root / name).is_file()

    def names(self, folder: str) -> list[str]:
        try:
            return sorted(os.listdir(self._root / folder))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def delete(self, name: str) -> None:
        path = self._root / name
        try:
            if path.is_dir():
                path.rmdir()
            else:
                path.unlink(missing_ok=True)
        except OSError:  # a folder with files in it, or that another run has removed
            return

    def put(self, path: Path, name: str) -> None:
        with replacing(self._parent(name)) as part:
            shutil.move(path, part)

    def get(self, name: str, path: Path) -> None:
        shutil.copyfile(self._root / name, path)

    def folder(self, name: str) -> Folder:
        path = self._root / name
        path.mkdir(parents=True, exist_ok=True)
        return Folder(path, lambda _: None, lambda: None)

    def _in_its_folder(self, name: str, make: Callable[[Path], None]) -> None:
        """Make a file in its folder, which other runs may remove as empty until then."""
        for _ in range(REMOVALS):
            with suppress(FileNotFoundError):
                return make(self._parent(name))
        return make(self._parent(name))

    def _parent(self, name: str) -> Path:
        path = self._root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


class UrlStore:
    """A folder of a file system that fsspec reaches."""

    def __init__(self, url: str) -> None:
        self.called, scheme = shown(url), url.partition("://")[0].lower()
        self.exclusive = scheme in EXCLUSIVE
        self._creating: AbstractContextManager[object] = (
            CREATING_IN_MEMORY if scheme == "memory" else nullcontext()
        )
        with reaching("out", url, OUT):
            system, root = file_system(url)
            system.makedirs(root, exist_ok=True)
            system.pipe_file(f"{root}/.cosmos3/probe", b"")
            system.rm_file(f"{root}/.cosmos3/probe")
        self._system, self._root = system, root.rstrip("/")

    def read(self, name: str) -> bytes | None:
        try:
            return bytes(self._system.cat_file(self._at(name)))
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        self._made(name)
        self._system.pipe_file(self._at(name), data)

    def create(self, name: str, data: bytes) -> bool:
        self._made(name)
        try:
            with self._creating:
                self._system.pipe_file(self._at(name), data, mode="create")
        except FileExistsError:
            return False
        return True

    def exists(self, name: str) -> bool:
        return bool(self._system.isfile(self._at(name)))

    def names(self, folder: str) -> list[str]:
        self._system.invalidate_cache()
        try:
            found: list[Any] = self._system.ls(self._at(folder), detail=False)
        except FileNotFoundError:
            return []
        return sorted(str(path).rstrip("/").rpartition("/")[2] for path in found)

    def delete(self, name: str) -> None:
        try:
            if self._system.isdir(self._at(name)):
                self._system.rmdir(self._at(name))
            else:
                self._system.rm_file(self._at(name))
        except OSError:  # it is not there, or a folder with files in it
            return

    def put(self, path: Path, name: str) -> None:
        self._made(name)
        self._system.put_file(str(path), self._at(name))
        path.unlink()

    def get(self, name: str, path: Path) -> None:
        self._system.get_file(self._at(name), str(path))

    def folder(self, name: str) -> Folder:
        made = TemporaryDirectory(prefix="cosmos3-output-")
        path = Path(made.name)

        def publish(last: str) -> None:
            files = sorted(file.name for file in path.iterdir())
            for file in sorted(files, key=lambda file: file == last):
                self._made(f"{name}/{file}")
                self._system.put_file(str(path / file), self._at(f"{name}/{file}"))

        return Folder(path, publish, made.cleanup)

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _made(self, name: str) -> None:
        """The folder of a file; on object stores there are none, and nothing happens."""
        self._system.makedirs(self._at(name).rpartition("/")[0], exist_ok=True)
