"""``vllm-cosmos3 generate``: one request from the command line to files on disk.

The flags of a request are generated from its fields; nothing here checks their values. With
``--input`` the requests come from files, see `batch`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_cosmos3.batch.downloads import local_files, urls_of
from vllm_cosmos3.batch.locations import is_url, shown
from vllm_cosmos3.batch.records import read_json
from vllm_cosmos3.cli import batch, config_file, phyai
from vllm_cosmos3.cli.benchmark_file import write_benchmark
from vllm_cosmos3.cli.defaults_table import defaults_table
from vllm_cosmos3.cli.flags import add_engine_flags, add_flag, given, integer
from vllm_cosmos3.cli.foreign_flags import add_generate_flags
from vllm_cosmos3.cli.ranks import Part, divided, shard
from vllm_cosmos3.cli.results import check_file, generate, sample_folder, write
from vllm_cosmos3.cli.run_options import RunOptions, open_generator, open_reasoner, planner
from vllm_cosmos3.cli.terminal import progress_shown, quiet_libraries
from vllm_cosmos3.cli.versions import check_vllm
from vllm_cosmos3.engine_options import OPTIONS, EngineOptions
from vllm_cosmos3.errors import InvalidRequest, Unsupported
from vllm_cosmos3.request.controls import CONTROLS
from vllm_cosmos3.request.fields import Spec
from vllm_cosmos3.request.request import SPECS, GenerateRequest, from_fields

if TYPE_CHECKING:
    from vllm_cosmos3.request.plan import Plan

TAKES_CONFIG = True
# What scripts for phyai call our flags. Those that are no other spelling are not in the help.
SPELLINGS = {
    "num_inference_steps": ("--steps",),
    "generate_sound": ("--sound",),
    "condition_frame_indexes_vision": ("--condition-frames",),
    "action_mode": ("--mode",),
    "action_path": ("--action-file",),
}
SHARD_SIZE = Spec(kind="int", low=1, high=1_000_000, help="records in a shard")
KARRAS = {"true": "karras", "false": "diffusers"}
# Headings of the help, each with the first of its fields, which are in this order in the request.
HEADINGS = {
    "prompt": "prompt and inputs",
    "action_mode": "actions of robots and vehicles",
    "edge": "transfer: a video that follows control clips",
    "size": "size and length",
    "num_inference_steps": "sampling",
    "generate_sound": "sound",
    "use_resolution_template": "how prompts are written and read",
    "allow_untrained_size": "advanced",
}
EXAMPLES = """\
examples:
  vllm-cosmos3 generate nvidia/Cosmos3-Nano --prompt "A paper boat drifts down a stream" --out boat
  vllm-cosmos3 generate nvidia/Cosmos3-Nano --image a.png --prompt "It sails" --seconds 4 -o sea
  vllm-cosmos3 generate nvidia/Cosmos3-Nano --video street.mp4 --edge --prompt "In snow" --out snow
  vllm-cosmos3 generate nvidia/Cosmos3-Nano --input 'records/*.jsonl' --out results --resume
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = (
        "%(prog)s MODEL --prompt TEXT --out DIR [options]\n"
        "       %(prog)s MODEL --input FILE... --out DIR [options]"
    )
    parser.epilog = EXAMPLES
    add = parser.add_argument
    add(
        "model",
        nargs="?",
        metavar="MODEL",
        help="folder, repository, demo, demo-4step or demo-policy",
    )
    add("--checkpoint-path", dest="checkpoint", help=argparse.SUPPRESS)
    add("--checkpoint", dest="phyai_checkpoint", help=argparse.SUPPRESS)
    config_file.add_flag(parser)
    add = parser.add_argument_group("output").add_argument
    add("-o", "--out", "--output-dir", dest="out", metavar="DIR", help="folder of the results, DIR/NAME/; with --input also a URL")  # fmt: skip
    add("--name", default="sample", help="folder of this sample (default: sample)")
    add("--crf", type=integer, metavar="N", help="H.264 quality, 0 (lossless) to 51 (default: 18)")
    add("--image-type", metavar="TYPE", help="png, jpg or webp (default: png; jpg with --input)")
    add("--image-quality", type=integer, metavar="N", help="JPEG/WebP quality, 0 to 100 (default: 95)")  # fmt: skip
    add("--timings-json", type=Path, metavar="FILE", help="also write the timings to this file")
    add("--dry-run", action="store_true", help="print the resolved parameters as JSON, load no weights")  # fmt: skip
    add(
        "--print-defaults",
        action="store_true",
        help="print the defaults of every mode, of MODEL if it is given, and exit",
    )
    add = parser.add_argument_group("batch files").add_argument
    add("-i", "--input", nargs="+", metavar="FILE", help="JSON, JSONL or YAML files of records, globs or URLs")  # fmt: skip
    add("--resume", action="store_true", help="skip records with results in --out; joins a run in progress")  # fmt: skip
    add("--keep-going", action="store_true", help="continue after a record that is invalid or fails twice")  # fmt: skip
    add("--shard", metavar="I/N", help="make every N-th record only, from the I-th (1 to N) on")
    add("--format", choices=("files", "webdataset"), default="files", help="a folder per record (default), or WebDataset's tar shards")  # fmt: skip
    add("--shard-size", type=integer, default=1000, metavar="N", help="records in a shard of --format webdataset (default: 1000)")  # fmt: skip
    add("--ray", nargs="?", const="", metavar="ADDRESS", help="run on Ray Data (default: RAY_ADDRESS, else this machine)")  # fmt: skip
    add("--reasoner-url", metavar="URL", help="served reasoner that answers, upsamples and captions")  # fmt: skip
    group: argparse._ActionsContainer = parser
    for item in fields(GenerateRequest):
        if item.name in HEADINGS:
            group = parser.add_argument_group(HEADINGS[item.name])
        also = SPELLINGS.get(item.name, ())
        add_flag(group, item.name, SPECS[item.name], item.default, also=also)
        for add_more in BESIDE.get(item.name, ()):
            add_more(group)
    run = parser.add_argument_group("model and device")
    add_engine_flags(run, [name for name in OPTIONS if name != "weight_transfer"])  # one request
    run.add_argument("--enforce-eager", action="store_true", help="reasoner without CUDA graphs: faster start, slower answers")  # fmt: skip
    add_generate_flags(parser)


def _upsample_flag(group: argparse._ActionsContainer) -> None:
    group.add_argument("--upsample-prompt", action="store_true", help="let the reasoner expand the prompt first")  # fmt: skip


def _karras_flag(group: argparse._ActionsContainer) -> None:
    group.add_argument("--use-karras-sigmas", dest="schedule", type=lambda text: KARRAS.get(text.lower(), text), metavar="{true,false}", help=argparse.SUPPRESS)  # fmt: skip


def _metadata_flag(group: argparse._ActionsContainer) -> None:
    group.add_argument("--no-prompt-metadata", action="store_true", help="do not append the sentences on resolution and duration")  # fmt: skip


BESIDE = {  # flags that are no fields, after the field that they belong to
    "negative_prompt": (_upsample_flag,),
    "schedule": (_karras_flag,),
    "use_duration_template": (_metadata_flag,),
}


def _defaults(args: argparse.Namespace) -> str:
    """The defaults of the checkpoint that is named, or of one that has them all."""
    from vllm_cosmos3.checkpoint.config import read_config
    from vllm_cosmos3.checkpoint.hub import resolve

    model = _model(args)
    if model is None:
        return defaults_table(args.checkpoint_kind or "base")
    config = read_config(resolve(model, args.revision, weights=False), args.checkpoint_kind)
    fixed = config.scheduler.t_list
    return defaults_table(config.kind, None if fixed is None else len(fixed))


def _model(args: argparse.Namespace) -> str | None:
    """The checkpoint, in whichever words it was named."""
    named: str | None = args.model or args.checkpoint or args.phyai_checkpoint
    return named


def run(args: argparse.Namespace) -> int:
    """Make one sample, or those of batch files. Returns 0, or what `batch.run` returns."""
    if args.print_defaults:
        print(_defaults(args))
        return 0
    options = run_options(args)
    if options is None:  # other ranks do all of it
        return 0
    request_fields, record = fields_of(args), dict(args.record or ())
    if options.inputs:
        return batch.run(options, request_fields | _formats(args), record)
    if not options.leads:  # there is one request, which the first replica makes
        return 0
    if options.engine.data_parallel_size > 1:
        possible = "1 without --input: one request runs on one replica"
        raise InvalidRequest("data_parallel_size", options.engine.data_parallel_size, possible)
    if options.links:
        request_fields = phyai.with_prompt(request_fields)
    asked = from_fields(single_record(request_fields, record) if record else request_fields)
    with local_files(asked) as request:
        return _run_one(request, urls_of(asked), options)


def _run_one(request: GenerateRequest, urls: Mapping[str, str], options: RunOptions) -> int:
    """Make the sample of a request, whose files had these URLs."""
    engine = options.engine
    plan = planner(engine)(request)
    if options.dry_run:
        if options.speaks:
            print(json.dumps({**plan.effective, **urls}, indent=2))
            _warn(plan.warnings)
        return 0
    if options.upsample_prompt:
        alone = options.alone()
        if alone is None:
            return 0
        options, engine = alone, alone.engine
    check_vllm()
    folder = sample_folder(options.out, options.name)
    if options.timings_json is not None:
        check_file("timings_json", options.timings_json)
    with quiet_libraries():
        written = _upsampled(request, plan, options)
    original_prompt = None if written is request else request.prompt
    with quiet_libraries(), open_generator(engine) as model:
        kind = plan.effective["checkpoint_kind"]
        facts = f"{engine.model} ({kind}), {model.device}, {engine.dtype}"
        if options.speaks:
            print(f"{facts}, loaded in {model.load_seconds:.3g} s", file=sys.stderr)
        bars = progress_shown(terminal=sys.stderr.isatty()) if options.speaks else nullcontext()
        with bars as report:
            output, files, timings = generate(model, written, options, folder, report=report)
        load = model.load_seconds
        timings = {"model_load": load, **timings, "total": load + timings["total"]}
        output = replace(output, effective={**output.effective, **urls})
        if files:  # with several processes under torchrun the first one has the results
            write(options, folder, output, files, timings, original_prompt)
            _warn(output.warnings)
            if options.benchmark:
                write_benchmark(options.out, [timings])
            if options.links:
                phyai.name_results(options.out, files)
    return 0


def single_record(fields: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the request of the command line, some of which are those of a record."""
    from vllm_cosmos3.batch.records import Entry, make_record

    entry = Entry(where="the command line", folder=Path.cwd(), name="sample", values=record)
    made = make_record(entry, fields)
    if made.kind == "reasoner":
        possible = "of pictures or videos; --input takes records of the reasoner"
        raise InvalidRequest("model_mode", "reasoner", possible)
    return dict(made.fields)


def run_options(args: argparse.Namespace) -> RunOptions | None:
    """The flags but for the fields of a request, checked; None for a rank without work."""
    from vllm_cosmos3.generator.formats import IMAGE_SUFFIXES
    from vllm_cosmos3.generator.output import CRF, QUALITY

    model = _model(args)
    if model is None:
        raise InvalidRequest("model", None, "a checkpoint folder or repository", "missing_required")
    if args.out is None and not args.dry_run:
        raise InvalidRequest("out", None, "a folder for the results", "missing_required")
    image_type = args.image_type or ("jpg" if args.input else "png")
    if f".{image_type}" not in IMAGE_SUFFIXES:
        possible = f"one of {', '.join(suffix[1:] for suffix in IMAGE_SUFFIXES)}"
        raise InvalidRequest("image_type", image_type, possible)
    quality = 95 if args.image_quality is None else args.image_quality
    asked = given(args, OPTIONS)
    engine, part = divided(EngineOptions(model, **asked), args.parallelism_preset, asked)
    if part is None:
        return None
    return RunOptions(
        engine=engine,
        part=part.within(_shard(args)),
        replica=part.count > 1,
        leads=part.index == 0,
        benchmark=args.benchmark,
        links=args.phyai_checkpoint is not None,
        reasoner_ranks=engine.tensor_parallel_size,
        reasoner_url=args.reasoner_url,
        shard_size=_shard_size(args),
        ray=args.ray,
        inputs=tuple(args.input or ()),
        location=_location(args),
        name=args.name,
        crf=CRF.checked("crf", 18 if args.crf is None else args.crf),
        image_type=image_type,
        image_quality=QUALITY.checked("image_quality", quality),
        timings_json=args.timings_json,
        resume=args.resume,
        keep_going=args.keep_going,
        dry_run=args.dry_run,
        upsample_prompt=args.upsample_prompt,
        enforce_eager=args.enforce_eager,
    )


def _location(args: argparse.Namespace) -> str:
    """Where the results are written to."""
    location: str = args.out or "."
    if is_url(location) and not args.input:
        raise InvalidRequest("out", shown(location), "a folder of this machine without --input")
    if is_url(location) and args.benchmark:
        raise InvalidRequest("out", shown(location), "a folder of this machine with --benchmark")
    return location


def _shard_size(args: argparse.Namespace) -> int | None:
    """How many records a shard has; None where results stay files."""
    if args.format == "files":
        return None
    if not args.input:
        raise InvalidRequest("format", args.format, "files without --input", "conflict")
    size: int = SHARD_SIZE.checked("shard_size", args.shard_size)
    if find_spec("webdataset") is None:
        raise Unsupported("webdataset is not installed: pip install 'vllm-cosmos3[webdataset]'")
    return size


def _shard(args: argparse.Namespace) -> Part:
    if args.shard is None:
        return Part()
    if not args.input:
        raise InvalidRequest("shard", args.shard, "left out without --input", "conflict")
    try:
        return shard(args.shard)
    except ValueError:
        possible = "I/N with I from 1 to N, such as 2/8"
        raise InvalidRequest("shard", args.shard, possible) from None


def fields_of(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a request that the flags were given."""
    found = given(args, SPECS)
    if args.no_prompt_metadata:
        found |= {"use_duration_template": False, "use_resolution_template": False}
    for name in found.keys() & CONTROLS:
        _check_object(name, found[name])
    if "latents" in found:
        found["latents"] = _read_latents(found["latents"])
    return found


def _check_object(name: str, value: object) -> None:
    """Refuse an object of a control that is not JSON: it is no name of a file either."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            read_json(value)
        except ValueError as error:
            raise InvalidRequest(name, value, f"a file or a JSON object ({error})") from None


def _formats(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags say of every record besides the fields of a request."""
    flags = {
        "crf": args.crf,
        "quality": args.image_quality,
        "upsample_prompt": args.upsample_prompt or None,
    }
    return {name: value for name, value in flags.items() if value is not None}


def _upsampled(request: GenerateRequest, plan: Plan, options: RunOptions) -> GenerateRequest:
    """The request with the prompt that the reasoner writes, if the flags ask for one."""
    from vllm_cosmos3.request.upsample import caption_of, question_about

    question = question_about(request, plan, {}) if options.upsample_prompt else None
    if question is None:
        return request
    print("upsample", file=sys.stderr)
    with open_reasoner(options) as reasoner:
        (answer,) = reasoner.ask([question])
    return replace(request, prompt=caption_of(answer.text, complete=answer.complete))


def _read_latents(path: str) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        possible = f"a safetensors file of latents ({error})"
        raise InvalidRequest("latents", path, possible) from None


def _warn(warnings: Sequence[str]) -> None:
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
