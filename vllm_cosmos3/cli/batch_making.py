"""Making of the units of a batch: claimed, made, recorded and given up, one by one.

What is here runs in the process of the command, on several threads, and in workers of Ray alike.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from vllm_cosmos3.batch.claims import Claims, LostClaim
from vllm_cosmos3.batch.index import line_of
from vllm_cosmos3.batch.packs import Packs
from vllm_cosmos3.cli.batch_results import Line, Results, caption_question
from vllm_cosmos3.cli.batch_samples import BatchSample, Checked
from vllm_cosmos3.cli.run_options import RunOptions
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.request.questions import Question
from vllm_cosmos3.request.upsample import caption_of

if TYPE_CHECKING:
    from vllm_cosmos3.engine import Cosmos3
    from vllm_cosmos3.reasoner.offline import Answer

TRIES = 2  # of a record that fails


class Asked(Protocol):
    """A reasoner: the offline one, or a server."""

    def ask(self, questions: Sequence[Question]) -> list[Answer]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a record in this run.

    ``line`` is that of the index, None where another run has the record. ``made`` is false for
    results that were there. ``again`` says whether a second try may help.
    """

    name: str
    line: Line | None
    made: bool = False
    again: bool = False
    error: str | None = None
    where: str = ""


T = TypeVar("T")


class Opened(Generic[T]):
    """A model that is loaded when it is needed first, and closed with the block."""

    def __init__(self, open_model: Callable[[], AbstractContextManager[T]]) -> None:
        self._open_model, self._stack, self._lock = open_model, ExitStack(), threading.Lock()
        self._model: T | None = None

    def get(self) -> T:
        """The model."""
        with self._lock:
            if self._model is None:
                self._model = self._stack.enter_context(self._open_model())
            return self._model

    def __enter__(self) -> Opened[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


class Making:
    """Makes units for a run. ``reasoner`` is one that answers beside the generator, if there is one;
    with ``packs`` results stay claimed until they are packed."""

    def __init__(
        self,
        options: RunOptions,
        results: Results,
        claims: Claims,
        packs: Packs | None = None,
    ) -> None:
        self.packs = packs
        self.reasoner: Asked | None = None
        self.options, self.results, self.claims = options, results, claims

    def generated(self, checked: Checked, model: Opened[Cosmos3]) -> list[Outcome]:
        """Make the pictures of a unit."""

        def make(sample: BatchSample, held: Callable[[], None]) -> Line:
            line = self.kept(sample, captioned=False)
            if line is None:
                prompt = self._prompt(sample)
                line = self.results.make(model.get(), sample, prompt, held)
            if sample.record.caption and self.reasoner is not None:
                line = self.described(sample, self.reasoner)
            return line

        return self._served(checked, make, captioned=self.reasoner is not None)

    def answered(self, checked: Checked) -> list[Outcome]:
        """Ask the reasoner the question of a unit."""
        assert self.reasoner is not None
        reasoner = self.reasoner

        def answer(sample: BatchSample, held: Callable[[], None]) -> Line:
            assert isinstance(sample.request, Question)  # so says its kind
            begun = time.perf_counter()
            (found,) = reasoner.ask([sample.request])
            held()
            return self.results.answer(sample, found, time.perf_counter() - begun)

        return self._served(checked, answer, captioned=True)

    def settled(self, checked: Checked) -> list[Outcome]:
        """Record what is known of a unit without any work: it is there, or refused."""

        def nothing(_: BatchSample, __: Callable[[], None]) -> Line:
            raise AssertionError("there is something to do")

        return self._served(checked, nothing, captioned=True)

    def described(self, sample: BatchSample, reasoner: Asked) -> Line:
        """Have the reasoner write the captions of what was made."""
        with TemporaryDirectory(prefix="cosmos3-caption-") as folder:
            files = self.results.pictures(sample.record.name, Path(folder))
            answers = reasoner.ask([caption_question(file) for file in files])
        return self.results.describe(sample.record.name, [answer.text for answer in answers])

    def _served(
        self,
        checked: Checked,
        work: Callable[[BatchSample, Callable[[], None]], Line],
        *,
        captioned: bool,
    ) -> list[Outcome]:
        try:
            there = self._kept if self.packs is None else self._packed
            kept = list(there(checked, captioned=captioned))
            if len(kept) == len(checked.unit):
                if checked.root in self.claims.left:  # by a run that died before it could
                    self._tidy(checked.root)
                return kept
            if not self.claims.take(checked.root):
                return kept + self.left(checked, {outcome.name for outcome in kept})
            outcomes: list[Outcome] = []
            try:
                outcomes += self._each(checked, work, captioned=captioned)
            finally:
                if not any(map(self.packable, outcomes)):
                    self.claims.release(checked.root)
            return outcomes
        finally:
            checked.close()

    def packable(self, outcome: Outcome) -> bool:
        """Whether the result of a record is to be packed."""
        line = outcome.line
        done = line is not None and line["status"] == "success" and line["shard"] is None
        return self.packs is not None and done

    def _tidy(self, name: str) -> None:
        if self.packs is not None:
            self.packs.remove(name)
        elif self.claims.take(name):
            self.claims.release(name)

    def _packed(self, checked: Checked, *, captioned: bool) -> Iterator[Outcome]:
        assert self.packs is not None
        for sample in checked.samples:
            line = self.packs.line(sample.record.name, sample.digest)
            if line is not None:
                yield Outcome(name=sample.record.name, line=line)

    def _kept(self, checked: Checked, *, captioned: bool) -> Iterator[Outcome]:
        changed = False
        for sample in checked.samples:
            line = None if changed else self.kept(sample, captioned=captioned)
            if line is None:
                changed = True  # what continues it is to be made, too
            else:
                yield Outcome(name=sample.record.name, line=line)

    def kept(self, sample: BatchSample, *, captioned: bool) -> Line | None:
        """The line of results that are there: of this run, or of any where it resumes."""
        if self.packs is not None:
            line = self.packs.line(sample.record.name, sample.digest)
            if line is not None:
                return line
        done = self.results.kept(sample, captioned=captioned)
        if done is None or not (self.options.resume or done.get("run") == self.claims.run):
            return None
        return line_of(sample.record.name, done)

    def left(self, checked: Checked, but: set[str]) -> list[Outcome]:
        """The records of a unit that another run makes."""
        names = [record.name for record in checked.unit]
        return [Outcome(name=name, line=None) for name in names if name not in but]

    def _each(
        self,
        checked: Checked,
        work: Callable[[BatchSample, Callable[[], None]], Line],
        *,
        captioned: bool,
    ) -> Iterator[Outcome]:
        def held() -> None:
            if not self.claims.holds(checked.root):
                raise LostClaim

        for refused in checked.refused:
            line = self.results.refuse(refused, ())
            again = refused.error.code == "fetch_failed"
            name = str(refused.name)
            yield Outcome(name=name, line=line, made=True, again=again, error=str(refused.error))
        changed = False
        for place, sample in enumerate(checked.samples):
            line = None if changed else self.kept(sample, captioned=captioned)
            if line is not None:
                yield Outcome(name=sample.record.name, line=line)
                continue
            changed = True
            try:
                yield self._tried(sample, lambda sample=sample: work(sample, held))  # type: ignore[misc]
            except LostClaim:
                for lost in checked.samples[place:]:
                    yield Outcome(name=lost.record.name, line=None)
                return

    def _tried(self, sample: BatchSample, work: Callable[[], Line]) -> Outcome:
        """What becomes of a sample; one that fails is tried again now where nothing comes after it."""
        tries = 1 if self.options.keep_going else TRIES
        for attempt in range(1, tries + 1):
            try:
                line = work()
            except LostClaim:
                raise
            except Exception as error:  # noqa: BLE001 - whatever it is, it ends this one alone
                again = not isinstance(error, InvalidRequest)
                if again and attempt < tries:
                    continue
                return self.failed(sample, error, again=again, attempt=attempt)
            name = sample.record.name
            line["attempts"] = attempt
            return Outcome(name=name, line=line, made=True, where=sample.record.where)
        raise AssertionError("unreachable")

    def failed(
        self, sample: BatchSample, error: Exception, *, again: bool, attempt: int = 1
    ) -> Outcome:
        """A sample that failed, recorded in its folder."""
        line = self.results.fail(sample, error)
        line["attempts"] = attempt
        message = f"{sample.record.where}: {line['error']}"
        return Outcome(name=sample.record.name, line=line, made=True, again=again, error=message)

    def _prompt(self, sample: BatchSample) -> str | None:
        """The prompt that the reasoner writes for a sample, or has written; None without one."""
        if sample.upsampling is None:
            return None
        if (written := self.results.upsampled(sample)) is not None:
            return written
        if self.reasoner is None:  # another run has claimed it and asks
            raise LostClaim
        (answer,) = self.reasoner.ask([sample.upsampling])
        return caption_of(answer.text, complete=answer.complete)
