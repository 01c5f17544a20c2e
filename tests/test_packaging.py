"""What is given away: a wheel with the whole package, and a source archive that can build and test it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = (
    "vllm_cosmos3",
    "tools",
    "tests",
    "docs",
    "examples",
    "integrations",
    "benchmarks",
    "requirements",
    "training",
)
BUILD = "from setuptools import build_meta as b; b.build_sdist('..'); b.build_wheel('..')"
# What `make setup` does in a folder, but that pip gets no further than to its files.
SET_UP = """
import sys
from pathlib import Path
from setuptools import build_meta
sys.path.insert(0, "tools")
import setup

class Pip:
    def install(self, *arguments):
        for word in arguments:
            path = word.partition("[")[0]
            if path.startswith("/"):
                assert Path(path).exists(), path
                print(Path(path).name)

setup._install_cpu(Pip(), "0.32.0")
for device in setup.PYTHONS:
    setup._stamp(Path(".venv"), device, "0.32.0", "python")
build_meta.prepare_metadata_for_build_wheel(".")
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the archives, and the sources that they were built from in ``src``."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "src"
    source.mkdir()
    caches = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for part in PARTS:
        shutil.copytree(ROOT / part, source / part, ignore=caches)
    for file in ROOT.iterdir():
        if file.is_file() and file.name not in (".gitignore", ".git"):
            shutil.copy(file, source)
    subprocess.run([sys.executable, "-c", BUILD], cwd=source, check=True, capture_output=True)
    for made in ("build", "vllm_cosmos3.egg-info"):
        shutil.rmtree(source / made, ignore_errors=True)
    return folder


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = {name for name in files(built / "src") if name.startswith("vllm_cosmos3/")}
    assert names == package
    assert "vllm_cosmos3/py.typed" in names


def test_the_metadata_say_who_and_where_with_absolute_links(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("METADATA")]
        metadata = message_from_bytes(archive.read(name))
    assert {"Author", "Keywords", "Classifier", "Project-URL", "License-Expression"} <= set(
        metadata
    )
    text = metadata.get_payload()
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 20
    assert all(link.startswith("https://") for link in links)
    assert "/raw/main/docs/pictures/demo.webp" in text


def test_the_source_archive_holds_what_make_needs(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {member.name.split("/", 1)[1] for member in opened if member.isfile()}
    assert files(built / "src") - names <= {"MANIFEST.in"}
    assert {"Makefile", "Dockerfile", "requirements/cpu-0.32.0.txt", "tools/setup.py"} <= names


def test_the_source_archive_is_set_up_like_a_clone(built: Path, tmp_path: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    command = [sys.executable, "-c", SET_UP]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert {"cpu-0.32.0.txt", folder.name} <= set(ran.stdout.split())
    for target in ("setup", "demo", "serve", "soak", "lint"):
        shown = subprocess.run(
            ["make", "-n", target], cwd=folder, capture_output=True, text=True, check=False
        )
        assert shown.returncode == 0, shown.stderr
    listed = subprocess.run(["make", "train-demo"], cwd=folder, capture_output=True, check=False)
    assert listed.returncode == 0, listed.stderr
