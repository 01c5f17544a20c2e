"""``vllm-cosmos3 generate --input`` from the files to the tree of results."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from jsonschema import Draft202012Validator
from limits import HANG
from media_files import clip, file_server
from PIL import Image
from servers import BIN, environment, forking
from terse import terse
from webdataset import WebDataset

from vllm_cosmos3.batch.claims import Claims
from vllm_cosmos3.batch.files import read_batch
from vllm_cosmos3.batch.store import store_at
from vllm_cosmos3.cli import main, whole_parser
from vllm_cosmos3.cli.batch import _ask
from vllm_cosmos3.cli.batch_samples import Checker
from vllm_cosmos3.cli.generate import run_options
from vllm_cosmos3.cli.run_options import open_generator, planner
from vllm_cosmos3.engine import Cosmos3
from vllm_cosmos3.engine_options import EngineOptions
from vllm_cosmos3.media import read_image, read_video
from vllm_cosmos3.reasoner.offline import Answer, Reasoner
from vllm_cosmos3.request.prompts import Facts
from vllm_cosmos3.request.questions import Question
from vllm_cosmos3.request.sizes import aspect_ratio
from vllm_cosmos3.request.upsample import schema_of

FAST = {"size": "64x64", "num_steps": 2, "num_frames": 5, "prompt": "a boat", "seed": 3}
MODES = {
    "t2v": "text2video", "t2i": "text2image", "batch_2": "image2video", "batch_3": "video2video",
    "batch_4": "transfer", "batch_5": "transfer",
}  # fmt: skip
ROOT = Path(__file__).parents[2]
DAYS = 1e6  # seconds


def batch(folder: Path, *records: dict[str, Any]) -> Path:
    file = folder / "batch.jsonl"
    file.write_text("".join(json.dumps(FAST | values) + "\n" for values in records))
    return file


def generate(checkpoint: Path, file: Path, *flags: object) -> int:
    arguments = [checkpoint, "--input", file, "--out", file.parent / "out", *flags]
    return main(["generate", *map(str, arguments)])


def outputs(file: Path, name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(
        (file.parent / "out" / name / "sample_outputs.json").read_text()
    )
    return record


def index(file: Path) -> dict[str, dict[str, Any]]:
    lines = (file.parent / "out" / "index.jsonl").read_text().splitlines()
    found = {line["name"]: line for line in map(json.loads, lines)}
    assert len(found) == len(lines)
    return found


def tree(file: Path) -> list[str]:
    out = file.parent / "out"
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())


def loaded_for_days(engine: EngineOptions) -> Cosmos3:
    """A generator that has taken that long to load, by its own word."""
    model = open_generator(engine)
    model.load_seconds = DAYS
    return model


def test_a_tree_of_results(
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("vllm_cosmos3.cli.batch.open_generator", loaded_for_days)
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "first.png")
    clip(tmp_path / "clip.mp4", frames=9)
    file = batch(
        tmp_path,
        {"name": "t2v", "enable_sound": True, "video_save_quality": 5},
        {"name": "t2i", "num_frames": 1, "model_mode": "text2image", "image_save_quality": 50},
        {"vision_path": "first.png"},
        {"vision_path": "clip.mp4", "model_mode": "video2video", "num_frames": 13},
        {"vision_path": "clip.mp4", "model_mode": "video2video", "edge": {"weight": 0.5}},
        {"model_mode": "video2video", "depth": {"control_path": "clip.mp4"}, "num_chunks": None},
    )
    assert generate(tiny_checkpoint, file) == 0
    records = ("sample_args.json", "sample_outputs.json")
    assert tree(file) == sorted(
        [f"{name}/{record}" for name in MODES for record in records]
        + ["index.jsonl", "t2i/vision.jpg"] + [f"{name}/vision.mp4" for name in MODES if name != "t2i"]
    )  # fmt: skip
    assert {name: outputs(file, name)["args"]["mode"] for name in MODES} == MODES
    assert outputs(file, "batch_4")["args"]["edge"]["control_weight"] == 0.5
    assert outputs(file, "t2v")["args"]["crf"] == 25
    assert outputs(file, "t2v")["outputs"][0]["content"]["sample_rate"] == 48000
    assert outputs(file, "batch_2")["args"]["image"] == str(tmp_path / "first.png")
    timings = outputs(file, "t2v")["timings"]  # its own: the model is loaded once for all
    assert "model_load" not in timings
    own = sum(seconds for name, seconds in timings.items() if name not in ("per_step", "total"))
    assert own * 0.99 <= timings["total"] < DAYS
    printed = capsys.readouterr()
    assert "6 of 6 records have their results" in printed.out
    assert "6 of 6 done, 0 failed" in printed.err
    lines = index(file)
    assert list(lines) == list(MODES)
    assert lines["t2v"]["timings"] == timings
    assert (lines["t2v"]["files"], lines["t2v"]["seeds"]) == (["t2v/vision.mp4"], [3])
    assert {line["error"] for line in lines.values()} == {None}


def test_resume_serves_what_is_new_or_has_changed(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = batch(tmp_path, {"name": "a"}, {"name": "b"}, {"name": "c"})
    assert generate(tiny_checkpoint, file) == 0
    times = {name: (tmp_path / "out" / name / "vision.mp4").stat().st_mtime_ns for name in "abc"}
    (tmp_path / "out" / "c" / "vision.mp4").unlink()
    batch(tmp_path, {"name": "a"}, {"name": "b", "seed": 4}, {"name": "c"}, {"name": "d"})
    assert generate(tiny_checkpoint, file, "--resume") == 0
    fresh = {
        name
        for name in "abcd"
        if (tmp_path / "out" / name / "vision.mp4").stat().st_mtime_ns != times.get(name)
    }
    assert fresh == {"b", "c", "d"}
    assert "1 of 4 records were finished before" in capsys.readouterr().err
    for flags in (
        ("--load-format", "dummy"),
        ("--quantization", "fp8"),
        ("--vae-parallel", "tile"),
    ):
        assert generate(tiny_checkpoint, file, "--resume", *flags) == 0
        assert "records were finished before" not in capsys.readouterr().err


SHORT = {"num_steps": 1, "guidance": 1}


def test_resume_serves_what_continues_something_new(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = SHORT | {"seed": None}
    file = batch(tmp_path, {"name": "a", **drawn}, {"name": "b", "continue_from": "a", **drawn})
    assert generate(tiny_checkpoint, file) == 0
    shutil.copytree(tmp_path / "out" / "b", tmp_path / "old")
    shutil.rmtree(tmp_path / "out" / "a")
    assert generate(tiny_checkpoint, file, "--resume") == 0
    assert "records were finished before" not in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out" / "b")
    (tmp_path / "old").rename(tmp_path / "out" / "b")  # as if the second run had ended after a
    assert generate(tiny_checkpoint, file, "--resume") == 0
    assert "1 of 2 records were finished before" in capsys.readouterr().err
    assert generate(tiny_checkpoint, file, "--resume") == 0
    assert "2 of 2 records were finished before" in capsys.readouterr().err


def test_resume_looks_into_files(
    tiny_checkpoint: Path, tmp_path: Path, web: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first, fetched = tmp_path / "first.png", tmp_path / "web" / "first.png"
    Image.new("RGB", (64, 64), "teal").save(first)
    control = clip(tmp_path / "control.mp4", frames=5)
    file = batch(
        tmp_path,
        {"vision_path": "first.png", **SHORT},
        {"vision_path": f"{web}/first.png", **SHORT},
        {"depth": {"control_path": "control.mp4"}, **SHORT},
    )
    assert generate(tiny_checkpoint, file) == 0
    assert generate(tiny_checkpoint, file, "--resume") == 0
    assert "3 of 3 records were finished before" in capsys.readouterr().err
    for changed in (first, fetched, control):
        before, times = changed.read_bytes(), changed.stat()
        changed.write_bytes(before + b"\0")  # what it shows stays
        os.utime(changed, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert generate(tiny_checkpoint, file, "--resume") == 0
        assert "2 of 3 records were finished before" in capsys.readouterr().err


def test_nothing_starts_while_a_record_is_invalid(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    file = batch(
        tmp_path, {"name": "good"}, {"num_steps": 999}, {"vision_path": "broken.png"}, {"fsp": 1},
        {"enable_sound": "yes"}, {"model_mode": "reasoner", "top_p": 7.0},
    )  # fmt: skip
    assert generate(tiny_checkpoint, file) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ", 2)[1].rsplit("/", 1)[1] for line in lines] == [
        f"batch.jsonl line {number}" for number in range(2, 7)
    ]
    for line, words in zip(
        lines, ("num_steps is 999", "vision_path is ", "unknown field fsp; did you mean fps?", "enable_sound is 'yes'", "top_p is 7.0"), strict=True,
    ):  # fmt: skip
        assert words in line
    refused = [f"batch_{index}" for index in range(1, 6)]
    files = ("sample_args.json", "sample_outputs.json")
    assert tree(file) == [f"{name}/{record}" for name in refused for record in files]
    for name, line in zip(refused, lines, strict=True):
        record = outputs(file, name)
        assert (record["status"], record["outputs"]) == ("error", [])
        assert line.endswith(record["message"])
        assert record["args"]["name"] == name


def test_a_record_that_is_refused_is_recorded_where_nothing_else_is(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    file = tmp_path / "batch.json"
    fast = {**FAST, "num_frames": 1, "num_steps": 1}
    records = [{**fast, "name": "a"}, 7, {**fast, "name": "a", "fps": -1}, {**fast, "name": "../b"}]
    text = json.dumps([*records, {**fast, "name": "é", "size": "63x64"}])
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())  # as Windows writes UTF-8
    assert generate(tiny_checkpoint, file, "--dry-run") == 2
    assert not (tmp_path / "out").exists()
    assert generate(tiny_checkpoint, file, "--keep-going") == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "a", "batch_1", "é", "index.jsonl",
    }  # fmt: skip
    assert outputs(file, "a")["status"] == "success"
    assert outputs(file, "batch_1")["args"] == {"name": "batch_1"}
    assert outputs(file, "é")["message"].startswith(f"{file} record 5 (é): size is '63x64'")
    file.write_text(json.dumps([{**fast, "name": "a", "fps": -1}]))  # it was made before
    assert generate(tiny_checkpoint, file, "--resume") == 2
    assert outputs(file, "a")["status"] == "error"


def test_keep_going_past_invalid_and_failing_records(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = batch(tmp_path, {"name": "bad", "fps": 0}, {"name": "blocked"}, {"name": "good"})
    (tmp_path / "out" / "blocked" / "vision.mp4").mkdir(parents=True)  # cannot be written
    assert generate(tiny_checkpoint, file, "--keep-going") == 1
    assert outputs(file, "good")["status"] == "success"
    assert "fps is 0" in outputs(file, "bad")["message"]
    failed = outputs(file, "blocked")
    assert (failed["status"], failed["outputs"]) == ("error", [])
    assert "directory" in failed["message"]
    assert "Traceback" in failed["stack_trace"]
    assert "1 of 3 records have their results" in capsys.readouterr().out
    lines = index(file)
    assert "directory" in lines["blocked"]["error"]
    assert "fps is 0" in lines["bad"]["error"]
    assert not (tmp_path / "out" / ".cosmos3").exists()

    batch(tmp_path, {"name": "blocked"}, {"name": "later"})
    assert generate(tiny_checkpoint, file) == 1
    assert not (tmp_path / "out" / "later" / "sample_outputs.json").exists()
    assert "stopped at the first failure" in capsys.readouterr().err


def test_dry_run_prints_every_parameter(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = batch(tmp_path, {"shift": 4}, {"fps": 12})
    assert generate(tiny_checkpoint, file, "--timings-json", "t.json") == 2
    assert "each sample_outputs.json has its timings" in capsys.readouterr().err
    assert generate(tiny_checkpoint, file, "--dry-run", "--steps", 7) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["flow_shift"], second["fps"], second["name"]) == (4.0, 12.0, "batch_1")
    assert first["num_inference_steps"] == second["num_inference_steps"] == 7
    assert not (tmp_path / "out").exists()


def test_every_warning_is_said_once(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = batch(tmp_path, {"num_frames": 6, "sigma_max": 200.0})
    for flags in (["--dry-run"], []):
        assert generate(tiny_checkpoint, file, *flags) == 0
        said = capsys.readouterr().err
        for words in ("6 is rounded up to 9 (4k+1)", "sigma_max has no effect"):
            assert said.count(words) == 1
            assert f"warning: {file} line 1: " in said


def test_empty_files_are_a_mistake(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(tiny_checkpoint, batch(tmp_path)) == 2
    assert "files with at least one record" in capsys.readouterr().err


def test_a_record_continues_another(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = batch(
        tmp_path, {"name": "a"}, {"name": "b", "continue_from": "a", "video_save_quality": 1}
    )
    assert generate(tiny_checkpoint, file, "--guidance-scale", 1, "--crf", 0) == 0
    last = read_image(tmp_path / "out" / "a" / "last.png")
    alone = Cosmos3(tiny_checkpoint).generate(
        prompt="a boat", image=last, size="64x64", num_frames=5, num_inference_steps=2, seed=3,
        guidance_scale=1.0,
    )  # fmt: skip
    alone.save(tmp_path / "alone.mp4", crf=0)
    made = read_video(tmp_path / "out" / "b" / "vision.mp4", frames=9)
    assert np.array_equal(made, read_video(tmp_path / "alone.mp4", frames=9))
    assert not (tmp_path / "out" / "b" / "last.png").exists()

    flags = ("--guidance-scale", 1, "--crf", 0, "--resume")
    assert generate(tiny_checkpoint, file, *flags) == 0
    assert "2 of 2 records were finished before" in capsys.readouterr().err
    picture = {"name": "a", "num_frames": 1}
    batch(tmp_path, picture, {"continue_from": "a"}, {"name": "c"}, {"continue_from": "c", "n": 2})
    assert generate(tiny_checkpoint, file) == 2
    assert "continue_from is 'a', must be the name of a valid record that makes one video" in (
        capsys.readouterr().err
    )


def test_what_is_shown_beside_a_video_is_not_continued(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    clip(tmp_path / "control.mp4", frames=5)
    shown = {"show_control_condition": True, "depth": {"control_path": "control.mp4"}}
    file = batch(
        tmp_path, {"name": "a", **shown, **SHORT}, {"name": "b", "continue_from": "a", **SHORT}
    )
    assert generate(tiny_checkpoint, file, "--crf", 0) == 0
    video = read_video(tmp_path / "out" / "a" / "vision.mp4", frames=9)
    last = read_image(tmp_path / "out" / "a" / "last.png")
    assert (video.shape, last.shape) == ((5, 64, 128, 3), (64, 64, 3))
    left, right = video[-1][:, :64].astype(int), video[-1][:, 64:].astype(int)
    assert (
        np.abs(right - last).mean() < np.abs(left - last).mean() / 2
    )  # colours of H.264 are coarse
    assert not [text for text in outputs(file, "b")["warnings"] if "loses" in text]


def test_an_external_launcher_is_one(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = batch(tmp_path, {"name": "a"}, {"continue_from": "a"})
    launched = ("--distributed-executor-backend", "external_launcher")
    assert generate(tiny_checkpoint, file, *launched) == 2
    assert "must be left out, or used under torchrun" in capsys.readouterr().err


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """An address where a picture is."""
    folder = tmp_path / "web"
    folder.mkdir()
    Image.new("RGB", (64, 64), "teal").save(folder / "first.png")
    with file_server(folder) as url:
        yield url


def test_urls(
    tiny_checkpoint: Path, tmp_path: Path, web: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = batch(tmp_path, {"name": "a", "vision_path": f"{web}/first.png"})
    assert generate(tiny_checkpoint, file) == 0
    assert outputs(file, "a")["args"]["mode"] == "image2video"
    capsys.readouterr()
    batch(tmp_path, {"name": "b", "vision_path": f"{web}/a b.png?key=secret"})
    assert generate(tiny_checkpoint, file) == 1
    said = "".join(x for x in capsys.readouterr().err.splitlines() if "GET" not in x)
    assert "a b.png', must be a URL that can be fetched (no such file)" in said
    assert "secret" not in said + "".join(
        path.read_text() for path in (tmp_path / "out").rglob("*.json*")
    )


def test_inputs_and_results_of_other_file_systems(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = fsspec.filesystem("memory")
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "first.png")
    memory.put_file(str(tmp_path / "first.png"), "/in/first.png")
    memory.pipe_file("/in/prompt.txt", b"a boat")
    records = [
        {**FAST, "prompt": None, "prompt_path": "prompt.txt", "name": "a"},
        {**FAST, "vision_path": "first.png", "name": "b"},
        {**FAST, "continue_from": "b", "name": "c"},
        {
            **FAST,
            "vision_path": (tmp_path / "first.png").as_uri(),
            "name": "d",
            "num_outputs": 2,
            "num_frames": 5,
        },
    ]
    memory.pipe_file("/in/x.jsonl", "\n".join(map(json.dumps, records)).encode())
    command = ["generate", str(tiny_checkpoint), "--input", "memory://in/*.jsonl", "--out"]
    assert main([*command, "memory://out"]) == 0
    assert "4 of 4 records have their results in memory://out" in capsys.readouterr().out
    assert sorted(memory.find("/out")) == [
        *(f"/out/{file}" for file in ("a/sample_args.json", "a/sample_outputs.json", "a/vision.mp4")),
        *(f"/out/b/{file}" for file in ("last.png", "sample_args.json", "sample_outputs.json", "vision.mp4")),
        *(f"/out/c/{file}" for file in ("sample_args.json", "sample_outputs.json", "vision.mp4")),
        *(f"/out/d/{file}" for file in ("sample_args.json", "sample_outputs.json", "vision-0.mp4", "vision-1.mp4")),
        "/out/index.jsonl",
    ]  # fmt: skip
    lines = [json.loads(line) for line in memory.cat_file("/out/index.jsonl").splitlines()]
    assert [line["seeds"] for line in lines] == [[3], [3], [3], [3, 4]]
    assert lines[3]["files"] == ["d/vision-0.mp4", "d/vision-1.mp4"]
    memory.rm_file("/out/c/vision.mp4")
    assert main([*command, "memory://out", "--resume"]) == 0
    assert "3 of 4 records were finished before" in capsys.readouterr().err
    assert main([*command, "hf://datasets/a/b/../c?token=secret"]) == 2
    assert "secret" not in capsys.readouterr().err


def test_inputs_and_results_on_s3(
    tiny_checkpoint: Path, s3: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """With the credentials of the environment, which are said and recorded nowhere."""
    system = fsspec.filesystem("s3")
    records = [{**FAST, "name": "a"}, {**FAST, "name": "b", "prompt": "a kite"}]
    system.pipe_file(f"{s3}/in/x.jsonl", "\n".join(map(json.dumps, records)).encode())
    command = ["generate", str(tiny_checkpoint), "--input", f"{s3}/in/*.jsonl"]
    command += ["--out", f"{s3}/out", "--resume"]
    assert main(command) == 0
    bucket = s3.removeprefix("s3://")
    files = ("sample_args.json", "sample_outputs.json", "vision.mp4")
    made = [f"{bucket}/out/{name}/{file}" for name in ("a", "b") for file in files]
    assert sorted(system.find(f"{s3}/out")) == [*made, f"{bucket}/out/index.jsonl"]
    lines = [json.loads(line) for line in system.cat_file(f"{s3}/out/index.jsonl").splitlines()]
    assert {line["name"]: line["status"] for line in lines} == {"a": "success", "b": "success"}
    assert main(command) == 0
    said = capfd.readouterr()
    assert "2 of 2 records were finished before" in said.err
    system.invalidate_cache()
    everything = b"".join(map(system.cat_file, system.find(f"{s3}/out")))
    for secret in (os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]):
        assert secret not in said.out + said.err
        assert secret.encode() not in everything


@pytest.mark.filterwarnings("ignore")  # of the reader, which leaves its files to be collected
def test_results_in_shards_of_webdataset(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = {"num_frames": 1, "num_steps": 1}
    records = [{"name": name, **picture} for name in ("a", "b.c", "d", "e")]
    file = batch(tmp_path, *records, {"name": "f", **picture, "num_outputs": 2})
    out, packed = tmp_path / "out", ("--format", "webdataset", "--shard-size", 2)
    assert generate(tiny_checkpoint, file, *packed) == 0
    shards = [f"shard-{number:06d}" for number in range(3)]
    assert tree(file) == sorted(
        ["index.jsonl", *(f"{shard}.{end}" for shard in shards for end in ("tar", "jsonl"))]
    )
    assert not [path for path in out.iterdir() if path.is_dir()]
    lines = index(file)
    assert [lines[name]["shard"] for name in ("a", "b.c", "d", "e", "f")] == [
        f"{shard}.tar" for shard in [shards[0], shards[0], shards[1], shards[1], shards[2]]
    ]
    urls = [str(out / f"{shard}.tar") for shard in shards]
    samples = list(WebDataset(urls, shardshuffle=False, empty_check=False).decode("rgb8"))
    assert [sample["__key__"] for sample in samples][2:] == ["d", "e", "f-0", "f-1"]
    assert [sample["json"]["content"]["seed"] for sample in samples] == [3, 3, 3, 3, 3, 4]
    assert {sample["jpg"].shape for sample in samples} == {(64, 64, 3)}
    assert {sample["txt"] for sample in samples} == {"a boat"}

    assert generate(tiny_checkpoint, file, *packed) == 2
    assert "there are shards in it" in capsys.readouterr().err
    (out / "shard-000001.jsonl").unlink()  # as if a run had been killed before it wrote the lines
    assert generate(tiny_checkpoint, file, *packed, "--resume") == 0
    assert "3 of 5 records were finished before" in capsys.readouterr().err
    numbers = [lines["shard"] for lines in map(index(file).get, ("d", "e")) if lines]
    assert numbers == ["shard-000003.tar"] * 2
    batch(tmp_path, {"name": "a"}, {"continue_from": "a"})
    assert generate(tiny_checkpoint, file, *packed) == 2
    assert (
        "continue_from is 'a', must be left out with --format webdataset" in capsys.readouterr().err
    )


def test_shards_are_parts_of_one_batch(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = [{"name": name, **SHORT} for name in "abc"]
    file = batch(tmp_path, *first, {"name": "d", "continue_from": "a", **SHORT})
    assert generate(tiny_checkpoint, file, "--shard", "3/2") == 2
    assert "shard is '3/2', must be I/N" in capsys.readouterr().err
    assert generate(tiny_checkpoint, file, "--shard", "1/2") == 0
    assert "3 of 3 records have" in capsys.readouterr().out
    assert generate(tiny_checkpoint, file, "--shard", "2/2") == 0
    assert "1 of 1 records have" in capsys.readouterr().out
    out = tmp_path / "out"
    names = [
        [json.loads(line)["name"] for line in part.read_text().splitlines()]
        for part in sorted(out.glob("index-*"))
    ]
    assert names == [["b", "a", "d"], ["c"]]
    assert [path.name for path in sorted(out.glob("index*"))] == [
        "index-00001-of-00002.jsonl", "index-00002-of-00002.jsonl",
    ]  # fmt: skip
    assert generate(tiny_checkpoint, file, "--resume") == 0
    assert "4 of 4 records were finished before" in capsys.readouterr().err


def test_two_runs_on_one_output_and_one_that_died(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = batch(tmp_path, *({"name": name, **SHORT} for name in "abc"))
    other = Claims(store_at(str(tmp_path / "out")))
    other.start((0, 1))
    assert other.take("b")
    assert generate(tiny_checkpoint, file) == 2
    assert "another run is writing to it" in capsys.readouterr().err
    (tmp_path / "out" / "index.jsonl").write_text('{"name": "b"}\n')  # by the other run
    assert generate(tiny_checkpoint, file, "--resume", "--keep-going") == 0
    said = capsys.readouterr().out
    assert "2 of 3 records have" in said
    assert "1 are being made by another run" in said
    assert list(index(file)) == ["b", "a", "c"]

    other._stopped.set()
    assert other._thread is not None
    other._thread.join()  # which would write its file anew
    state = tmp_path / "out" / ".cosmos3" / "runs" / f"{other.run}.json"
    died = json.loads(state.read_text()) | {"started": "1"}  # another process has its number now
    state.write_text(json.dumps(died))
    (tmp_path / "out" / "b").mkdir()
    (tmp_path / "out" / "b" / ".cafe.part").write_bytes(b"half a video")
    assert generate(tiny_checkpoint, file, "--resume") == 0
    assert "2 of 3 records were finished before" in capsys.readouterr().err
    assert sorted(index(file)) == ["a", "b", "c"]
    assert tree(file) == sorted(
        ["index.jsonl"]
        + [f"{name}/{x}" for name in "abc" for x in ("sample_args.json", "sample_outputs.json", "vision.mp4")]
    )  # fmt: skip
    assert not (tmp_path / "out" / ".cosmos3").exists()


def test_pictures_of_questions_are_read_before_the_reasoner_starts(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("broken.png", "broken.mp4"):
        (tmp_path / name).write_bytes(b"nothing to see")
    ask = {"model_mode": "reasoner"}
    file = batch(
        tmp_path,
        *({"vision_path": f"broken.{suffix}", **ask} for suffix in ("png", "mp4")),
        {"name": "good", **ask},
    )
    assert generate(tiny_checkpoint, file, "--dry-run") == 2
    picture, video = capsys.readouterr().err.splitlines()
    assert "line 1: vision_path is" in picture
    assert "must be a complete PNG" in picture
    assert "line 2: vision_path is" in video


def test_a_dry_run_says_what_is_wrong_in_the_order_of_lines(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = {"prompt": "a", "size": "64x64", "num_frames": 1}
    lines = [{**odd, "fps": -1}, {**odd, "size": "4096x4096"}] * 5 + [{**odd, "seed": "x"}]
    assert generate(tiny_checkpoint, batch(tmp_path, *lines), "--dry-run") == 2
    printed = capsys.readouterr()
    found = [
        int(line.split(" line ")[1].split()[0].rstrip(":")) for line in printed.err.splitlines()
    ]
    assert found == list(range(1, 12))
    assert printed.out == ""
    assert generate(tiny_checkpoint, tmp_path / "none.jsonl", "--dry-run") == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.search(r": --input is '/.*, must be a file that can be read", printed.err)


def test_no_frame_is_shown_that_is_not_made_yet(tiny_checkpoint: Path, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "first.png")
    file = batch(
        tmp_path,
        {"name": "a", "vision_path": "first.png", "upsample_prompt": True},
        {"name": "b", "continue_from": "a", "upsample_prompt": True},
    )
    command = ["generate", str(tiny_checkpoint), "--dry-run"]
    options = run_options(whole_parser(["generate"]).parse_args(command))
    records = read_batch([str(file)], {}).records
    checked = Checker(planner(EngineOptions(tiny_checkpoint)), options).check(records)
    assert not checked.refused
    first, second = (sample.upsampling for sample in checked.samples)
    assert first is not None
    assert second is not None
    assert (first.image, second.image) == (str(tmp_path / "first.png"), None)


def test_a_step_at_a_bound_of_an_interval_is_said(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The framework's intervals are open, ours are closed: omni_mot_model.py, `lo < t < hi`.

    The first timestep of the native schedule is 999, whatever the shift.
    """
    small = {"prompt": "a", "size": "64x64", "num_frames": 1, "num_inference_steps": 2}
    file = batch(
        tmp_path,
        {"name": "met", **small, "guidance_interval": [400, 999]},
        {"name": "missed", **small, "guidance_interval": [400, 1000]},
        {"name": "unguided", **small, "guidance_interval": [400, 999], "guidance": 1},
    )
    command = ["generate", str(tiny_checkpoint), "--dry-run"]
    options = run_options(whole_parser(["generate"]).parse_args(command))
    checker = Checker(planner(EngineOptions(tiny_checkpoint)), options)
    found = {
        sample.record.name: [text for text in sample.warnings if "bound" in text]
        for record in read_batch([str(file)], {}).records
        for sample in checker.check((record,)).samples
    }
    assert found == {
        "met": [
            "guidance_interval [400, 999] has step 1 (timestep 999) at a bound: it is guided here, and "
            "not in the Cosmos Framework, which leaves bounds out"
        ],
        "missed": [],
        "unguided": [],
    }


class NoVowels(Reasoner):
    """Answers with the question, if it has no vowel."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        self.calls.append(len(questions))
        for question in questions:
            if set(question.prompt) & set("aeiou"):
                raise RuntimeError(question.prompt)
        return [Answer(text=q.prompt, tokens=1, complete=True) for q in questions]


def test_a_question_that_fails_spoils_no_other() -> None:
    reasoner = NoVowels()
    asked = _ask(reasoner, [Question(prompt=text) for text in ("b", "no", "d")])
    assert [x.text if isinstance(x, Answer) else repr(x) for x in asked] == [
        "b", "RuntimeError('no')", "d",
    ]  # fmt: skip
    assert reasoner.calls == [3, 1, 1, 1]
    assert len(_ask(reasoner, [Question(prompt=text) for text in "bcd"])) == 3
    assert reasoner.calls[4:] == [3]


@pytest.mark.serve
def test_the_reasoner_answers_its_records_and_writes_prompts(
    tiny_checkpoint_fp32: Path, tmp_path: Path, vllm_cache: Path
) -> None:
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "first.png")
    clip(tmp_path / "clip.mp4", frames=9)
    ask = {"model_mode": "reasoner", "enable_sound": False, "max_new_tokens": 8}
    file = batch(
        tmp_path,
        {"name": "video"},
        {"name": "text", **ask},
        {"name": "image", **ask, "vision_path": "first.png", "do_sample": True, "temperature": 0.6},
        {"name": "clip", **ask, "vision_path": "clip.mp4", "video_fps": 4},
        {"name": "written", "num_frames": 1, "prompt_upsampling": True},
        {"name": "cut", "prompt_upsampling": True, "prompt_upsampler_max_tokens": 9},
        {"name": "long", **ask, "prompt": "boat " * 40_000},
        {"name": "long_prompt", "prompt_upsampling": True, "prompt": "boat " * 40_000},
    )
    checkpoint = terse(tiny_checkpoint_fp32, tmp_path / "terse")
    command = [BIN / "vllm-cosmos3", "generate", checkpoint, "--dtype", "float32"]
    command += ["--input", file, "--out", tmp_path / "out", "--enforce-eager", "--keep-going"]
    done = subprocess.run(
        [str(word) for word in command], check=False, capture_output=True, text=True, timeout=HANG,
        env=forking(vllm_cache),
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "5 of 8 records have their results" in done.stdout
    for name in ("long", "long_prompt"):
        assert "32768" in outputs(file, name)["message"]
    for name in ("text", "image", "clip"):
        content = outputs(file, name)["outputs"][0]["content"]
        text = (tmp_path / "out" / name / "reasoner_text.txt").read_text()
        assert content == {"text": text, "tokens": 8, "complete": False}
        assert text.strip()
    assert outputs(file, "video")["outputs"][0]["files"] == ["vision.mp4"]
    written = outputs(file, "written")["args"]
    assert written["original_prompt"] == "a boat"
    width, height = map(int, written["size"].split("x"))
    facts = Facts(num_frames=1, fps=24, height=height, width=width, aspect_ratio=aspect_ratio(width, height))  # fmt: skip
    Draft202012Validator(schema_of(facts)).validate(json.loads(written["prompt"]))
    assert "was cut at its longest length" in outputs(file, "cut")["message"]


def test_the_example(tiny_checkpoint: Path, tmp_path: Path, vllm_cache: Path) -> None:
    script = ROOT / "examples" / "batch" / "run.sh"
    assert len(script.read_text().splitlines()) <= 40
    command = ["sh", script, tiny_checkpoint, tmp_path, "--size", "64x64", "--steps", "2"]
    path = os.pathsep.join([str(BIN), os.environ["PATH"]])
    done = subprocess.run(
        [str(word) for word in command], check=False, capture_output=True, text=True, timeout=HANG,
        env=environment(vllm_cache) | {"PATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 of 3 records have their results" in done.stdout
    assert len(read_video(tmp_path / "boat_goes_on" / "vision.mp4", frames=99)) == 25
