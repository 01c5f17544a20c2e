"""Files that go from one host to another in a message: what the first rank leaves where the stage cannot see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

Files = Mapping[str, bytes]  # by their places, relative to a folder that both hosts have


@dataclass(frozen=True, slots=True)
class Parcel:
    """What there is at the end of a request, and which of these files are its results, in order."""

    files: Files
    results: Sequence[str]

    def deliver(self, path: Path) -> list[Path]:
        """Let what is at ``path`` be this; the results.

        Raises:
            OSError: there is no room.
        """
        parent = path.parent
        for name in packed(path).keys() - self.files.keys():
            (parent / name).unlink()
        unpack(self.files, parent)
        return [parent / name for name in self.results]


def packed(path: Path) -> Files:
    """A file, or the files of a folder; empty where there is nothing yet."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {file.relative_to(path.parent).as_posix(): file.read_bytes() for file in files}


def unpack(files: Files, parent: Path) -> None:
    """Write files where they belong."""
    for name, data in files.items():
        file = parent / PurePosixPath(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)


def saved_elsewhere(save: Callable[[Path], Sequence[Path]], path: Path, before: Files) -> Parcel:
    """What ``save(path)`` makes on a host where only ``before`` was, which is left as it is."""
    with TemporaryDirectory(prefix="cosmos3-") as folder:
        unpack(before, Path(folder))
        made = save(Path(folder) / path.name)
        results = [file.relative_to(folder).as_posix() for file in made]
        return Parcel(packed(Path(folder) / path.name), results)
