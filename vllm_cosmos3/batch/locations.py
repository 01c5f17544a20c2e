"""Locations of files: paths of this machine, and URLs of every file system that fsspec knows.

Credentials come from the environment or from a URL. `shown` and `redacted` keep those of a URL out
of what is said and recorded.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vllm_cosmos3.errors import InvalidRequest

HTTP = ("http", "https")
SECONDS = 60.0  # without a byte until a URL is given up
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>)]+")


def is_url(value: object) -> bool:
    """Whether a value is a URL of http or of another scheme that fsspec knows."""
    return isinstance(value, str) and scheme_of(value) is not None


def scheme_of(location: str) -> str | None:
    """The scheme of a URL that can be fetched, such as s3; None of anything else."""
    scheme, separator, _ = location.partition("://")
    if not separator:
        return None
    from fsspec import available_protocols

    return scheme.lower() if scheme.lower() in (*HTTP, *available_protocols()) else None


def shown(location: str | Path) -> str:
    """A location as it is said and recorded: a URL without user, password, query and fragment."""
    text = str(location)
    if not is_url(text):
        return text
    parts = urlsplit(text)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def redacted(value: Any) -> Any:
    """A text, or all texts of a value of JSON, with every URL as `shown` gives it."""
    if isinstance(value, str) and is_url(value):  # whole, also with blanks in it
        return shown(value)
    if isinstance(value, str):
        return _URL.sub(lambda found: shown(found[0]), value)
    if isinstance(value, Mapping):
        return {name: redacted(item) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [redacted(item) for item in value]
    return value


def parent_of(location: str | Path) -> str | Path:
    """The folder of a file."""
    if isinstance(location, Path):
        return location.absolute().parent
    return location.split("?")[0].rpartition("/")[0]


def joined(folder: str | Path, name: str) -> str:
    """A file as it is named in a folder: relative to it, absolute, in a home, or a URL."""
    if is_url(name):
        return name
    name = os.path.expanduser(name)  # leaves a user that nobody knows as it is
    if isinstance(folder, Path):
        return str(folder / name)
    if os.path.isabs(name):
        return name
    scheme, _, place = folder.partition("://")
    return f"{scheme}://{posixpath.normpath(posixpath.join(place, name))}"


def file_system(location: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it.

    Raises:
        ImportError: its package is not installed.
    """
    from fsspec.core import url_to_fs

    scheme, _, rest = location.partition("://")
    settings: dict[str, Any] = {}
    if scheme.lower() in HTTP:
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=None, sock_connect=SECONDS, sock_read=SECONDS)
        settings["client_kwargs"] = {"trust_env": True, "timeout": timeout}
    system, path = url_to_fs(f"{scheme.lower()}://{rest}", **settings)
    return system, str(path)


@contextmanager
def reaching(field: str, location: str, possible: str) -> Iterator[None]:
    """What goes wrong on the way to a location, as one sentence about a field.

    Raises:
        InvalidRequest: with the code ``fetch_failed``, whatever its file system raises.
    """
    try:
        yield
    except Exception as error:  # noqa: BLE001 - every file system has errors of its own
        message = f"{possible} ({reason_of(error)})"
        raise InvalidRequest(field, shown(location), message, "fetch_failed") from None


def reason_of(error: Exception) -> str:
    """Why a location cannot be reached, on one line and without secrets."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    status = getattr(error, "status", None)  # of aiohttp's answers
    if isinstance(status, int):
        return f"status {status}"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(redacted(" ".join(str(text).split())))


def fetch(field: str, location: str, path: Path) -> None:
    """Copy the file of a URL to ``path``.

    Raises:
        InvalidRequest: it cannot be had.
    """
    with reaching(field, location, "a URL that can be fetched"):
        system, name = file_system(location)
        system.get_file(name, str(path))
