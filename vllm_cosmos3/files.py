"""Files that appear whole: written under a temporary name, which becomes theirs at the end."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A name for a new file beside ``path``, whose place it takes when all is well.

    Until then, and if anything is raised, ``path`` is what it was.

    Raises:
        OSError: there is no such folder, or a folder or device of that name.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise IsADirectoryError(errno.EISDIR, "Is a directory or a device, not a file", str(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    part = target.with_name(f".{uuid.uuid4().hex}.part")
    try:
        yield part
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """A text file, whole or not at all; devices and pipes, such as /dev/stdout, are written to.

    Raises:
        OSError: it cannot be written.
    """
    target = Path(path)
    if target.exists() and not target.is_file() and not target.is_dir():
        target.write_text(text)
        return
    with replacing(target) as part:
        part.write_text(text)
