"""``vllm-cosmos3 upsample``: a short prompt becomes the structured one that the generator knows.

The checkpoint's own reasoner writes it. The answer alone goes to standard output, one line for each
prompt, so that it can be piped or kept in a file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vllm_cosmos3.cli.flags import add_engine_flags, add_flag, given
from vllm_cosmos3.cli.results import check_file
from vllm_cosmos3.cli.run_options import planner
from vllm_cosmos3.cli.terminal import quiet_libraries
from vllm_cosmos3.cli.versions import check_vllm
from vllm_cosmos3.engine_options import OPTIONS, EngineOptions
from vllm_cosmos3.files import write_text
from vllm_cosmos3.request.request import SPECS, from_fields
from vllm_cosmos3.request.upsample import SAMPLING, SAMPLING_SPECS, caption_of, question_about

# Fields of a request that the structured prompt depends on.
FIELDS = ("image", "video", "size", "width", "height", "num_frames", "seconds", "fps")

REASONER = ("revision", "dtype", "tensor_parallel_size", "load_format")  # as vLLM takes them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s MODEL --prompt TEXT... [options]"
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="folder, repository, demo, demo-4step or demo-policy",
    )
    parser.add_argument("--prompt", nargs="+", required=True, metavar="TEXT", help="what to show, in short")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE", help="write here and not to standard output")  # fmt: skip
    output = parser.add_argument_group("what the generator will make; --num-frames 1 is a picture")
    for name in FIELDS:
        add_flag(output, name, SPECS[name], None)
    drawn = parser.add_argument_group("how the reasoner samples its answer")
    for name, value in SAMPLING.items():
        add_flag(drawn, name, SAMPLING_SPECS[name], value)
    run = parser.add_argument_group("model and device")
    add_engine_flags(run, REASONER)
    run.add_argument("--enforce-eager", action="store_true", help="start sooner and answer more slowly")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Ask for all prompts at once. Prompts that are structured already stay as they are."""
    from vllm_cosmos3.reasoner.offline import Reasoner

    sampling = given(args, SAMPLING)
    for name, value in sampling.items():
        sampling[name] = SAMPLING_SPECS[name].checked(name, value)
    engine = given(args, REASONER)
    if (ranks := engine.get("tensor_parallel_size")) is not None:
        OPTIONS["tensor_parallel_size"].spec.checked("tensor_parallel_size", ranks)
    fields = given(args, FIELDS)
    plan = planner(EngineOptions(args.model, revision=args.revision))
    captions: list[str] = list(args.prompt)
    questions = {}
    for index, prompt in enumerate(captions):
        request = from_fields({"prompt": prompt, **fields})
        question = question_about(request, plan(request), sampling)
        if question is None:
            captions[index] = json.dumps(json.loads(prompt), separators=(",", ":"))
        else:
            questions[index] = question
    if args.out is not None:
        check_file("out", args.out)
    if questions:
        check_vllm()
        with (
            quiet_libraries(),
            Reasoner(args.model, enforce_eager=args.enforce_eager, **engine) as reasoner,
        ):
            answers = reasoner.ask(list(questions.values()))
        for index, answer in zip(questions, answers, strict=True):
            captions[index] = caption_of(answer.text, complete=answer.complete)
    text = "".join(f"{caption}\n" for caption in captions)
    if args.out is None:
        print(text, end="")
    else:
        write_text(args.out, text)
    return 0
