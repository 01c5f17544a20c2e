"""`--config FILE.yaml`: the flags of a file are those of the command line, which win."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from vllm_cosmos3.cli import main, subparser, whole_parser
from vllm_cosmos3.cli.config_file import expanded

pytestmark = pytest.mark.usefixtures("environment_of_its_own")


def parser(command: str) -> argparse.ArgumentParser:
    return subparser(whole_parser([command]), command)


def written(folder: Path, text: str) -> str:
    (folder / "config.yaml").write_text(text)
    return str(folder / "config.yaml")


def test_generate(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        f"model: {tiny_checkpoint}", "prompt: a boat", "size: 96x64", "num_frames: 9", "seed: 3",
        "num-inference-steps: 4", "guidance_interval: [400, 1000]", "use-duration-template: false",
        "generate_sound: true", "dry-run: true", "negative_prompt: -- no text",
    ]  # fmt: skip
    file = written(tmp_path, "\n".join(lines))
    assert main(["generate", "--config", file, "--steps", "2", "--seed=5"]) == 0
    effective = json.loads(capsys.readouterr().out)
    assert (effective["num_inference_steps"], effective["seed"]) == (2, 5)
    assert effective["guidance_interval"] == [400.0, 1000.0]
    assert effective["generate_sound"] is True
    assert effective["negative_prompt"].startswith("-- no text")
    assert effective["use_duration_template"] is False


def test_serve_passes_what_it_does_not_know_on(tmp_path: Path) -> None:
    text = "model: nvidia/Cosmos3-Nano\nmax-queue: 8\nstorage-quota: 10GiB\nmax-model-len: 4096\n"
    text += "allowed-origins: [http://a, http://b]\nhf-overrides: {a: 1}\nenforce-eager: true\n"
    words = expanded([f"--config={written(tmp_path, text)}", "--max-queue", "3"], parser("serve"))
    args, rest = parser("serve").parse_known_args(words)
    assert (args.checkpoint, args.max_queue, args.storage_quota) == (
        "nvidia/Cosmos3-Nano",
        3,
        10 * 2**30,
    )
    assert rest == [
        "--max-model-len", "4096", "--allowed-origins", "http://a", "http://b",
        "--hf-overrides", '{"a": 1}', "--enforce-eager",
    ]  # fmt: skip
    assert expanded(["CKPT", "--port", "1"], parser("serve")) == ["CKPT", "--port", "1"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a", "must be a YAML file of flags"),
        ("a: [", "must be a YAML file (while parsing"),
        ("num-frame: 9", "unknown flag --num-frame; did you mean --num-frames?"),
        ("num-frames: many", "--num-frames is 'many'"),
    ],
)
def test_mistakes(
    text: str, words: str, tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", str(tiny_checkpoint), "--prompt", "a", "--out", str(tmp_path)]
    assert main([*arguments, "--config", written(tmp_path, text)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_a_file_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--config", "/none.yaml"]) == 2
    assert (
        "--config is '/none.yaml', must be a YAML file that can be read" in capsys.readouterr().err
    )
    assert main(["serve", "CKPT", "--config"]) == 2
    assert "--config is missing" in capsys.readouterr().err


def test_a_flag_that_may_be_repeated_is_a_list(tmp_path: Path) -> None:
    file = written(tmp_path, "lora: [snow:0.5, film]\n")
    words = expanded(["--config", file], parser("generate"))
    assert words == ["--lora", "snow:0.5", "--lora", "film"]
    assert parser("generate").parse_args(words).lora == ["snow:0.5", "film"]
