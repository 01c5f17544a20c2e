"""Results on disk: the folder of a sample, its media, and the two JSON records beside them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

from vllm_cosmos3.cli.run_options import RunOptions
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.files import write_text
from vllm_cosmos3.progress import Report
from vllm_cosmos3.request.request import GenerateRequest

if TYPE_CHECKING:
    import numpy as np

    from vllm_cosmos3.engine import Cosmos3, Output, Sample

ARGUMENTS, OUTPUTS = "sample_args.json", "sample_outputs.json"
PER_STEP = "per_step"  # the timing of one step, which is a part of denoise


def sample_folder(out: Path, name: str) -> Path:
    """``out/name``, made now: an unwritable place should fail before minutes of work."""
    from vllm_cosmos3.batch.records import check_name

    check_name(name)
    folder = out / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InvalidRequest("out", str(out), f"a folder to write to ({error.strerror})") from None
    return folder


def check_file(field: str, path: Path) -> None:
    """Refuse now what could not be written after minutes of work.

    Raises:
        InvalidRequest: ``path`` is a folder, or its folder is missing or not to be written to.
    """
    try:
        new = not path.exists()
        path.open("ab").close()
        if new:
            path.unlink(missing_ok=True)
    except OSError as error:
        possible = f"a file that can be written ({error.strerror})"
        raise InvalidRequest(field, str(path), possible) from None


def generate(
    model: Cosmos3,
    request: GenerateRequest,
    options: RunOptions,
    folder: Path,
    *,
    report: Report | bool | None,
) -> tuple[Output, list[Path], dict[str, float]]:
    """Run the request and write its media. Returns the files and the timings but for the load."""
    from vllm_cosmos3.media import Clip

    clip = Clip(path=folder / "vision.mp4", crf=options.crf)
    output = model.generate(request, progress=report, clip=clip)
    start = time.perf_counter()
    name = "latents" if output.latents is not None else "vision"
    if output.image is not None:
        name = f"vision.{options.image_type}"
    files = output.save(folder / name, crf=options.crf, quality=options.image_quality)
    seconds = time.perf_counter() - start
    phases = dict(output.timings)
    del phases["model_load"]
    total = phases.pop("total") + seconds
    return output, files, {**phases, "save": seconds, "total": total}


def write(
    options: RunOptions,
    folder: Path,
    output: Output,
    files: list[Path],
    timings: Mapping[str, float],
    original_prompt: str | None,
) -> None:
    """The two JSON records beside the media, and what the user reads.

    ``original_prompt`` is the one that the reasoner has rewritten, None where it has not.
    """
    arguments, record = described(options, output, files, timings, original_prompt)
    write_json(folder / ARGUMENTS, arguments)
    write_json(folder / OUTPUTS, record)
    if options.timings_json:
        write_json(options.timings_json, dict(timings))
    for file, sample in zip(files, output.samples, strict=False):
        print(f"{file}  {sample.described(output.fps, output.sample_rate)}")
    for file in files[len(output.samples) :]:
        print(f"{file}  actions")
    print("\n".join(_table(timings)))
    if output.reused_steps:
        print(f"{'reused':12} {output.reused_steps:6} steps of the step cache")
    print(f"{'peak memory':12} {output.peak_memory / 2**30:10.3f} GiB")


def described(
    options: RunOptions,
    output: Output,
    files: list[Path],
    timings: Mapping[str, float],
    original_prompt: str | None,
) -> tuple[dict[str, object], dict[str, object]]:
    """The parameters of a result, and the record of what it is."""
    engine = options.engine
    settings: dict[str, object] = {"model": str(engine.model), "dtype": engine.dtype}
    settings |= {"name": options.name, "crf": options.crf}
    if original_prompt is not None:
        settings["original_prompt"] = original_prompt
    arguments = {**settings, **output.effective}
    names = [file.name for file in files]
    record: dict[str, object] = {
        "status": "success",
        "message": "",
        "args": arguments,
        "outputs": [
            {
                "content": {"seed": sample.seed, **_content(output, sample)},
                "files": names[index :: len(output.samples)],  # the media, then the actions
            }
            for index, sample in enumerate(output.samples)
        ],
        "warnings": list(output.warnings),
        "timings": dict(timings),
        "peak_memory_bytes": output.peak_memory,
        "reused_steps": output.reused_steps,
        "batch_size": output.batch_size,
    }
    return arguments, record


def write_json(path: Path, value: object) -> None:
    """A file of JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def _table(timings: Mapping[str, float]) -> Iterator[str]:
    """Seconds by phase, which add up; those of one step are indented under all of them."""
    for name, seconds in timings.items():
        if name != PER_STEP:
            yield f"{name:12} {seconds:10.3f} s"
        if name == "denoise" and PER_STEP in timings:
            yield f"  {PER_STEP:10} {timings[PER_STEP]:10.3f} s"


def _content(output: Output, sample: Sample) -> dict[str, object]:
    """What the files of a result hold, in numbers."""
    actions = {} if sample.action is None else {"action": sample.action.tolist()}
    return {**_picture(output, sample), **actions}


def _picture(output: Output, sample: Sample) -> dict[str, object]:
    if sample.video is not None:
        frames, height, width, _ = sample.video.shape
        sound = {} if sample.sound is None else {"sample_rate": output.sample_rate}
        seconds = frames / output.fps
        size = {"width": width, "height": height}
        return {**size, "num_frames": frames, "fps": output.fps, "seconds": seconds, **sound}
    if sample.image is not None:
        return {"width": sample.image.shape[1], "height": sample.image.shape[0]}
    return {"latents": {name: list(x.shape) for name, x in _latents(sample).items()}}


def _latents(sample: Sample) -> Mapping[str, np.ndarray]:
    return sample.latents or {}
