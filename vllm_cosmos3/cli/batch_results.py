"""Results of a batch: the folder of each sample in the output, and whether it is complete."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_cosmos3 import media
from vllm_cosmos3.batch.index import line_of
from vllm_cosmos3.batch.locations import redacted
from vllm_cosmos3.batch.records import REASONER, Refused
from vllm_cosmos3.batch.store import Store
from vllm_cosmos3.cli.batch_samples import BatchSample, hash_of
from vllm_cosmos3.cli.results import ARGUMENTS, OUTPUTS, described, generate, write_json
from vllm_cosmos3.cli.run_options import RunOptions
from vllm_cosmos3.errors import Cosmos3Error
from vllm_cosmos3.request.questions import Question
from vllm_cosmos3.request.request import GenerateRequest

if TYPE_CHECKING:
    from vllm_cosmos3.engine import Cosmos3
    from vllm_cosmos3.reasoner.offline import Answer

TEXT, UPSAMPLED = "reasoner_text.txt", "upsampled.json"
LAST = "last.png"  # the last frame of a video that another record continues
START = "continued_frame"  # in the outputs: the hash of the frame that the video starts from

DESCRIBE = (
    "Describe the {kind} in one paragraph, for somebody who cannot see it: the subjects and what they "
    "look like, where they are, what happens in which order, the light and the camera."
)

Line = dict[str, Any]  # of the index


class Results:
    """The results of samples in a store."""

    def __init__(self, store: Store, options: RunOptions, run: str) -> None:
        self._store, self._options, self._run = store, options, run

    def kept(self, sample: BatchSample, *, captioned: bool = True) -> Mapping[str, Any] | None:
        """The outputs that an earlier run has left of this very record, None if it is to be made.

        Without ``captioned`` also those to which a caption is still to be written.
        """
        name = sample.record.name
        done = self.outputs(name)
        try:
            files = [file for output in done["outputs"] for file in output["files"]]
        except (LookupError, TypeError):
            return None  # of another program
        if done.get("status") != "success" or done.get("digest") != sample.digest:
            return None
        if captioned and sample.record.caption and not _captioned(done):
            return None
        files += [LAST] if sample.continued else []
        if not all(self._store.exists(f"{name}/{file}") for file in files):
            return None
        start = self.start(sample)
        same = start is None or done.get(START) == hash_of(start)
        return done if same else None

    def outputs(self, name: str) -> dict[str, Any]:
        """What is recorded of a sample, empty where that is nothing or cannot be read."""
        try:
            found = json.loads(self._store.read(f"{name}/{OUTPUTS}") or b"")
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def start(self, sample: BatchSample) -> bytes | None:
        """The frame that a sample starts from, as another one has left it; empty if it has not."""
        before = sample.record.continue_from
        if before is None or sample.record.kind == REASONER:
            return None
        return self._store.read(f"{before}/{LAST}") or b""

    def make(
        self, model: Cosmos3, sample: BatchSample, prompt: str | None, held: Callable[[], None]
    ) -> Line:
        """The pictures of a sample. ``prompt`` is the one that the reasoner has written, ``held``
        raises if another run has taken the record over.
        """
        assert isinstance(sample.request, GenerateRequest)  # so says its kind
        record, request, mark = sample.record, sample.request, {"digest": sample.digest}
        original = None
        if prompt is not None:
            original, request = record.fields["prompt"], replace(request, prompt=prompt)
        if (start := self.start(sample)) is not None:
            image = media.read_image(start, field="continue_from")
            request = replace(request, image=image)
            mark[START] = hash_of(start)
        options = self._options
        own = replace(
            options,
            name=record.name,
            crf=options.crf if record.crf is None else record.crf,
            image_quality=options.image_quality if record.quality is None else record.quality,
        )
        self.clear(record.name)
        folder = self._store.folder(record.name)
        try:
            output, files, timings = generate(model, request, own, folder.path, report=False)
            if sample.continued and output.video is not None:
                made = output.video[-1][:, -sample.effective["width"] :]  # controls may be beside
                media.write_image(folder.path / LAST, made)
            arguments, outputs = described(own, output, files, timings, original)
            arguments |= sample.urls
            warnings = list(dict.fromkeys([*sample.warnings, *output.warnings]))
            outputs |= {"args": arguments, "warnings": warnings, **mark, "run": self._run}
            held()
            write_json(folder.path / ARGUMENTS, arguments)
            write_json(folder.path / OUTPUTS, outputs)
            folder.publish(OUTPUTS)
        finally:
            folder.close()
        self._store.delete(f"{record.name}/{UPSAMPLED}")
        return line_of(record.name, outputs)

    def answer(self, sample: BatchSample, answer: Answer, seconds: float) -> Line:
        """The answer of the reasoner; ``seconds`` are those of all that was asked with it."""
        self.clear(sample.record.name)
        self._store.write(f"{sample.record.name}/{TEXT}", answer.text.encode())
        content = {"text": answer.text, "tokens": answer.tokens, "complete": answer.complete}
        outputs = [{"content": content, "files": [TEXT]}]
        return self._record(sample, status="success", outputs=outputs, timings={"answer": seconds})

    def fail(self, sample: BatchSample, error: Exception) -> Line:
        """A sample that could not be made, and why. What lacks its captions alone is kept."""
        message = str(error) or type(error).__name__
        if (made := self.kept(sample, captioned=False)) is not None:
            line = line_of(sample.record.name, made)
            return line | {"status": "error", "error": redacted(message)}
        known = isinstance(error, Cosmos3Error)
        stack = None if known else "".join(traceback.format_exception(error))
        return self._record(
            sample, status="error", message=redacted(message), stack_trace=redacted(stack)
        )

    def refuse(self, refused: Refused, served: Collection[str]) -> Line | None:
        """A record that cannot be served, unless another one has its name."""
        if refused.name is None or refused.name in served:
            return None
        arguments = {"name": refused.name, **redacted(refused.values)}
        return self._write(refused.name, arguments, message=redacted(str(refused.error)))

    def upsampled(self, sample: BatchSample) -> str | None:
        """The prompt that the reasoner has written for a sample, None if it has not yet."""
        found = json.loads(self._store.read(f"{sample.record.name}/{UPSAMPLED}") or b"{}")
        return found["prompt"] if found.get("digest") == sample.digest else None

    def keep_prompt(self, sample: BatchSample, prompt: str) -> None:
        """A prompt that the reasoner has written, for the generator to take."""
        text = json.dumps({"digest": sample.digest, "prompt": prompt})
        self._store.write(f"{sample.record.name}/{UPSAMPLED}", text.encode())

    def pictures(self, name: str, folder: Path) -> list[Path]:
        """Local copies of what was made of a sample, one for each seed."""
        copies = []
        for output in self.outputs(name)["outputs"]:
            copies.append(folder / output["files"][0])
            self._store.get(f"{name}/{copies[-1].name}", copies[-1])
        return copies

    def describe(self, name: str, captions: Sequence[str]) -> Line:
        """What was made, with the captions of its pictures."""
        outputs = self.outputs(name)
        for output, text in zip(outputs["outputs"], captions, strict=True):
            output["content"]["caption"] = text
        self._store.write(f"{name}/{OUTPUTS}", _json(outputs))
        return line_of(name, outputs)

    def clear(self, name: str) -> None:
        """Remove what an earlier run has left of a sample, its outputs first."""
        made = self.outputs(name).get("outputs", [])
        self._store.delete(f"{name}/{OUTPUTS}")
        listed = [file for output in made for file in output.get("files", [])]
        parts = [file for file in self._store.names(name) if file.endswith(".part")]
        for file in {*listed, *parts, LAST}:
            self._store.delete(f"{name}/{file}")

    def _record(self, sample: BatchSample, **values: Any) -> Line:
        said = {"warnings": list(sample.warnings), "digest": sample.digest, "run": self._run}
        return self._write(sample.record.name, dict(sample.effective), **values, **said)

    def _write(self, name: str, arguments: Mapping[str, Any], **values: Any) -> Line:
        record = {"status": "error", "message": "", "args": arguments, "outputs": [], **values}
        self._store.write(f"{name}/{ARGUMENTS}", _json(arguments))
        self._store.write(f"{name}/{OUTPUTS}", _json(record))
        return line_of(name, record)


def caption_question(file: Path) -> Question:
    """What the reasoner is asked about a picture or a clip that was made."""
    if file.suffix == ".mp4":
        return Question(prompt=DESCRIBE.format(kind="video"), video=str(file), max_new_tokens=512)
    return Question(prompt=DESCRIBE.format(kind="picture"), image=str(file), max_new_tokens=512)


def _captioned(outputs: Mapping[str, Any]) -> bool:
    return all(output["content"].get("caption") is not None for output in outputs["outputs"])


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, default=str) + "\n").encode()
