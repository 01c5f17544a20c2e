"""Storage folder of a server: whose it is, what it holds, whether there is room in it.

jobs.sqlite     the journal
files/JOB/      what a job made
inputs/SERVER/  what the requests that a server is planning brought along
owners/SERVER   held by a server while it lives
spare           a little room, which deleting needs on a full disk
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vllm_cosmos3.errors import Cosmos3Error, DiskFull, InvalidRequest

NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")  # of a job or a server, which names a folder
SPARE = 2**18  # bytes
PRIVATE = 0o700


class StorageLost(Cosmos3Error):
    """The storage cannot be used: its folder went away, or its journal is damaged."""

    code = "storage_unavailable"


def default_folder() -> Path:
    """Where servers of this user keep jobs, unless they are told: $XDG_STATE_HOME/vllm-cosmos3."""
    state = os.environ.get("XDG_STATE_HOME", "")
    base = Path(state) if os.path.isabs(state) else Path("~/.local/state").expanduser()
    return base / "vllm-cosmos3"


def former_default() -> Path | None:
    """The default folder of earlier versions, if it has results of this user."""
    folder = Path(tempfile.gettempdir()) / "cosmos3-storage"
    try:
        journal = (folder / "jobs.sqlite").lstat()
    except OSError:
        return None
    return folder if journal.st_uid == os.geteuid() else None


class Storage:
    """The folder of one or more servers on a machine.

    Raises:
        InvalidRequest: it cannot be made or written to, or is somebody else's.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.journal_file = folder / "jobs.sqlite"
        self.files, self.inputs, self.owners = (folder / n for n in ("files", "inputs", "owners"))
        self._spare = folder / "spare"
        if "\0" in str(folder):
            raise unusable(folder, "its name has a zero byte")
        try:
            folder.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
            if folder == default_folder():
                _make_private(folder)
            for part in (self.files, self.inputs, self.owners):
                part.mkdir(mode=PRIVATE, exist_ok=True)
            self._identity = _identity(folder)
        except OSError as error:
            raise unusable(folder, error.strerror or str(error)) from None
        self.keep_spare()

    def folder(self, name: str) -> Path:
        """The folder of a job's files.

        Raises:
            StorageLost: no job has such a name, which may lead elsewhere.
        """
        if not NAME.fullmatch(name):
            raise StorageLost("the journal has a job whose name is not that of a job")
        return self.files / name

    def remove(self, name: str) -> None:
        """Delete the files of a job; those of a name that leads elsewhere are not there."""
        if NAME.fullmatch(name):
            shutil.rmtree(self.files / name, ignore_errors=True)

    def folders(self) -> Iterator[Path]:
        """The folders of all jobs that have files."""
        return (entry for entry in self.files.iterdir() if NAME.fullmatch(entry.name))

    def check(self) -> None:
        """Ask whether jobs can be kept now.

        Raises:
            StorageLost: the folder went away, or another one is in its place.
            DiskFull: there is no room in it.
        """
        try:
            gone = _identity(self.path) != self._identity or not self.journal_file.is_file()
            free = shutil.disk_usage(self.path).free
        except OSError:
            gone, free = True, 0
        if gone:
            raise StorageLost(
                "the storage folder went away: put it back, or start the server again"
            )
        if free < SPARE:
            raise DiskFull("the disk of the storage is full: delete videos, or make room on it")

    def keep_spare(self) -> None:
        """Set a little room aside, if there is more than that."""
        try:
            if not self._spare.exists() and shutil.disk_usage(self.path).free > 3 * SPARE:
                self._spare.write_bytes(os.urandom(SPARE))  # which no file system compresses
        except OSError:
            self._spare.unlink(missing_ok=True)

    def free_spare(self) -> None:
        """Give the room that was set aside to whoever deletes."""
        self._spare.unlink(missing_ok=True)


def bytes_in(folder: Path) -> int:
    """Bytes of all files in a folder and below; those that go away meanwhile count nothing."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except OSError:
                continue
    return total


def unusable(folder: Path, reason: str) -> InvalidRequest:
    """The one sentence about a storage folder that does not serve."""
    return InvalidRequest(
        "storage_path", str(folder), f"a folder that can keep jobs and files ({reason})"
    )


def _make_private(folder: Path) -> None:
    """Keep others out of the default folder."""
    facts = folder.stat()
    if {folder.lstat().st_uid, facts.st_uid} != {os.geteuid()}:
        raise unusable(folder, "this one is not of this user; name another with --storage-path")
    if stat.S_IMODE(facts.st_mode) != PRIVATE:
        folder.chmod(PRIVATE)


def _identity(folder: Path) -> tuple[int, int]:
    facts = folder.stat()
    return facts.st_dev, facts.st_ino
