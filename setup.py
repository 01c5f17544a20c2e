"""The README for PyPI, where its links have to be absolute. All else is in pyproject.toml."""

import re
import tomllib
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
REPOSITORY = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]["urls"]["Repository"]


def absolute(found: re.Match[str]) -> str:
    """A link to a file or a heading of the repository, or a picture."""
    kind = "raw" if found[1] else "blob"
    target = f"README.md{found[3]}" if found[3].startswith("#") else found[3]
    return f"{found[1]}[{found[2]}]({REPOSITORY}/{kind}/main/{target})"


setup(
    long_description=re.sub(
        r"(!?)\[([^\]]*)\]\((?!https?:)([^)]+)\)", absolute, (HERE / "README.md").read_text()
    ),
    long_description_content_type="text/markdown",
)
