"""``vllm-cosmos3 generate``: one request from the command line to files on disk.

The flags of a request are generated from its fields; nothing here checks their values. With
``--input`` the requests come from files, see `batch`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

from vllm_cosmos3.checkpoint.kinds import KINDS
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.request.fields import Spec
from vllm_cosmos3.request.request import SPECS, GenerateRequest, from_fields

if TYPE_CHECKING:
    import numpy as np

    from vllm_cosmos3.engine import Cosmos3, Output, Progress, Sample
    from vllm_cosmos3.reasoner.offline import Reasoner
    from vllm_cosmos3.request.plan import Plan

METAVARS = {
    "text": "TEXT", "int": "N", "float": "X", "size": "WxH", "ints": "I,J,...", "pair": "LOW,HIGH",
    "numbers": "X,Y,...", "rows": "JSON", "image": "FILE", "video": "FILE", "arrays": "FILE.safetensors",
}  # fmt: skip
# What scripts for phyai call our flags.
SPELLINGS = {
    "num_inference_steps": ("--steps",),
    "generate_sound": ("--sound",),
    "condition_frame_indexes_vision": ("--condition-frames",),
    "action_mode": ("--mode",),
    "action_path": ("--action-file",),
}
LAUNCHED = "external_launcher"  # every rank runs this command
KARRAS = {"true": "karras", "false": "diffusers"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = (
        "%(prog)s MODEL --prompt TEXT --out DIR [options]\n"
        "       %(prog)s MODEL --input FILE... --out DIR [options]"
    )
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="checkpoint folder or Hugging Face repository"
    )
    parser.add_argument(
        "--checkpoint", "--checkpoint-path", dest="checkpoint", metavar="MODEL", help="the same"
    )
    batch = parser.add_argument_group("many requests from files")
    batch.add_argument("-i", "--input", nargs="+", metavar="FILE", help="JSON, JSONL or YAML files or globs with records of the Cosmos Framework; flags of a request hold for all of them")  # fmt: skip
    batch.add_argument("--resume", action="store_true", help="skip the records that --out has the results of")  # fmt: skip
    batch.add_argument("--keep-going", action="store_true", help="go on after a record that is invalid or fails")  # fmt: skip
    out = parser.add_argument_group("output")
    out.add_argument("-o", "--out", "--output-dir", dest="out", type=Path, metavar="DIR", help="where to write DIR/NAME/...")  # fmt: skip
    out.add_argument("--name", default="sample", help="folder of this sample (default: sample)")
    out.add_argument("--crf", type=_integer, metavar="N", help="H.264 quality, 0 (lossless) to 51 (default: 18)")  # fmt: skip
    out.add_argument("--image-type", metavar="TYPE", help="png, jpg or webp (default: png; jpg with --input)")  # fmt: skip
    out.add_argument("--image-quality", type=_integer, metavar="N", help="of jpg and webp, 0 to 100 (default: 95)")  # fmt: skip
    out.add_argument(
        "--timings-json", type=Path, metavar="FILE", help="also write the timings here"
    )
    out.add_argument("--dry-run", action="store_true", help="check the request, print every resolved parameter as JSON, load no weights")  # fmt: skip
    out.add_argument("--print-defaults", action="store_true", help="print the defaults of every mode and exit")  # fmt: skip
    run = parser.add_argument_group("model and device")
    run.add_argument("--revision", help="branch, tag or commit of the repository")
    run.add_argument("--dtype", default="bfloat16", help="bfloat16, float16 or float32 (default: bfloat16)")  # fmt: skip
    run.add_argument("--device", help="such as cuda or cpu (default: what vLLM is built for)")
    run.add_argument("--tensor-parallel-size", "--tp", type=int, default=1, metavar="N", help="ranks that share each layer (default: 1)")  # fmt: skip
    run.add_argument("--cfg-parallel-size", "--cfg", type=int, default=1, metavar="N", help="2: the branches of guidance side by side (default: 1)")  # fmt: skip
    run.add_argument("--ulysses-degree", type=int, default=1, metavar="N", help="ranks that share the tokens (default: 1)")  # fmt: skip
    run.add_argument("--distributed-executor-backend", metavar="NAME", help="who starts several ranks: mp (default), ray, or external_launcher under torchrun")  # fmt: skip
    run.add_argument("--vae-parallel", default="halo", help="halo, tile (less memory, not exact) or off (default: halo)")  # fmt: skip
    run.add_argument("--attention-backend", default="auto", help="auto, or the name of one (default: auto)")  # fmt: skip
    run.add_argument("--load-format", default="auto", help="auto, or dummy for random weights (default: auto)")  # fmt: skip
    run.add_argument("--und-residency", default="auto", help="where the text tower rests: gpu, host, or auto: the host if a default video would not fit otherwise (default: auto)")  # fmt: skip
    run.add_argument("--enable-layerwise-offload", action="store_true", help="keep the generation layers on the host and stream them at every step")  # fmt: skip
    run.add_argument("--memory-limit", type=float, metavar="GIB", help="what each rank may use of its device (default: what is free)")  # fmt: skip
    run.add_argument("--enforce-eager", action="store_true", help="of the reasoner: start sooner and answer more slowly")  # fmt: skip
    run.add_argument("--checkpoint-kind", metavar="KIND", help=f"{', '.join(KINDS)} (default: what its files say)")  # fmt: skip
    request = parser.add_argument_group("request")
    for item in fields(GenerateRequest):
        add_flag(request, item.name, SPECS[item.name], item.default)
    request.add_argument("--upsample-prompt", action="store_true", help="let the checkpoint's reasoner write the structured prompt first")  # fmt: skip
    request.add_argument("--use-karras-sigmas", dest="schedule", type=lambda text: KARRAS.get(text.lower(), text), metavar="{true,false}", help="--schedule karras or diffusers")  # fmt: skip
    request.add_argument("--no-prompt-metadata", action="store_true", help="neither of the two sentences at the end of plain prompts")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    if args.print_defaults:
        print(defaults_table())
        return 0
    args.model = args.model or args.checkpoint
    if args.model is None:
        raise InvalidRequest("model", None, "a checkpoint folder or repository", "missing_required")
    if args.out is None and not args.dry_run:
        raise InvalidRequest("out", None, "a folder for the results", "missing_required")
    if args.input:
        from vllm_cosmos3.cli.batch import run as run_batch

        return run_batch(args)
    settle_formats(args)
    request = from_fields(given(args))
    plan = planner(args)(request)
    if args.dry_run:
        print(json.dumps(dict(plan.effective), indent=2))
        _warn(plan.warnings)
        return 0
    folder = sample_folder(args.out, args.name)
    if args.timings_json is not None:
        check_file("timings_json", args.timings_json)
    with quiet_libraries():
        written = _upsampled(request, plan, args)
    args.original_prompt = None if written is request else request.prompt
    with quiet_libraries(), loaded(args) as model:
        print(f"checkpoint: {plan.effective['checkpoint_kind']}", file=sys.stderr)
        output, files, timings = generate(model, written, args, folder)
        load = model.load_seconds
        timings = {"model_load": load, **timings, "total": load + timings["total"]}
        if files:  # with several processes under torchrun the first one has the results
            write(args, folder, output, files, timings)
            _warn(output.warnings)
    return 0


def loaded(args: argparse.Namespace) -> Cosmos3:
    """The model that the flags describe."""
    from vllm_cosmos3.engine import Cosmos3

    return Cosmos3(
        args.model,
        revision=args.revision,
        dtype=args.dtype,
        device=args.device,
        tensor_parallel_size=args.tensor_parallel_size,
        cfg_parallel_size=args.cfg_parallel_size,
        ulysses_degree=args.ulysses_degree,
        vae_parallel=args.vae_parallel,
        distributed_executor_backend=args.distributed_executor_backend,
        attention_backend=args.attention_backend,
        load_format=args.load_format,
        und_residency=args.und_residency,
        enable_layerwise_offload=args.enable_layerwise_offload,
        memory_limit=args.memory_limit,
        checkpoint_kind=args.checkpoint_kind,
    )


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a request that the flags were given."""
    fields = {name: getattr(args, name) for name in SPECS if getattr(args, name) is not None}
    if args.no_prompt_metadata:
        fields |= {"use_duration_template": False, "use_resolution_template": False}
    if "latents" in fields:
        fields["latents"] = _read_latents(fields["latents"])
    return fields


def planner(args: argparse.Namespace) -> Callable[[GenerateRequest], Plan]:
    """Plans requests with everything but the weights: a mistake should not wait for them."""
    from vllm_cosmos3.checkpoint.config import read_config
    from vllm_cosmos3.checkpoint.hub import resolve
    from vllm_cosmos3.request.planner import make_plan
    from vllm_cosmos3.request.prompts import load_tokenizer

    folder = resolve(args.model, args.revision, weights=False)
    model = read_config(folder, args.checkpoint_kind)
    tokenizer = load_tokenizer(model.path)
    return lambda request: make_plan(request, model, tokenizer)


def open_reasoner(args: argparse.Namespace) -> Reasoner:
    """The reasoner of the same checkpoint. Close it before the generator is loaded."""
    from vllm_cosmos3.reasoner.offline import Reasoner

    if args.distributed_executor_backend == LAUNCHED:
        possible = "another one: under torchrun each rank would start a reasoner of its own"
        field = "distributed_executor_backend"
        raise InvalidRequest(field, LAUNCHED, possible, "unsupported_combination")
    return Reasoner(
        args.model,
        revision=args.revision,
        dtype=args.dtype,
        tensor_parallel_size=args.tensor_parallel_size,
        load_format=args.load_format,
        enforce_eager=args.enforce_eager,
    )


def _upsampled(request: GenerateRequest, plan: Plan, args: argparse.Namespace) -> GenerateRequest:
    """The request with the prompt that the reasoner writes, if the flags ask for one."""
    from vllm_cosmos3.request.upsample import caption_of, question_about

    question = question_about(request, plan.effective, {}) if args.upsample_prompt else None
    if question is None:
        return request
    print("upsample", file=sys.stderr)
    with open_reasoner(args) as reasoner:
        (answer,) = reasoner.ask([question])
    return replace(request, prompt=caption_of(answer.text, complete=answer.complete))


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
    model: Cosmos3, request: GenerateRequest, args: argparse.Namespace, folder: Path
) -> tuple[Output, list[Path], dict[str, float]]:
    """Run the request and write its media. Returns the files and the timings but for the load."""
    from vllm_cosmos3.media import Clip

    clip = Clip(path=folder / "vision.mp4", crf=args.crf)
    with progress_shown(terminal=sys.stderr.isatty()) as report:
        output = model.generate(request, progress=report, clip=clip)
    start = time.perf_counter()
    name = "latents" if output.latents is not None else "vision"
    if output.image is not None:
        name = f"vision.{args.image_type}"
    files = output.save(folder / name, crf=args.crf, quality=args.image_quality)
    seconds = time.perf_counter() - start
    phases = dict(output.timings)
    del phases["model_load"]
    total = phases.pop("total") + seconds
    return output, files, {**phases, "encode": seconds, "total": total}


def write(
    args: argparse.Namespace,
    folder: Path,
    output: Output,
    files: list[Path],
    timings: Mapping[str, float],
) -> None:
    """The two JSON records beside the media, and what the user reads."""
    settings = {"model": str(args.model), "dtype": args.dtype, "name": args.name, "crf": args.crf}
    if args.original_prompt is not None:
        settings["original_prompt"] = args.original_prompt
    arguments = {**settings, **output.effective}
    names = [file.name for file in files]
    record = {
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
    }
    (folder / "sample_args.json").write_text(json.dumps(arguments, indent=2) + "\n")
    (folder / "sample_outputs.json").write_text(json.dumps(record, indent=2) + "\n")
    if args.timings_json:
        args.timings_json.write_text(json.dumps(dict(timings), indent=2) + "\n")
    for file, sample in zip(files, output.samples, strict=False):
        print(f"{file}  {_described(output, sample)}")
    for file in files[len(output.samples) :]:
        print(f"{file}  actions")
    print("\n".join(f"{name:>12} {seconds:10.3f} s" for name, seconds in timings.items()))
    print(f" peak memory {output.peak_memory / 2**30:10.3f} GiB")


def defaults_table() -> str:
    """The defaults that depend on the mode, side by side, all others, and the embodiments."""
    from vllm_cosmos3.request.defaults import DEFAULTS

    rows = {mode: asdict(default) for mode, default in DEFAULTS.items()}
    names = [name for name in next(iter(rows.values())) if name in SPECS]
    lines = [f"{'':32}" + "".join(f"{mode:>13}" for mode in rows)]
    for name in names:
        lines.append(f"{name:32}" + "".join(f"{_shown(row[name]):>13}" for row in rows.values()))
    lines.append("\nin every mode")
    for item in fields(GenerateRequest):
        if item.default is not None:
            lines.append(f"  {item.name:30}{item.default}")
    lines += ["", "with actions", *_embodiments()]
    lines += ["", "with controls; size, length and rate are those of the clips", *_controls()]
    return "\n".join(lines)


def _controls() -> list[str]:
    """The defaults that depend on the control, a line for each that is the only one."""
    from vllm_cosmos3.request.controls import CONTROL_GUIDANCE
    from vllm_cosmos3.request.transfer import default_of

    names = ("guidance_scale", "num_video_frames_per_chunk", "max_frames")
    lines = [f"  {'control':22}" + "".join(f"{name:>28}" for name in ("control_guidance", *names))]
    for hint, strength in {**CONTROL_GUIDANCE, "several": 1.0}.items():
        default = default_of((hint,))
        values = (strength, default.guidance, default.chunk, default.limit)
        lines.append(f"  {hint:22}" + "".join(f"{value:>28g}" for value in values))
    return lines


def _embodiments() -> list[str]:
    """The defaults that depend on the embodiment, a line for each."""
    from vllm_cosmos3.request.embodiments import EMBODIMENTS

    names = ("raw_action_dim", "fps", "action_chunk_size", "image_size", "view_point")
    lines = [f"  {'domain_name':22}" + "".join(f"{name:>19}" for name in names)]
    for row in EMBODIMENTS:
        values = [_shown(getattr(row, name)) for name in names]
        lines.append(f"  {row.name:22}" + "".join(f"{value:>19}" for value in values))
    return lines


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Errors alone from vLLM and torch: what else they say is for servers and tears the bar.

    A VLLM_LOGGING_LEVEL that the user has set is left to do its work.
    """
    if "VLLM_LOGGING_LEVEL" in os.environ:
        yield
        return
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"  # of a vLLM that is imported or started from here on
    loggers = [logging.getLogger(name) for name in ("vllm", "torch._library.triton")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        del os.environ["VLLM_LOGGING_LEVEL"]
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


@contextmanager
def progress_shown(*, terminal: bool) -> Iterator[Callable[[Progress], None]]:
    """A bar with steps and the time left on a terminal; one line per phase in a log."""
    if not terminal:
        seen: set[str] = set()

        def line(progress: Progress) -> None:
            if progress.phase not in seen:
                seen.add(progress.phase)
                steps = f" {progress.steps} steps" if progress.phase == "denoise" else ""
                print(f"{progress.phase}{steps}", file=sys.stderr)

        yield line
        return

    from tqdm import tqdm

    form = (
        "{desc:8}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"
    )
    with tqdm(desc="encode", total=1, unit="step", bar_format=form, dynamic_ncols=True) as bar:

        def move(progress: Progress) -> None:
            bar.total = progress.steps
            bar.set_description_str(progress.phase, refresh=False)
            if progress.phase == "denoise" and progress.step == 0:
                bar.unpause()  # the time left is that of the steps alone
            bar.update(progress.step - bar.n)
            bar.refresh()

        yield move


# Flags.


def settle_formats(args: argparse.Namespace) -> None:
    """Check how files are to be written, and fill in what was not given."""
    from vllm_cosmos3.generator.output import CRF, IMAGE_SUFFIXES, QUALITY

    args.crf = CRF.checked("crf", 18 if args.crf is None else args.crf)
    quality = 95 if args.image_quality is None else args.image_quality
    args.image_quality = QUALITY.checked("image_quality", quality)
    args.image_type = args.image_type or ("jpg" if args.input else "png")
    if f".{args.image_type}" not in IMAGE_SUFFIXES:
        possible = f"one of {', '.join(suffix[1:] for suffix in IMAGE_SUFFIXES)}"
        raise InvalidRequest("image_type", args.image_type, possible)


def add_flag(group: Any, name: str, spec: Spec, default: object) -> None:
    flags = (f"--{name.replace('_', '-')}", *SPELLINGS.get(name, ()))
    text = f"{spec.help}{_range(spec)}"
    if default is not None:
        text += f" (default: {default})"
    text = text.replace("%", "%%")
    if spec.kind == "bool":
        action = argparse.BooleanOptionalAction
        group.add_argument(*flags, action=action, default=None, help=text)
    elif spec.kind == "hint":
        metavar = "FILE|JSON"
        group.add_argument(*flags, nargs="?", const=True, type=_hint, metavar=metavar, help=text)
    else:
        metavar = METAVARS.get(spec.kind) or "{" + ",".join(map(str, spec.choices)) + "}"
        group.add_argument(*flags, type=_PARSERS.get(spec.kind, str), metavar=metavar, help=text)


def _range(spec: Spec) -> str:
    if spec.kind not in ("int", "float") or spec.high > 2**31 - 1:
        return ""
    low = f"above {spec.low:.10g}" if spec.above else f"{spec.low:.10g}"
    return f", {low} to {spec.high:.10g}"


def _integer(text: str) -> int | str:
    """The number, or the text as it is: the request says what is wrong with it."""
    try:
        return int(text)
    except ValueError:
        return text


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _integers(text: str) -> list[int | str]:
    return [_integer(part) for part in text.split(",")]


def _rows(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # the latter for absurdly deep nesting
        return text


def _numbers(text: str) -> list[float | str]:
    return [_number(part) for part in text.split(",")]


def _hint(text: str) -> Any:
    """A file, or an object that says more; the flag alone is true."""
    return _rows(text) if text.lstrip().startswith("{") else text


_PARSERS: dict[str, Callable[[str], Any]] = {
    "int": _integer,
    "float": _number,
    "ints": _integers,
    "pair": _numbers,
    "numbers": _numbers,
    "rows": _rows,
}


def _read_latents(path: str) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        possible = f"a safetensors file of latents ({error})"
        raise InvalidRequest("latents", path, possible) from None


# Words.


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


def _described(output: Output, sample: Sample) -> str:
    """The same in words."""
    seed = f"seed {sample.seed}"
    if sample.video is not None:
        frames, height, width, _ = sample.video.shape
        sound = "" if sample.sound is None else f" with sound at {output.sample_rate} Hz"
        length = f"{frames} frames at {output.fps:g} fps, {frames / output.fps:.2f} s"
        return f"{width}x{height}, {length}{sound}, {seed}"
    if sample.image is not None:
        return f"{sample.image.shape[1]}x{sample.image.shape[0]}, {seed}"
    return ", ".join([*(f"{name} {list(x.shape)}" for name, x in _latents(sample).items()), seed])


def _latents(sample: Sample) -> Mapping[str, np.ndarray]:
    return sample.latents or {}


def _shown(value: float | str | tuple[int, ...] | None) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "-"
    return f"{value:g}" if isinstance(value, int | float) else value or "-"


def _warn(warnings: tuple[str, ...]) -> None:
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
