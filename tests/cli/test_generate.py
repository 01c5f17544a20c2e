"""``vllm-cosmos3 generate`` from the arguments to the files."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import av
import numpy as np
import pytest
from limits import HANG
from media_files import file_server
from PIL import Image
from safetensors.numpy import load_file, save_file
from servers import BIN, environment

from vllm_cosmos3.cli import main
from vllm_cosmos3.cli.generate import BESIDE, EXAMPLES, HEADINGS
from vllm_cosmos3.cli.terminal import progress_shown
from vllm_cosmos3.media import write_video
from vllm_cosmos3.progress import Progress
from vllm_cosmos3.request.request import SPECS

FAST = ["--size", "96x64", "--num-inference-steps", "2", "--seed", "3"]
PHASES = [
    "model_load", "text", "vae_encode", "denoise", "vae_decode", "sound", "to_cpu", "per_step",
    "save", "total",
]  # fmt: skip


def generate(*arguments: object) -> int:
    return main(["generate", *map(str, arguments)])


def test_video_with_sound(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = generate(
        tiny_checkpoint, "--prompt", "a boat", *FAST, "--num-frames", 26, "--fps", 12.5,
        "--generate-sound", "--out", tmp_path, "--timings-json", tmp_path / "t.json",
    )  # fmt: skip
    assert status == 0
    folder = tmp_path / "sample"
    assert sorted(file.name for file in folder.iterdir()) == [
        "sample_args.json", "sample_outputs.json", "vision.mp4",
    ]  # fmt: skip
    with av.open(str(folder / "vision.mp4")) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert (video.codec_context.name, video.width, video.height) == ("h264", 96, 64)
        assert (audio.codec_context.name, audio.rate, audio.channels) == ("aac", 48000, 2)
        assert float(video.average_rate) == 12.5
        assert sum(1 for _ in container.decode(video)) == 29
        assert float(container.duration / av.time_base) == pytest.approx(29 / 12.5, abs=0.1)

    arguments = json.loads((folder / "sample_args.json").read_text())
    assert SPECS.keys() <= arguments.keys()
    assert (arguments["num_frames"], arguments["seed"], arguments["mode"]) == (29, 3, "text2video")
    outputs = json.loads((folder / "sample_outputs.json").read_text())
    assert (outputs["status"], outputs["args"]) == ("success", arguments)
    assert outputs["outputs"][0]["files"] == ["vision.mp4"]
    assert outputs["outputs"][0]["content"]["num_frames"] == 29
    timings = json.loads((tmp_path / "t.json").read_text())
    assert list(timings) == PHASES
    assert timings["total"] >= sum(timings[p] for p in PHASES[:-1] if p != "per_step") * 0.99

    printed = capsys.readouterr()
    for phase in PHASES:
        assert f"{phase} " in printed.out
    assert "peak memory" in printed.out
    assert "96x64, 29 frames at 12.5 fps, 2.32 s with sound" in printed.out
    assert "warning: num_frames 26 is rounded up to 29 (4k+1)" in printed.err


def test_transfer(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    levels = np.random.RandomState(0).randint(0, 256, (6, 64, 96, 3), dtype=np.uint8)
    write_video(tmp_path / "in.mp4", levels, fps=12, crf=0)
    depth = {"control_path": str(tmp_path / "in.mp4"), "control_weight": 3}
    assert generate(
        tiny_checkpoint, "--prompt", "a boat", *FAST, "--video", tmp_path / "in.mp4", "--edge",
        "--depth", json.dumps(depth), "--num-video-frames-per-chunk", 5, "--out", tmp_path,
        "--show-control-condition",
    ) == 0  # fmt: skip
    known = json.loads((tmp_path / "sample" / "sample_args.json").read_text())
    assert (known["mode"], known["checkpoint_kind"], known["num_frames"]) == ("transfer", "base", 6)
    assert known["edge"] == {"control_weight": 1.0, "preset_edge_threshold": "medium"}
    assert known["depth"] == {"control_weight": 3.0}
    printed = capsys.readouterr()
    assert "288x64, 6 frames at 12 fps" in printed.out
    assert re.search(r"tiny \(base\), cpu, bfloat16, loaded in [\d.]+ s", printed.err)


def test_images(tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert generate(
        tiny_checkpoint, "--prompt", "a boat", *FAST, "--num-frames", 1, "--n", 2,
        "--out", tmp_path, "--name", "boats",
    ) == 0  # fmt: skip
    for name in ("vision-0.png", "vision-1.png"):
        with Image.open(tmp_path / "boats" / name) as image:
            assert image.size == (96, 64)


def test_latents_and_back(tiny_checkpoint: Path, tmp_path: Path) -> None:
    noise = tmp_path / "noise.safetensors"
    save_file({"vision": np.zeros((1, 48, 3, 4, 6), np.float32)}, noise)
    assert generate(
        tiny_checkpoint, "--prompt", "a boat", *FAST, "--num-frames", 9, "--generate-sound",
        "--latents", noise, "--output-type", "latent", "--out", tmp_path,
    ) == 0  # fmt: skip
    latents = load_file(tmp_path / "sample" / "latents.safetensors")
    assert {name: x.shape for name, x in latents.items()} == {
        "vision": (1, 48, 3, 4, 6),
        "sound": (64, 10),
    }


def test_image_to_video(tiny_checkpoint: Path, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    Image.new("RGB", (50, 40), "teal").save(picture)
    assert generate(
        tiny_checkpoint, "--prompt", "a boat", *FAST, "--num-frames", 9, "--image", picture,
        "--no-use-duration-template", "--guidance-interval", "400,1000", "--out", tmp_path,
    ) == 0  # fmt: skip
    arguments = json.loads((tmp_path / "sample" / "sample_args.json").read_text())
    assert (arguments["mode"], arguments["image"]) == ("image2video", str(picture))
    assert arguments["use_duration_template"] is False
    assert arguments["guidance_interval"] == [400.0, 1000.0]


def test_a_picture_of_a_url(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (50, 40), "teal").save(tmp_path / "picture.png")
    with file_server(tmp_path) as url:
        picture = f"{url}/picture.png"
        command = [tiny_checkpoint, "--prompt", "a", *FAST, "--num-frames", 5, "--image"]
        assert generate(*command, picture, "--out", tmp_path) == 0
        assert generate(*command, f"{url}/none.png", "--dry-run") == 2
    known = json.loads((tmp_path / "sample" / "sample_args.json").read_text())
    assert (known["mode"], known["image"]) == ("image2video", picture)
    assert "--image is 'http" in capsys.readouterr().err


def test_dry_run_needs_no_weights(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "json-only"
    shutil.copytree(tiny_checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    assert generate(folder, "--prompt", "a boat", "--dry-run", "--seconds", 4) == 0
    effective = json.loads(capsys.readouterr().out)
    assert (effective["num_frames"], effective["width"]) == (97, 1280)


def test_flags_as_phyai_spells_them(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--checkpoint", tiny_checkpoint, "--prompt", "a", "--steps", 7, "--tp", 1, "--cfg", 1]
    flags += ["--use-karras-sigmas", "false", "--sound", "--no-prompt-metadata", "--dry-run"]
    assert generate(*flags) == 0
    effective = json.loads(capsys.readouterr().out)
    assert (effective["num_inference_steps"], effective["schedule"]) == (7, "diffusers")
    assert effective["generate_sound"] is True
    assert not effective["use_duration_template"]
    assert not effective["use_resolution_template"]
    assert generate(tiny_checkpoint, "--prompt", "a", "--use-karras-sigmas", "auto", "--dry-run") == 2  # fmt: skip
    assert "--use-karras-sigmas is 'auto', must be one of native" in capsys.readouterr().err


def test_print_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("--print-defaults") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "text2image",
        "image2image",
        "text2video",
        "image2video",
        "video2video",
        "actions",
    ]
    rows = {line.split()[0]: line.split()[1:] for line in lines if len(line.split()) > 1}
    assert rows["guidance_scale"] == ["4", "6", "6", "6", "6", "1"]
    assert rows["num_frames"] == ["1", "1", "189", "189", "189", "-"]
    assert rows["negative_metadata_mode"] == [*["same"] * 5, "none"]
    assert rows["seg"] == ["2", "3", "93", "5000"]
    assert rows["wsm"] == ["3", "1", "101", "101"]
    assert rows["umi"] == ["10", "20", "16", "256", "wrist_view"]


def test_print_defaults_of_a_checkpoint(
    tiny_edge_fp32: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Edge: 832x480, 121 frames, guidance 5, shift 3; pictures 640x640 with guidance 7 (OM's and SG's numbers)."""

    def table(*words: object) -> dict[str, list[str]]:
        assert generate(*words, "--print-defaults") == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines() if line]
        assert lines[0]
        return {line[0]: line[1:] for line in lines} | {"modes": lines[0]}

    edge = table(tiny_edge_fp32)
    assert edge["modes"] == ["text2image", "text2video", "image2video", "video2video", "actions"]
    assert edge["width"] == ["640", "832", "832", "832", "-"]
    assert edge["num_frames"] == ["1", "121", "121", "121", "-"]
    assert edge["guidance_scale"] == ["7", "5", "5", "5", "1"]
    assert edge["flow_shift"] == ["3", "3", "3", "3", "5"]
    assert "wsm" not in edge  # it has no transfer
    policy = table(tiny_edge_fp32, "--checkpoint-kind", "edge-policy-droid")
    assert (policy["modes"], policy["num_inference_steps"]) == (["actions"], ["4"])
    assert policy["guidance_interval"] == ["960,1001"]
    assert main(["make-checkpoint", str(tmp_path / "d"), "--kind", "distilled-i2v"]) == 0
    capsys.readouterr()
    distilled = table(tmp_path / "d")
    assert distilled["modes"] == ["image2video"]
    assert (distilled["num_inference_steps"], distilled["guidance_scale"]) == (["4"], ["1"])
    assert main(["make-checkpoint", str(tmp_path / "s"), "--kind", "sim-bimanual"]) == 0
    capsys.readouterr()
    assert table(tmp_path / "s")["history"] == ["226"]


def test_a_reader_that_has_gone_is_no_traceback(vllm_cache: Path) -> None:
    command = [str(BIN / "vllm-cosmos3"), "generate", "--print-defaults"]
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False,
            env=environment(vllm_cache), timeout=HANG,
        )  # fmt: skip
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_help_has_every_field(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as done:
        generate("--help")
    assert done.value.code == 0
    text = capsys.readouterr().out
    for name in SPECS:
        assert f"--{name.replace('_', '-')}" in text
    lines = text.splitlines()
    assert len(lines) <= 200
    assert max(map(len, lines)) <= 100
    assert {heading for heading in HEADINGS.values() if f"\n{heading}:\n" in text} == set(
        HEADINGS.values()
    )


def test_headings_are_of_fields_in_their_order() -> None:
    assert list(HEADINGS) == [name for name in SPECS if name in HEADINGS]
    assert next(iter(SPECS)) in HEADINGS
    assert BESIDE.keys() <= SPECS.keys()


def examples(help_text: str) -> list[list[str]]:
    """The commands under "examples:", as words."""
    lines = help_text.partition("examples:\n")[2].splitlines()
    return [shlex.split(line) for line in lines if line.strip()]


@pytest.mark.parametrize("command", examples(EXAMPLES), ids=lambda words: words[-1])
def test_examples_of_the_help(
    command: list[str], tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (96, 64), "teal").save("a.png")
    write_video("street.mp4", np.zeros((5, 64, 96, 3), np.uint8), fps=12)
    Path("records").mkdir()
    Path("records/a.jsonl").write_text('{"name": "first", "prompt": "a boat"}\n')
    assert command[:3] == ["vllm-cosmos3", "generate", "nvidia/Cosmos3-Nano"]
    small = ["--num-inference-steps", "1"]
    small += [] if "--edge" in command else ["--size", "96x64"]
    small += [] if {"--edge", "--seconds"} & set(command) else ["--num-frames", "5"]
    small += ["--fps", "1"] if "--seconds" in command else []
    assert generate(tiny_checkpoint, *command[3:], *small) == 0
    assert [file.name for file in tmp_path.rglob("vision*")] in (["vision.mp4"], ["vision.jpg"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "MODEL is missing"),
        (["CKPT"], "out is missing"),
        (["CKPT", "--out", "OUT"], "prompt is missing"),
        (["CKPT", "--out", "OUT", "--prompt", "a", "--height", "abc"], "height is 'abc'"),
        (["CKPT", "--out", "OUT", "--prompt", "a", "--fps", "nan"], "fps is nan"),
        (["CKPT", "--out", "OUT", "--prompt", "a", "--size", "1281x719"], "such as 1280x720"),
        (["CKPT", "--out", "OUT", "--prompt", "a", "--num-frames", "1000"], "at most 300"),
        (["CKPT", "--out", "OUT", "--prompt", "a", "--image", "/no.png"], "image is '/no.png'"),
        (["CKPT", "--out", "OUT", "--prompt", "a", "--prompt-token-ids", "1,x"], "prompt"),
        (["CKPT", "--out", "OUT", "--prompt", "a", "--latents", "/no"], "latents is '/no'"),
        (["CKPT", "--out", "OUT", "--prompt", "a", "--name", "a/b"], "name is 'a/b'"),
        (["CKPT", "--out", "/proc/none", "--prompt", "a"], "out is '/proc/none'"),
        (["CKPT", "--out", "/proc", "--name", "self", "--prompt", "a"], "out is '/proc'"),
        (
            ["CKPT", "--out", "OUT", "--prompt", "a", "--timings-json", "/none/t"],
            "--timings-json is",
        ),
        (["CKPT", "--out", "OUT", "--prompt", "a", "--timings-json", "/tmp"], "--timings-json is"),
        (["CKPT", "--out", "OUT", "--prompt", "a", "--dtype", "int8"], "dtype is 'int8'"),
        (["CKPT", "--out", "OUT", "--prompt", "a", "--crf", "60"], "crf is 60"),
        (["CKPT", "--out", "OUT", "--prompt", "a", "--action", "[" * 100_000], "action is '[["),
        (["/nowhere", "--out", "OUT", "--prompt", "a"], "/nowhere"),
    ],
)
def test_a_mistake_is_one_line(
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    places = {"CKPT": str(tiny_checkpoint), "OUT": str(tmp_path / "out")}
    assert generate(*(places.get(argument, argument) for argument in arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vllm-cosmos3 generate: ")
    assert message in line
    assert not list(tmp_path.rglob("*.json"))


def test_bar_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_shown(terminal=True) as report:
        for phase, step in (("encode", 0), ("denoise", 0), ("denoise", 8), ("decode", 8)):
            report(
                Progress(phase=phase, step=step, steps=8, elapsed=0.0, eta=None, reused=step // 2)
            )
    bar = capsys.readouterr().err
    assert "denoise" in bar
    assert "8/8" in bar
    assert "4 reused" in bar


def test_actions_are_saved_beside_the_video_and_read_back(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "start.png"
    Image.fromarray(np.zeros((48, 80, 3), np.uint8)).save(picture)
    common = ["--prompt", "go", "--image", picture, "--domain-name", "umi", "--size", "96x64"]
    common += ["--num-inference-steps", 1, "--out", tmp_path]
    policy = ["--action-mode", "policy", "--action-chunk-size", 4, "--name", "policy"]
    assert generate(tiny_checkpoint, *common, *policy) == 0
    folder = tmp_path / "policy"
    rows = json.loads((folder / "vision_action.json").read_text())
    assert np.array(rows).shape == (4, 10)
    (result,) = json.loads((folder / "sample_outputs.json").read_text())["outputs"]
    assert result["files"] == ["vision.mp4", "vision_action.json"]
    assert result["content"]["action"] == rows
    assert "vision_action.json  actions" in capsys.readouterr().out
    forward = ["--action-mode", "forward_dynamics", "--name", "forward"]
    forward += ["--action-path", folder / "vision_action.json"]
    assert generate(tiny_checkpoint, *common, *forward) == 0
    assert sorted(p.name for p in (tmp_path / "forward").glob("vision*")) == ["vision.mp4"]
