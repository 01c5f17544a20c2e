"""Shares of held-out prompts that clips confirm, by attribute, with 95 % intervals.

    python -m benchmarks.truth demo --count 768 --json truth.json
    python -m benchmarks.truth demo --count 4 --rows few-steps image     # a minute on a CPU

Each row is a way to make clips: fewer or more steps, guidance, given first frames, and what may
change bits, such as the attention kernel, the dtype or weights that rest on the host. The clips are
read back by the demo world's checker, which sees pixels alone; "one" and "two" are "all" in scenes
of one and of two things, "contact" is "sound" where something touches. Rows that only compute in
another way than ``few-steps`` are also compared with it prompt by prompt, if it was measured.
``--reasoner`` asks the reasoner what happens in true clips, and in clips of the first row that were
confirmed. ``--json`` has each row as far as it is while it is made.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.captions import canonical
from training.judging import compared
from training.questions import CAPTION
from training.scenes import MATERIALS, Canvas
from training.shares import Share
from training.yardstick import Pixels, Prompt, changes, confirmed_shares, held_out_prompts
from vllm_cosmos3 import Cosmos3
from vllm_cosmos3.media import write_video
from vllm_cosmos3.reasoner.offline import Reasoner
from vllm_cosmos3.request.questions import Question

COLUMNS = (
    "colour", "motion", "gripper", "tone", "size", "shape", "sound", "contact", "all", "one", "two",
)  # fmt: skip
FEW = {"num_inference_steps": 16, "guidance_scale": 3.0}
BASE, USUAL = "few-steps", Canvas()
AT_ONCE = 64  # prompts of a list, whose clips are in memory together


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way to make clips: fields of the request, given frames or a control, engine, canvas."""

    fields: dict[str, Any] = field(default_factory=lambda: dict(FEW))
    engine: dict[str, Any] = field(default_factory=dict)
    given: int = 0
    control: str | None = None
    canvas: Canvas = USUAL
    grown: bool = False
    sound: bool = False

    def request(self, prompt: Prompt) -> dict[str, Any]:
        known = {}
        if self.given:
            frames = prompt.frames(self.given)
            known = {"image": frames[0]} if self.given == 1 else {"video": frames}
        control = prompt.control(self.control) if self.control else {}
        return prompt.fields | self.fields | known | control | {"generate_sound": self.sound}

    def prompts(self, count: int) -> list[Prompt]:
        materials = MATERIALS if self.sound else MATERIALS[:1]
        return held_out_prompts(count, canvas=self.canvas, grown=self.grown, materials=materials)


ROWS = {
    BASE: Row(),
    "defaults": Row(fields={}),
    "image": Row(given=1),
    "image-defaults": Row(fields={}, given=1),  # of a distilled checkpoint its four steps
    "video": Row(given=5),
    "no-guidance": Row(fields=FEW | {"guidance_scale": 1.0}),
    "8-steps": Row(fields=FEW | {"num_inference_steps": 8}),
    "sdpa": Row(engine={"attention_backend": "sdpa"}),
    "float32": Row(engine={"dtype": "float32"}),
    "on-host": Row(engine={"und_residency": "host", "enable_layerwise_offload": True}),
    "picture": Row(fields={}, canvas=Canvas(frames=1)),
    "square": Row(canvas=Canvas(256, 256)),
    "portrait": Row(canvas=Canvas(192, 320)),
    "33-frames": Row(canvas=Canvas(frames=33)),
    "all-kinds": Row(grown=True),  # three things, bouncing, stacking, passing behind
    "edge": Row(fields={"num_inference_steps": 16}, control="edge"),
    "seg": Row(fields={"num_inference_steps": 16}, control="seg"),
    "sound": Row(sound=True),
}


@dataclass(slots=True)
class Made:
    """The clips of a row if they are kept, which attributes each confirms, and the seconds they took."""

    clips: list[Pixels] = field(default_factory=list)
    results: list[dict[str, bool]] = field(default_factory=list)
    seconds: float = 0.0

    def record(self) -> dict[str, Any]:
        shares = confirmed_shares(self.results)
        numbers = {name: [s.right, s.asked, *s.interval] for name, s in shares.items()}
        return {"shares": numbers, "seconds": self.seconds / len(self.results)}


def made(
    checkpoint: str, engine: dict[str, Any], row: Row, prompts: Sequence[Prompt], *, keep: bool
) -> Iterator[Made]:
    """A row as far as it is, again and again until each prompt has its clip."""
    so_far = Made()
    with Cosmos3(checkpoint, **engine, **row.engine) as model:
        for first in range(0, len(prompts), AT_ONCE):
            some = prompts[first : first + AT_ONCE]
            began = time.perf_counter()
            outputs = model.generate([row.request(prompt) for prompt in some])
            so_far.seconds += time.perf_counter() - began
            for prompt, output in zip(some, outputs, strict=True):
                clip = output.image[None] if output.video is None else output.video
                so_far.results.append(judged(prompt, clip, output.sound))
                so_far.clips += [clip] if keep else []
            yield so_far


def judged(prompt: Prompt, clip: Pixels, sound: NDArray[np.float32] | None) -> dict[str, bool]:
    """Which attributes a clip confirms, and all of them again under how many things there are.

    ``contact`` is ``sound`` where there has to be a tone.
    """
    result = prompt.confirmed(clip, sound)
    things = {1: "one", 2: "two"}.get(len(prompt.scene.things), "more")
    heard = {"contact": result["sound"]} if "sound" in result and prompt.scene.contacts else {}
    return result | heard | {things: result["all"]}


def described(checkpoint: str, clips: dict[str, list[tuple[Prompt, Pixels]]]) -> dict[str, Share]:
    """The share of clips of each sort of which the reasoner says what was asked."""
    shares = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        Reasoner(checkpoint, max_model_len=4096, gpu_memory_utilization=0.2) as reasoner,
    ):
        for sort, pairs in clips.items():
            questions = []
            for index, (prompt, clip) in enumerate(pairs):
                file = Path(folder) / f"{index}.mp4"
                write_video(file, clip, fps=prompt.scene.canvas.fps)
                text = CAPTION[index % len(CAPTION)]
                questions.append(Question(prompt=text, video=str(file), max_new_tokens=48))
            answers = reasoner.ask(questions)
            pairs_said = zip(pairs, answers, strict=True)
            right = [tells(prompt, answer.text.strip()) for (prompt, _), answer in pairs_said]
            shares[sort] = Share(sum(right), len(right))
    return shares


def tells(prompt: Prompt, said: str) -> bool:
    """Whether a description has every word that the prompt tells; a clip may show other things besides."""
    told = ["colour", "shape", "motion"]
    told += ["tone"] * prompt.caption.tone + ["size"] * all(prompt.caption.sizes)
    found = compared(canonical(prompt.scene), said)
    return all(found[name] for name in told)


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("checkpoint", help="demo, or a folder with the demo world's vocabulary")
    p.add_argument(
        "--device", help="e.g. cuda:0,0 for two replicas (default: what vLLM was built for)"
    )
    p.add_argument("--replicas", type=int, default=1, help="that share the prompts (default: 1)")
    p.add_argument("--count", type=int, default=768, help="prompts in each row (default: 768)")
    p.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    p.add_argument("--reasoner", action="store_true", help="ask the reasoner as well")
    p.add_argument("--json", type=Path, help="write the numbers there too")
    a = p.parse_args(argv)
    engine = {"device": a.device, "data_parallel_size": a.replicas}
    results: dict[str, list[dict[str, bool]]] = {}
    record: dict[str, Any] = {}
    asked: dict[str, list[tuple[Prompt, Pixels]]] = {}
    heads = (*COLUMNS, f"all, against {BASE}", "s/clip")
    print(f"| how | {' | '.join(heads)} |\n|{'---|' * (len(heads) + 1)}")
    for name in a.rows:
        row = ROWS[name]
        prompts = row.prompts(a.count)
        keep = a.reasoner and not asked
        for so_far in made(a.checkpoint, engine, row, prompts, keep=keep):
            record[name] = so_far.record()
            write(a.json, record)
        results[name] = so_far.results
        if keep:
            rows = zip(prompts, so_far.clips, so_far.results, strict=True)
            confirmed = [(p, clip) for p, clip, result in rows if result["all"]]
            asked = {"true clips": [(p, p.frames(p.scene.canvas.frames)) for p in prompts],
                     f"confirmed clips of {name}": confirmed}  # fmt: skip
        shares = confirmed_shares(results[name])
        same = row.engine and BASE in results
        change = changes(results[BASE], results[name])["all"] if same else None
        cells = [*(_cell(shares.get(column)) for column in COLUMNS), _cell(change)]
        print(f"| {name} | {' | '.join(cells)} | {record[name]['seconds']:.2f} |", flush=True)
    if a.reasoner:
        for sort, share in described(a.checkpoint, {k: v for k, v in asked.items() if v}).items():
            print(f"reasoner, {sort}, every word that was asked: {share}")
            record[f"reasoner, {sort}"] = [share.right, share.asked, *share.interval]
        write(a.json, record)


def write(file: Path | None, record: dict[str, Any]) -> None:
    """What is known so far: a long run that is ended keeps it."""
    if file is not None:
        file.write_text(json.dumps(record, indent=2) + "\n")


def _cell(number: object) -> str:
    return "" if number is None else str(number).rpartition(" of ")[0]


if __name__ == "__main__":
    main()
