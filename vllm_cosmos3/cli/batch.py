"""``vllm-cosmos3 generate --input``: records of files, one folder of results for each.

Everything is checked before a weight is loaded. The reasoner answers first and is closed; then the
generator is loaded, once, for all pictures: they need not fit into the memory together.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
import traceback
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_cosmos3 import media
from vllm_cosmos3.batch.downloads import Downloads, is_url
from vllm_cosmos3.batch.files import read_batch
from vllm_cosmos3.batch.records import REASONER, Record, Refused
from vllm_cosmos3.cli.benchmark_file import write_benchmark
from vllm_cosmos3.cli.ranks import Part
from vllm_cosmos3.cli.results import generate, sample_folder, write
from vllm_cosmos3.cli.run_options import RunOptions, open_generator, open_reasoner, planner
from vllm_cosmos3.cli.terminal import quiet_libraries
from vllm_cosmos3.cli.versions import check_vllm
from vllm_cosmos3.errors import Cosmos3Error, InvalidRequest
from vllm_cosmos3.files import write_text
from vllm_cosmos3.request.controls import CONTROLS
from vllm_cosmos3.request.questions import QUESTION, Question, question_of
from vllm_cosmos3.request.request import GenerateRequest, from_fields
from vllm_cosmos3.request.upsample import caption_of, question_about

if TYPE_CHECKING:
    from vllm_cosmos3.engine import Cosmos3
    from vllm_cosmos3.reasoner.offline import Answer, Reasoner
    from vllm_cosmos3.request.plan import Plan

AT_ONCE = 64  # questions, whose pictures are in memory together
ARGUMENTS, OUTPUTS, TEXT = "sample_args.json", "sample_outputs.json", "reasoner_text.txt"
LAST = "last.png"  # the last frame of a video that another record continues
START = "continued_frame"  # in the outputs: the hash of the frame that the video starts from
FILES = ("image", "video", "action_path", "action_stats_path", *CONTROLS)  # fields that name files


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BatchSample:
    """A checked record: what to ask whom, what it comes to as JSON, and the mark of its results.

    ``continued`` says whether another record starts from its last frame.
    """

    record: Record
    request: GenerateRequest | Question
    effective: Mapping[str, Any]
    warnings: tuple[str, ...]
    digest: str
    continued: bool
    upsampling: Question | None  # to be asked for the prompt before the generator is


class BatchAborted(Exception):
    """A record failed, and nobody asked to go on."""


def run(options: RunOptions, overrides: Mapping[str, Any], said: Mapping[str, Any]) -> int:
    """Serve the records of ``options.inputs``, with ``overrides`` instead of their own fields, and
    ``said``, which are fields under the names of a record.

    Returns 0 if every record has its results, 1 if one failed, 2 if one is invalid and nothing was
    started.
    """
    if options.timings_json is not None:
        possible = f"left out with --input, as each {OUTPUTS} has its timings"
        raise InvalidRequest("timings_json", str(options.timings_json), possible, "conflict")
    batch = read_batch(options.inputs, overrides, said)
    if any(_needs_one_process(record) for record in batch.records):
        alone = options.alone()
        if alone is None:
            return 0
        options = alone
    engine = options.engine
    plan = planner(engine)
    with TemporaryDirectory(prefix="cosmos3-input-") as cache:
        samples, found = _checked(batch.records, plan, Downloads(Path(cache)), options)
        problems = [*batch.refused, *found]
        for problem in problems if options.speaks else ():
            print(f"vllm-cosmos3 generate: {problem.error}", file=sys.stderr)
        if not samples and not problems:
            raise InvalidRequest(
                "input", " ".join(options.inputs), "files with at least one record"
            )
        if options.speaks and not options.dry_run:
            _write_refused(problems, {sample.record.name for sample in samples}, options.out)
        if problems and not options.keep_going:
            return 2
        if options.dry_run:
            return _dry_run(samples, problems) if options.speaks else 0
        check_vllm()
        samples = _own(samples, options.part)
        for sample in samples:  # an unwritable place should fail before minutes of work
            sample_folder(options.out, sample.record.name)
        todo = _unfinished(samples, options) if options.resume else samples
        _say(samples, todo)
        served = _serve(todo, options)
    if options.benchmark and options.speaks:
        write_benchmark(options.out, [_timings(sample, options) for sample in todo])
    done, refused = len(samples) - len(todo) + served, len(problems) if options.speaks else 0
    total = len(samples) + refused
    print(f"{done} of {total} records have their results in {options.out}")
    # torchrun would end the other replicas at a status that is not 0.
    goes_on = options.keep_going and options.part.count > 1
    return 0 if done == total or goes_on else 1


def _dry_run(samples: Sequence[BatchSample], problems: Sequence[Refused]) -> int:
    _say(samples, samples)
    print(json.dumps([dict(sample.effective) for sample in samples], indent=2))
    return 1 if problems else 0


def _own(samples: list[BatchSample], part: Part) -> list[BatchSample]:
    """The samples of this process, where several share a batch."""
    names = part.of(sample.record for sample in samples)
    return [sample for sample in samples if sample.record.name in names]


def _needs_one_process(record: Record) -> bool:
    """Whether one process has to know what another one would have made."""
    return (
        record.kind == REASONER or record.upsample is not None or record.continue_from is not None
    )


def _timings(sample: BatchSample, options: RunOptions) -> Mapping[str, float]:
    """The timings in the results of a sample; none where there are no results."""
    try:
        done = json.loads((options.out / sample.record.name / OUTPUTS).read_text())
    except (OSError, ValueError):
        return {}
    timings: Mapping[str, float] = done.get("timings", {})
    return timings


def _serve(samples: Sequence[BatchSample], options: RunOptions) -> int:
    """Make the results of all samples. Returns how many have them now."""
    questions = [sample for sample in samples if sample.record.kind == REASONER]
    requests = [sample for sample in samples if sample.record.kind != REASONER]
    served = 0
    try:
        with quiet_libraries():
            if questions or any(sample.upsampling is not None for sample in requests):
                with open_reasoner(options) as reasoner:
                    for made in _answered(reasoner, questions, options):
                        served += made
                    requests = _upsampled(reasoner, requests, options)
            for made in _generated(requests, options):
                served += made
    except BatchAborted:
        print("stopped at the first failure; --keep-going goes on", file=sys.stderr)
    return served


# Before a weight is loaded.


def _checked(
    records: Sequence[Record],
    plan: Callable[[GenerateRequest], Plan],
    downloads: Downloads,
    options: RunOptions,
) -> tuple[list[BatchSample], list[Refused]]:
    """The records that can be served, and the others with what is wrong with them."""
    samples: dict[str, BatchSample] = {}
    refused: list[Refused] = []
    wanted = {record.continue_from for record in records}
    for record in records:
        upsampling = None
        try:
            fields = {name: downloads.local(name, x) for name, x in record.fields.items()}
            before = _before(record, samples)
            request, planned = _planned(record, fields, before, plan)
            if record.upsample is not None and isinstance(request, GenerateRequest) and planned:
                # The frame of another record is not made yet: there is nothing to show.
                shown = request if before is None else replace(request, image=None)
                upsampling = question_about(shown, planned, record.upsample)
        except InvalidRequest as error:
            error = record.placed(error)
            refused.append(Refused(name=record.name, values=record.fields, error=error))
            continue
        urls = {name: value for name, value in record.fields.items() if is_url(value)}
        samples[record.name] = BatchSample(
            record=record,
            request=request,
            effective={"name": record.name, **_effective(request, planned), **urls},
            warnings=(*record.warnings, *(planned.warnings if planned else ())),
            digest=_digest(record, fields, before, options),
            continued=record.name in wanted,
            upsampling=upsampling,
        )
    return list(samples.values()), refused


def _before(record: Record, samples: Mapping[str, BatchSample]) -> BatchSample | None:
    """The sample whose last frame a record starts from."""
    if record.continue_from is None:
        return None
    before = samples.get(record.continue_from)
    video = before is not None and before.effective.get("num_frames", 1) > 1
    if before is None or not video or before.effective["n"] != 1:
        possible = "the name of a valid record that makes one video"
        raise InvalidRequest("continue_from", record.continue_from, possible)
    return before


def _planned(
    record: Record,
    fields: Mapping[str, Any],
    before: BatchSample | None,
    plan: Callable[[GenerateRequest], Plan],
) -> tuple[GenerateRequest, Plan] | tuple[Question, None]:
    """The request of a record and its plan, or its question."""
    if record.kind == REASONER:
        question = question_of(fields)
        if question.image is not None:  # a broken one should not wait for the reasoner
            media.read_image(question.image)
        if question.video is not None:
            media.read_video(question.video, frames=1)
        return question, None
    if before is not None:  # a picture of the right size stands for the frame to come
        shape = (before.effective["height"], before.effective["width"], 3)
        fields = {**fields, "image": np.zeros(shape, np.uint8)}
    request = from_fields(fields)
    return request, plan(request)


def _effective(request: GenerateRequest | Question, plan: Plan | None) -> dict[str, Any]:
    """Every parameter of a request or a question."""
    if plan is not None:
        return dict(plan.effective)
    names = [name for name in QUESTION if name != "schema"]
    return {"mode": REASONER} | {name: getattr(request, name) for name in names}


def _digest(
    record: Record, fields: Mapping[str, Any], before: BatchSample | None, options: RunOptions
) -> str:
    """What makes the results of two runs the same, seeds that are drawn apart.

    ``fields`` are those of the record with local files, whose contents count as their names do.
    """
    engine = options.engine
    values = [
        str(engine.model), engine.revision, engine.dtype, record.kind, dict(record.fields), record.upsample,
        record.crf, options.crf, record.quality, options.image_quality, options.image_type,
        engine.load_format, engine.checkpoint_kind,
        None if before is None else before.digest,
        {name: _contents(fields[name]) for name in FILES if name in fields},
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=_plain).encode()).hexdigest()


def _contents(value: Any) -> Any:
    """A value with the hashes of its files instead of their names."""
    if isinstance(value, Mapping):
        return {name: _contents(item) for name, item in value.items()}
    return _hash_of(Path(value)) if isinstance(value, str) and Path(value).is_file() else None


def _hash_of(file: Path) -> str:
    found = hashlib.sha256()
    with file.open("rb") as opened:
        while piece := opened.read(2**20):
            found.update(piece)
    return found.hexdigest()


def _plain(value: object) -> str:
    """What JSON does not know as a text: all numbers of an array."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
    return str(value)


def _unfinished(samples: Sequence[BatchSample], options: RunOptions) -> list[BatchSample]:
    """The samples that an earlier run has not left the results of, and those that continue them."""
    todo: dict[str, BatchSample] = {}
    for sample in samples:
        if sample.record.continue_from in todo or not _finished(options, sample):
            todo[sample.record.name] = sample
    return list(todo.values())


def _finished(options: RunOptions, sample: BatchSample) -> bool:
    """Whether an earlier run has left the results of this very record."""
    folder = options.out / sample.record.name
    try:
        done = json.loads((folder / OUTPUTS).read_text())
        files = [folder / name for output in done["outputs"] for name in output["files"]]
    except (OSError, ValueError, LookupError, TypeError):
        return False  # none, or of another program
    files += [folder / LAST] if sample.continued else []
    same = done.get("status") == "success" and done.get("digest") == sample.digest
    if not same or not all(file.is_file() for file in files):
        return False
    start = _start(options, sample)
    return start is None or done.get(START) == _hash_of(start)


def _start(options: RunOptions, sample: BatchSample) -> Path | None:
    """The frame that a sample starts from, as another one has left it."""
    before = sample.record.continue_from
    if before is None or sample.record.kind == REASONER:
        return None
    return Path(options.out) / before / LAST


# The results.


def _ask(reasoner: Reasoner, questions: Sequence[Question]) -> list[Answer | Exception]:
    """The answer to each question, or why there is none: a bad question spoils no other."""
    try:
        return list(reasoner.ask(questions))
    except Exception as error:  # noqa: BLE001 - of one of them, it does not say which
        if len(questions) == 1:
            return [error]
    return [answer for question in questions for answer in _ask(reasoner, [question])]


def _answered(
    reasoner: Reasoner, samples: Sequence[BatchSample], options: RunOptions
) -> Iterator[bool]:
    """Ask the reasoner everything, many questions at once; whether each has its answer."""
    for start in range(0, len(samples), AT_ONCE):
        some = samples[start : start + AT_ONCE]
        questions = [sample.request for sample in some if isinstance(sample.request, Question)]
        begun = time.perf_counter()
        answers = _ask(reasoner, questions)
        seconds = time.perf_counter() - begun
        for sample, answer in zip(some, answers, strict=True):
            with _failures(sample, options) as failed:
                if isinstance(answer, Exception):
                    raise answer
                _write_answer(sample, answer, seconds, options)
            yield not failed


def _upsampled(
    reasoner: Reasoner, samples: Sequence[BatchSample], options: RunOptions
) -> list[BatchSample]:
    """The samples with the prompts that the reasoner writes, without those that it cannot write."""
    wanted = {s.record.name: s.upsampling for s in samples if s.upsampling is not None}
    if not wanted:
        return list(samples)
    print(f"upsample {len(wanted)} prompts", file=sys.stderr)
    answers = dict(zip(wanted, _ask(reasoner, list(wanted.values())), strict=True))
    written = []
    for sample in samples:
        if sample.upsampling is None:
            written.append(sample)
            continue
        with _failures(sample, options):
            assert isinstance(sample.request, GenerateRequest)  # so says its kind
            answer = answers[sample.record.name]
            if isinstance(answer, Exception):
                raise answer
            prompt = caption_of(answer.text, complete=answer.complete)
            written.append(replace(sample, request=replace(sample.request, prompt=prompt)))
    return written


def _write_answer(sample: BatchSample, answer: Answer, seconds: float, options: RunOptions) -> None:
    """``seconds`` are those of all questions that were asked at once."""
    folder = sample_folder(options.out, sample.record.name)
    write_text(folder / TEXT, answer.text)
    content = {"text": answer.text, "tokens": answer.tokens, "complete": answer.complete}
    outputs = [{"content": content, "files": [TEXT]}]
    _record(sample, folder, status="success", outputs=outputs, timings={"answer": seconds})
    print(f"{folder / TEXT}  {answer.tokens} tokens")


def _generated(samples: Sequence[BatchSample], options: RunOptions) -> Iterator[bool]:
    """Load the generator once and make everything; whether each has its pictures."""
    if not samples:
        return
    with open_generator(options.engine) as model:
        for number, sample in enumerate(samples, 1):
            print(f"[{number}/{len(samples)}] {sample.record.name}", file=sys.stderr)
            with _failures(sample, options) as failed:
                _generate(model, sample, options)
            yield not failed


def _generate(model: Cosmos3, sample: BatchSample, options: RunOptions) -> None:
    assert isinstance(sample.request, GenerateRequest)  # so says its kind
    record = sample.record
    own = replace(
        options,
        name=record.name,
        crf=options.crf if record.crf is None else record.crf,
        image_quality=options.image_quality if record.quality is None else record.quality,
    )
    original_prompt = None if sample.upsampling is None else record.fields["prompt"]
    folder = sample_folder(options.out, record.name)
    for name in (OUTPUTS, LAST):  # of an earlier run
        (folder / name).unlink(missing_ok=True)
    request, mark = sample.request, {"digest": sample.digest}
    if (start := _start(options, sample)) is not None:
        request = replace(request, image=media.read_image(start, field="continue_from"))
        mark[START] = _hash_of(start)
    output, files, timings = generate(model, request, own, folder)
    if files:  # with several processes under torchrun the first one has the results
        if sample.continued and output.video is not None:
            made = output.video[-1][:, -sample.effective["width"] :]  # controls may be beside it
            media.write_image(folder / LAST, made)
        write(own, folder, output, files, timings, original_prompt)
        _warn(sample, [text for text in output.warnings if text not in sample.warnings])
        done = json.loads((folder / OUTPUTS).read_text())
        write_text(folder / OUTPUTS, json.dumps(done | mark, indent=2) + "\n")


@contextmanager
def _failures(sample: BatchSample, options: RunOptions) -> Iterator[list[Exception]]:
    """What goes wrong inside is recorded in the folder of this sample, and given as a list.

    Raises:
        BatchAborted: something went wrong and the user did not ask to go on.
    """
    failed: list[Exception] = []
    try:
        yield failed
    except Exception as error:  # whatever it is, it is the end of this one alone
        failed.append(error)
        message = str(error) or type(error).__name__
        stack = None if isinstance(error, Cosmos3Error) else traceback.format_exc()
        folder = sample_folder(options.out, sample.record.name)
        _record(sample, folder, status="error", message=message, stack_trace=stack)
        print(f"vllm-cosmos3 generate: {sample.record.where}: {message}", file=sys.stderr)
        if not options.keep_going:
            raise BatchAborted from error


def _record(sample: BatchSample, folder: Path, **values: Any) -> None:
    """The two JSON records of a sample that no picture was made for."""
    said = {"warnings": list(sample.warnings), "digest": sample.digest}
    _write_records(folder, dict(sample.effective), **values, **said)


def _write_refused(refused: Sequence[Refused], served: Container[str], out: Path) -> None:
    """The two JSON records of what is not even started, unless another record has the folder."""
    for item in refused:
        if item.name is not None and item.name not in served:
            arguments = {"name": item.name, **item.values}
            _write_records(sample_folder(out, item.name), arguments, message=str(item.error))


def _write_records(folder: Path, arguments: Mapping[str, Any], **values: Any) -> None:
    write_text(folder / ARGUMENTS, json.dumps(arguments, indent=2, default=str) + "\n")
    record = {"status": "error", "message": "", "args": arguments, "outputs": [], **values}
    write_text(folder / OUTPUTS, json.dumps(record, indent=2, default=str) + "\n")


def _say(samples: Sequence[BatchSample], todo: Sequence[BatchSample]) -> None:
    for sample in todo:
        _warn(sample, sample.warnings)
    if len(todo) < len(samples):
        print(f"{len(samples) - len(todo)} of {len(samples)} records are finished", file=sys.stderr)


def _warn(sample: BatchSample, warnings: Sequence[str]) -> None:
    for warning in warnings:
        print(f"warning: {sample.record.where}: {warning}", file=sys.stderr)
