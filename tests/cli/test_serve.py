"""``vllm-cosmos3 serve``: the command it builds, and the mistakes it names without starting vLLM."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
from pathlib import Path

import pytest

from vllm_cosmos3.cli import main
from vllm_cosmos3.cli.foreign_flags import dashed
from vllm_cosmos3.cli.serve import add_arguments, reasons, stock_command
from vllm_cosmos3.compat import has_serve_flag

pytestmark = pytest.mark.usefixtures("environment_of_its_own")


def build(*argv: str, folder: Path | None = None) -> list[str]:
    return stock_command(parse(*argv), folder)


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args, args.rest = parser.parse_known_args(argv)
    return args


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that the command prints when it refuses."""
    assert main(["serve", *argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("vllm-cosmos3 serve: ")


def value(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


def test_defaults_are_the_documented_recipe() -> None:
    command = build("nvidia/Cosmos3-Nano")
    assert command[:3] == ["vllm", "serve", "nvidia/Cosmos3-Nano"]
    assert json.loads(value(command, "--hf-overrides")) == {
        "architectures": ["Cosmos3ReasonerForConditionalGeneration"]
    }
    assert json.loads(value(command, "--media-io-kwargs")) == {"video": {"num_frames": -1}}
    assert value(command, "--mm-encoder-tp-mode") == "data"
    assert "--async-scheduling" in command
    trusts = "--trust-request-mm-kwargs" in command
    assert trusts == has_serve_flag("trust-request-mm-kwargs")


def test_what_the_user_says_wins() -> None:
    command = build(
        "nvidia/Cosmos3-Nano",
        "--mm-encoder-tp-mode=weights",
        "--no-async-scheduling",
        "--media-io-kwargs",
        '{"image": {"image_mode": null}, "video": {"num_frames": 8}}',
        '--hf-overrides={"foo": 1}',
        "--max-model-len",
        "4096",
    )
    assert "--async-scheduling" not in command
    assert "data" not in command
    assert json.loads(value(command, "--media-io-kwargs"))["video"] == {"num_frames": 8}
    assert json.loads(value(command, "--hf-overrides"))["foo"] == 1
    assert len([word for word in command if word.startswith("--hf-overrides")]) == 1
    assert value(command, "--max-model-len") == "4096"


def test_every_flag_of_ours_has_its_reason() -> None:
    args = parse("nvidia/Cosmos3-Nano", "--no-async-scheduling", "--max-video-fps", "4")
    lines = reasons(stock_command(args, None), args)
    assert lines[0].startswith("--mm-encoder-tp-mode: each tensor-parallel rank encodes whole")
    assert not any(line.startswith("--async-scheduling") for line in lines)
    if has_serve_flag("trust-request-mm-kwargs"):
        assert lines[1].endswith("such as fps; videos stay within 4 fps and 1800 frames")
    assert "--api-server-count" not in " ".join(lines)


def test_a_repository_is_checked_as_a_folder_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path
) -> None:
    asked = []

    def resolve(name: str, revision: str | None, *, weights: bool) -> Path:
        asked.append((name, revision, weights))
        return tiny_checkpoint

    monkeypatch.setattr("vllm_cosmos3.cli.serve.resolve", resolve)
    words = ["nvidia/Cosmos3-Nano", "--revision", "abc", "--memory-limit", "0.0001"]
    assert "for its weights alone, and may use 0.1 MiB" in refused(capsys, *words, "--port", "0")
    assert asked == [("nvidia/Cosmos3-Nano", "abc", True)]


def test_a_repository_that_is_not_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read at import
    monkeypatch.setattr("vllm_cosmos3.cli.serve._become", lambda _: pytest.fail("started vLLM"))
    line = refused(capsys, "nope/x", "--surface", "reasoner", "--port", "0")
    assert "nope/x" in line
    assert "reached" in line


def test_folder_without_root_files_gets_the_flags_for_it(tmp_path: Path) -> None:
    command = build(str(tmp_path), folder=tmp_path)
    assert value(command, "--config-format") == "cosmos3"
    assert value(command, "--tokenizer") == str(tmp_path / "text_tokenizer")


@pytest.mark.parametrize("checkpoint", ["/no/such/folder", "Cosmos3-Nan", "./a/b", "~nosuchuser/a"])
def test_no_such_checkpoint(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, checkpoint).startswith(f"{checkpoint} is neither a folder nor")


def test_other_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not a Cosmos 3 checkpoint" in refused(capsys, str(tmp_path))


def test_incomplete_checkpoint(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "incomplete")
    shutil.rmtree(folder / "vision_encoder")
    assert refused(capsys, str(folder)) == f"vision_encoder/ is missing in {folder}"


def test_port_taken(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        line = refused(capsys, str(tiny_checkpoint), "--host", "127.0.0.1", "--port", port)
    assert line == f"--port is {port}, must be a free port (address already in use)"


def test_plugin_switched_off(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert refused(capsys, "x/y").startswith("VLLM_PLUGINS is 'other', must be unset")


def test_processor_has_one_of_two_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLLM_COSMOS3_PROCESSOR", "fast")
    line = refused(capsys, "x/y")
    assert line == "VLLM_COSMOS3_PROCESSOR is 'fast', must be cosmos3 or reference"


@pytest.mark.parametrize("flag", ["--max-video-fps", "--max-video-frames"])
def test_limits_are_positive(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "x/y", flag, "0").startswith(f"{flag} is 0")


def test_a_limit_is_finite(capsys: pytest.CaptureFixture[str]) -> None:
    says = "--max-video-fps is inf, must be a number of at least 1"
    assert refused(capsys, "x/y", "--max-video-fps", "inf") == says


@pytest.mark.parametrize(
    ("flags", "environment", "ours"),
    [
        ((), {}, True),
        (("--media-io-kwargs", '{"video": {"video_backend": "opencv"}}'), {}, False),
        ((), {"VLLM_MEDIA_CONNECTOR": "http"}, False),
    ],
    ids=["nobody says", "a loader", "a connector"],
)
def test_only_the_operator_chooses_how_videos_are_read(
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    environment: dict[str, str],
    ours: bool,
) -> None:
    monkeypatch.delenv("VLLM_MEDIA_CONNECTOR", raising=False)
    for name, text in environment.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setattr("vllm_cosmos3.cli.serve._become", lambda _: 0)
    arguments = [str(tiny_checkpoint), "--surface", "reasoner", "--port", "0", *flags]
    assert main(["serve", *arguments]) == 0
    assert ("VLLM_MEDIA_CONNECTOR=cosmos3" in capsys.readouterr().out) == ours
    assert (os.environ.get("VLLM_MEDIA_CONNECTOR") == "cosmos3") == ours


@pytest.mark.parametrize("named", [None, "cosmos3,other"])
def test_both_surfaces_load_our_plugin_alone_unless_more_are_named(
    named: str | None,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if named is not None:
        monkeypatch.setenv("VLLM_PLUGINS", named)
    monkeypatch.setattr("vllm_cosmos3.cli.serve._become", lambda _: 0)
    assert main(["serve", str(tiny_checkpoint), "--port", "0"]) == 0
    assert f" VLLM_PLUGINS={named or 'cosmos3'} " in capsys.readouterr().out


def test_json_flags_are_json(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (str(tiny_checkpoint), "--port", "0", "--hf-overrides", "{no")
    assert refused(capsys, *arguments) == "--hf-overrides is '{no', must be a JSON object"


@pytest.mark.parametrize("surface", ["reasoner", "both"])
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--max-queu 3", "unknown flag --max-queu; did you mean --max-queue?"),
        ("--max_queu=3", "unknown flag --max-queu; did you mean --max-queue?"),
        ("--tensor-paralel-size 2", "unknown flag --tensor-paralel-size; did you mean --tensor-parallel-size?"),
        ("--compilation-confg.mode 3", "unknown flag --compilation-confg; did you mean --compilation-config?"),
        ("--qqqq", "unknown flag --qqqq; --help lists all"),
        ("twice", "unexpected argument 'twice'"),
        ("-tp two", "argument --tensor-parallel-size/-tp: invalid int value: 'two'"),
    ],
)  # fmt: skip
def test_a_flag_of_nobody_is_one_line(
    flags: str, says: str, surface: str, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tiny_checkpoint), "--surface", surface, "--port", "0", *flags.split()]
    assert refused(capsys, *arguments) == says


def test_no_weights_are_fetched_for_a_flag_of_nobody(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fetched = lambda *_, **__: pytest.fail("fetched")  # noqa: E731
    monkeypatch.setattr("vllm_cosmos3.cli.serve.resolve", fetched)
    line = refused(capsys, "nvidia/Cosmos3-Nano", "--port", "0", "--max-queu", "3")
    assert line == "unknown flag --max-queu; did you mean --max-queue?"


@pytest.mark.parametrize("surface", ["reasoner", "both"])
@pytest.mark.parametrize(
    "flags",
    [
        "--compilation-config.mode 3 --compilation_config.cudagraph_mode=NONE",
        '--compilation-config {"mode":3}',
        "-O3",
        "-O 2",
        "-tp 1 --pipeline_parallel_size=1",
        "--no-enable-prefix-caching",
        "--max-num-seq 4",  # argparse takes the beginning of a flag
        "--max-model-len 4k",
        "--limit-mm-per-prompt.image 2",
    ],
)
def test_flags_of_vllm_are_passed_on(
    flags: str,
    surface: str,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    became: list[list[str]] = []
    monkeypatch.setattr("vllm_cosmos3.cli.serve._become", lambda words: became.append(words) or 0)
    arguments = [str(tiny_checkpoint), "--surface", surface, "--port", "0", *flags.split()]
    assert main(["serve", *arguments]) == 0
    (command,) = became
    assert {dashed(word) for word in flags.split()} <= set(command)
