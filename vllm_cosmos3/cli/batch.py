"""``vllm-cosmos3 generate --input``: records of files, one folder of results for each.

Records are streamed: first a pass that counts and checks them, then one that makes them. A reasoner
of this checkpoint has passes of its own, before the generator and after it, as they need not fit into
memory together; one behind a URL answers beside the generator.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from fractions import Fraction
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

from vllm_cosmos3.batch.claims import Claims
from vllm_cosmos3.batch.files import INPUT, Contents, Source, Unit, input_files
from vllm_cosmos3.batch.index import SECONDS as INDEX_SECONDS
from vllm_cosmos3.batch.index import Index
from vllm_cosmos3.batch.locations import redacted
from vllm_cosmos3.batch.packs import Packs
from vllm_cosmos3.batch.records import REASONER, Refused
from vllm_cosmos3.batch.store import Store, store_at
from vllm_cosmos3.cli import batch_ray
from vllm_cosmos3.cli.batch_making import TRIES, Asked, Making, Opened, Outcome
from vllm_cosmos3.cli.batch_progress import LOG_SECONDS, ProgressLine
from vllm_cosmos3.cli.batch_results import Results
from vllm_cosmos3.cli.batch_samples import BatchSample, Checked, Checker
from vllm_cosmos3.cli.benchmark_file import write_benchmark
from vllm_cosmos3.cli.results import OUTPUTS
from vllm_cosmos3.cli.run_options import RunOptions, open_generator, open_reasoner, planner
from vllm_cosmos3.cli.terminal import quiet_libraries
from vllm_cosmos3.cli.versions import check_vllm
from vllm_cosmos3.devices import devices
from vllm_cosmos3.engine_options import MAX_BATCH_SIZE
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.request.questions import Question
from vllm_cosmos3.request.upsample import caption_of

if TYPE_CHECKING:
    from vllm_cosmos3.reasoner.offline import Answer, Reasoner

T = TypeVar("T")

AT_ONCE = 64  # questions, whose pictures are in memory together
AHEAD = 2  # units that are checked while others are made
PUBLISHING = 1  # more than the replicas: what publishes what was made, or asks about it
WHOLE, LEAST = Fraction(1), Fraction(1, MAX_BATCH_SIZE)  # shares of a replica
POLL_SECONDS = 1.0  # until more is known of another run


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
    alone = options.alone()
    if alone is None:
        return 0
    with TemporaryDirectory(prefix="cosmos3-batch-") as cache:
        source = Source(input_files(alone.inputs, Path(cache)), overrides, said)
        return _run(alone, source, Path(cache))


def _run(options: RunOptions, source: Source, cache: Path) -> int:
    contents = source.contents()
    checker = Checker(planner(options.engine), options)
    if options.dry_run:
        return _dry_run(source, contents, checker)
    found = [] if options.keep_going else _problems(source, contents, checker, options)
    problems = [*(contents.refused if options.speaks else ()), *found]
    _say(problems)
    if not contents.names and not contents.refused:
        raise InvalidRequest(INPUT, " ".join(options.inputs), "files with at least one record")
    check_vllm()
    _check_ways(options, contents)
    store = store_at(options.location)
    if not store.exclusive:
        text = f"warning: {store.called} cannot hold claims: give several runs on it --shard"
        print(text, file=sys.stderr)
    claims = Claims(store)
    results = Results(store, options, claims.run)
    served = contents.names - {problem.name for problem in found}
    lines = [results.refuse(problem, served) for problem in problems]
    if (problems or contents.refused) and not options.keep_going:
        return 2
    names = [record.name for unit in _own(source, contents, options) for record in unit]
    with ExitStack() as stack:
        refused = [line["name"] for line in lines if line is not None]
        index = Index(cache, {*names, *refused}, options.part.index_file)
        stack.callback(index.close)
        total = len(names) + len(problems)
        run = BatchRun(options, source, contents, checker, store, claims, results, index, total)
        for line in filter(None, lines):
            index.add(line)
        _join(claims, options)
        if run.packs is not None and not options.resume and not run.packs.empty():
            possible = "another folder, or used with --resume: there are shards in it"
            raise InvalidRequest("out", store.called, possible, "conflict")
        claims.start(options.part.place)
        stack.callback(claims.close)
        stack.callback(index.write, store, claims)
        run.serve()
    if options.benchmark and options.speaks:
        write_benchmark(Path(options.location), run.timings)
    if run.kept:
        print(f"{run.kept} of {total} records were finished before", file=sys.stderr)
    print(f"{index.done} of {total} records have their results in {store.called}")
    if run.elsewhere:
        print(f"{len(run.elsewhere)} are being made by another run")
    complete = index.done + len(run.elsewhere) == total
    # torchrun would end the other replicas at a status that is not 0.
    tolerated = options.keep_going and options.replica
    return 0 if complete or tolerated else 1


def _problems(
    source: Source, contents: Contents, checker: Checker, options: RunOptions
) -> list[Refused]:
    """What is wrong with the records of this process, as far as it is seen without URLs."""
    found: list[Refused] = []
    said = time.monotonic()
    for number, unit in enumerate(_own(source, contents, options)):
        found += checker.problems(unit)
        if time.monotonic() - said >= LOG_SECONDS:
            said = time.monotonic()
            print(f"{number + 1} records checked", file=sys.stderr, flush=True)
    return found


def _own(source: Source, contents: Contents, options: RunOptions) -> Iterator[Unit]:
    """The units of this process, where several share a batch."""
    part = options.part
    return islice(source.units(contents.chains), part.index, None, part.count)


def _check_ways(options: RunOptions, contents: Contents) -> None:
    """Refuse what a way to make or to keep results cannot do."""
    packed, reasons = options.shard_size is not None, contents.asks or contents.captions
    if packed and contents.chains:
        possible = "left out with --format webdataset, which keeps no last frames"
        raise InvalidRequest("continue_from", next(iter(contents.chains)), possible, "conflict")
    if (packed or options.ray is not None) and reasons and options.reasoner_url is None:
        possible = "the URL of a reasoner beside the generator, with --ray or --format webdataset"
        raise InvalidRequest("reasoner_url", None, possible, "missing_required")


def _join(claims: Claims, options: RunOptions) -> None:
    """Refuse to make records again that another run is making.

    Raises:
        InvalidRequest: there is such a run.
    """
    if options.resume:
        return
    while claims.rivals(options.part.place):
        if not claims.undecided():
            possible = "another folder, or used with --resume: another run is writing to it"
            raise InvalidRequest("out", options.location, possible, "conflict")
        time.sleep(POLL_SECONDS)


def _dry_run(source: Source, contents: Contents, checker: Checker) -> int:
    problems, progress, first = list(contents.refused), ProgressLine(0), True
    for unit in source.units(contents.chains):
        checked = checker.check(unit)
        checked.close()
        problems += checked.refused
        for sample in checked.samples:
            progress.warn(sample.record.where, sample.warnings)
            print("[" if first else ",")
            print(json.dumps(dict(sample.effective), indent=2), end="")
            first = False
    if not first:
        print("\n]")
    _say(problems)
    return 2 if problems else 0


def _say(problems: Iterable[Refused]) -> None:
    """Print what is wrong, in the order of files and lines."""
    for problem in sorted(problems, key=_place):
        print(f"vllm-cosmos3 generate: {redacted(str(problem.error))}", file=sys.stderr)


def _place(problem: Refused) -> list[tuple[int, str]]:
    """Where a record is, with its numbers as such: line 10 comes after line 9."""
    place = problem.error.field.partition(": ")[0]
    return [
        (int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", place)
    ]


class BatchRun:
    """One run over the units of a batch: what it makes, counts and records.

    ``elsewhere`` are the records that another run had at the end, ``kept`` is how many were
    finished before, and ``timings`` are those of ``--benchmark``.
    """

    def __init__(
        self,
        options: RunOptions,
        source: Source,
        contents: Contents,
        checker: Checker,
        store: Store,
        claims: Claims,
        results: Results,
        index: Index,
        total: int,
    ) -> None:
        self._options, self._source, self._contents = options, source, contents
        self._checker, self._store, self._claims, self._results = checker, store, claims, results
        self._index, self._progress = index, ProgressLine(total)
        own, (place, count) = contents.units, options.part.place
        self._total = max(0, math.ceil((own - place) / count))  # of its units
        self.packs = Packs(store, claims) if options.shard_size else None
        self._making = Making(options, results, claims, self.packs)
        self._unpacked: list[str] = []
        self._second: set[str] = set()  # records that have failed once
        self._written = time.monotonic()
        self._failed: set[str] = (
            set()
        )  # in this round, so that they are left out of its other passes
        self._again: set[str] = set()
        self.elsewhere: set[str] = set()
        self.kept = 0
        self.timings: list[Mapping[str, float]] = []

    def serve(self) -> None:
        """Make everything, and once more what has failed or was left to a run that died."""
        try:
            with quiet_libraries():
                self._round(None)
                if names := self._again | self.elsewhere:
                    while self.elsewhere and self._claims.undecided():
                        time.sleep(POLL_SECONDS)
                        self._look()
                    self._second = names & self._again
                    self._again, self.elsewhere, self._failed = set(), set(), set()
                    self._round(names)
        except BatchAborted:
            self._progress.say("stopped at the first failure; --keep-going goes on")
        finally:
            self._pack(at_least=1)
            self._progress.close()

    def _look(self) -> None:
        """Find out more about the runs that have the records."""
        self._claims.rivals(self._options.part.place)

    def _round(self, only: Collection[str] | None) -> None:
        """All passes over all units, or over those of some records."""
        options = self._options
        if options.ray is not None:
            with batch_ray.on_cluster(options.ray):
                self._make_with_ray(only)
            return
        if options.reasoner_url is not None:
            from vllm_cosmos3.reasoner.server import ReasonerServer

            with ReasonerServer(options.reasoner_url) as server:
                self._making.reasoner = server
                if self._contents.asks:
                    self._each(_questions(self._units(only)), self._making.answered, AT_ONCE)
                self._generate(only)
            return
        if self._contents.asks:
            with Opened(lambda: open_reasoner(options)) as reasoner:
                self._ask(self._units(only), reasoner)
        self._generate(only)
        if self._contents.captions:
            with Opened(lambda: open_reasoner(options)) as reasoner:
                self._describe(self._units(only), reasoner)

    def _make_with_ray(self, only: Collection[str] | None) -> None:
        if self._total == 0:
            return
        units = enumerate(_own(self._source, self._contents, self._options))
        numbers = None
        if only is not None:
            numbers = [i for i, unit in units if any(record.name in only for record in unit)]
        work = batch_ray.Work(
            options=self._options,
            overrides=self._source.overrides,
            said=self._source.said,
            chains=self._contents.chains,
            run=self._claims.run,
        )
        for outcome in batch_ray.outcomes(work, numbers, self._total):
            self._note([outcome])

    def _units(self, only: Collection[str] | None) -> Iterator[Unit]:
        for unit in _own(self._source, self._contents, self._options):
            if only is None or any(record.name in only for record in unit):
                yield unit

    def _generate(self, only: Collection[str] | None) -> None:
        pictures = (unit for unit in self._units(only) if unit[0].kind != REASONER)
        rest = (unit for unit in pictures if not self._failed & {record.name for record in unit})
        replicas = self._options.engine.data_parallel_size
        # Nothing begins after a failure, except on other replicas and in the same batch.
        room = replicas + PUBLISHING if self._options.keep_going else replicas
        with Opened(lambda: open_generator(self._options.engine)) as model:
            self._each(
                rest, lambda checked: self._making.generated(checked, model), room, self._share
            )

    def _share(self, checked: Checked) -> Fraction:
        """The part of a replica that a unit takes: requests that share their steps share it, too."""
        samples, engine = checked.samples, self._options.engine
        if len(checked.unit) > 1 or not samples or samples[0].max_batch_size == 1:
            return WHOLE
        exact = samples[0].effective["preset"] == "exact"
        limit = engine.batch_limit(devices().type, exact=exact)
        return Fraction(1, min(samples[0].max_batch_size, limit))

    def _each(
        self,
        units: Iterable[Unit],
        serve: Callable[[Checked], list[Outcome]],
        room: int,
        share: Callable[[Checked], Fraction] = lambda _: WHOLE,
    ) -> None:
        """Serve units on threads, in their order: as many at a time as their shares fill the room."""
        shares: dict[Future[list[Outcome]], Fraction] = {}  # of those that are not noted

        def note_until(free: Fraction) -> None:
            """Note what is done, in the order of the units, until so much room is free."""
            while True:
                while shares and (oldest := next(iter(shares))).done():
                    del shares[oldest]
                    self._note(oldest.result())
                running = [one for one in shares if not one.done()]
                if sum(shares[one] for one in running) > room - free:
                    wait(running, return_when=FIRST_COMPLETED)
                elif sum(shares.values()) > room + WHOLE - free:
                    wait(running[:1])  # so that few are done and not noted
                else:
                    return

        with (
            ThreadPoolExecutor(1) as checking,
            ThreadPoolExecutor(room * MAX_BATCH_SIZE) as pool,
        ):
            try:
                for checked in _ahead(checking, self._checker.check, units):
                    taken = share(checked)
                    note_until(taken)
                    shares[pool.submit(serve, checked)] = taken
                    note_until(LEAST)
                while shares:
                    note_until(Fraction(room))
            finally:
                pool.shutdown(cancel_futures=True)

    def _note(self, outcomes: Iterable[Outcome]) -> None:
        """Count and record what became of records."""
        for outcome in outcomes:
            if outcome.line is None:
                self.elsewhere.add(outcome.name)
                self._index.leave(outcome.name)
                continue
            if outcome.made and outcome.name in self._second:
                outcome.line["attempts"] = TRIES
            self._index.add(outcome.line)
            failed = outcome.error is not None
            if failed:
                self._progress.say(f"vllm-cosmos3 generate: {redacted(outcome.error)}")
                self._failed.add(outcome.name)
            elif outcome.made:
                self._progress.warn(outcome.where, outcome.line["warnings"])
                self.timings += [outcome.line["timings"]] if self._options.benchmark else []
            else:
                self.kept += 1
            if outcome.again:
                self._again.add(outcome.name)
            self._progress.update(
                done=self._index.done, failed=self._index.failed, made=outcome.made
            )
            if failed and not self._options.keep_going:
                raise BatchAborted
            if self._making.packable(outcome):
                self._unpacked.append(outcome.name)
                self._pack(at_least=self._options.shard_size or 1)
        if time.monotonic() - self._written >= INDEX_SECONDS:
            self._written = time.monotonic()
            self._index.write(self._store, self._claims)

    def _pack(self, at_least: int) -> None:
        """Pack what was made, if it is enough for a shard."""
        if self.packs is not None and len(self._unpacked) >= at_least:
            names, self._unpacked = self._unpacked, []
            for line in self.packs.pack(names):
                self._index.add(line)

    # The passes of a reasoner of this process, many questions at once.

    def _ask(self, units: Iterable[Unit], reasoner: Opened[Reasoner]) -> None:
        """Answer questions, and write prompts for the generator."""
        for some in _chunks(map(self._checker.check, _asking(units)), AT_ONCE):
            asked: list[tuple[BatchSample, Question]] = []
            taken: list[Checked] = []
            for checked in some:
                found = [self._question(sample) for sample in checked.samples]
                questions = [pair for pair in found if pair is not None]
                if unit_of_reasoner(checked) and not questions:
                    self._note(self._making.settled(checked))
                elif questions and not self._claims.take(checked.root):
                    self._note(self._making.left(checked, set()))
                else:
                    taken.append(checked)
                    asked += questions
            begun = time.perf_counter()
            answers = _ask(reasoner.get(), [question for _, question in asked]) if asked else []
            seconds = time.perf_counter() - begun
            for (sample, _), answer in zip(asked, answers, strict=True):
                self._note(self._taken(sample, answer, seconds))
            for checked in taken:
                self._claims.release(checked.root)
                checked.close()

    def _question(self, sample: BatchSample) -> tuple[BatchSample, Question] | None:
        """What is to be asked for a sample, None where that was done or the results are there."""
        question = sample.request if isinstance(sample.request, Question) else sample.upsampling
        if question is None or self._making.kept(sample, captioned=False) is not None:
            return None
        written = sample.upsampling is not None and self._results.upsampled(sample) is not None
        return None if written else (sample, question)

    def _taken(
        self, sample: BatchSample, answer: Answer | Exception, seconds: float
    ) -> list[Outcome]:
        """The answer for a sample is recorded; the outcome, where there is one by now."""
        try:
            if isinstance(answer, Exception):
                raise answer
            if sample.upsampling is None:
                line = self._results.answer(sample, answer, seconds)
                return [Outcome(name=sample.record.name, line=line, made=True)]
            prompt = caption_of(answer.text, complete=answer.complete)
            self._results.keep_prompt(sample, prompt)
        except Exception as error:  # noqa: BLE001 - whatever it is, it ends this one alone
            return [self._making.failed(sample, error, again=False)]
        return []

    def _describe(self, units: Iterable[Unit], reasoner: Opened[Reasoner]) -> None:
        """Write the captions of what was made."""
        wanted = (unit for unit in units if any(record.caption for record in unit))
        for some in _chunks(map(self._checker.check, wanted), AT_ONCE):
            for checked in some:
                self._note(self._described(checked, reasoner))
                checked.close()

    def _described(self, checked: Checked, reasoner: Opened[Reasoner]) -> Iterator[Outcome]:
        for sample in checked.samples:
            made = self._making.kept(sample, captioned=False) is not None
            if not sample.record.caption or not made or self._making.kept(sample, captioned=True):
                continue
            if not self._claims.take(checked.root):
                yield Outcome(name=sample.record.name, line=None)
                return
            try:
                line = self._making.described(sample, reasoner.get())
            except Exception as error:  # noqa: BLE001 - whatever it is, it ends this one alone
                yield self._making.failed(sample, error, again=False)
            else:
                yield Outcome(name=sample.record.name, line=line)
            finally:
                self._claims.release(checked.root)


def unit_of_reasoner(checked: Checked) -> bool:
    """Whether a unit is a question."""
    return checked.unit[0].kind == REASONER


def _questions(units: Iterable[Unit]) -> Iterator[Unit]:
    return (unit for unit in units if unit[0].kind == REASONER)


def _asking(units: Iterable[Unit]) -> Iterator[Unit]:
    for unit in units:
        if any(record.kind == REASONER or record.upsample is not None for record in unit):
            yield unit


def _ask(reasoner: Asked, questions: Sequence[Question]) -> list[Answer | Exception]:
    """The answer to each question, or why there is none: a bad question spoils no other."""
    try:
        return list(reasoner.ask(questions))
    except Exception as error:  # noqa: BLE001 - of one of them, it does not say which
        if len(questions) == 1:
            return [error]
    return [answer for question in questions for answer in _ask(reasoner, [question])]


def _ahead(
    pool: ThreadPoolExecutor, check: Callable[[Unit], Checked], units: Iterable[Unit]
) -> Iterator[Checked]:
    """Units that are checked, some of them before they are asked for."""
    waiting: deque[Future[Checked]] = deque()
    try:
        for unit in units:
            waiting.append(pool.submit(check, unit))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.result().close()


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while some := list(islice(iterator, size)):
        yield some
