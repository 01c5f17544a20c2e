"""Command lines of other programs' documents, as data, and what is replaced to run them here.

``commands.jsonl`` has each command with the places where it stands; ``records/`` the framework's
sample inputs and ``chats.jsonl`` the requests of the reasoner's notebook, both rewritten with short
prompts and local files.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from media_files import clip
from PIL import Image

from vllm_cosmos3.cli.foreign_flags import FLAGS, GENERATE, GENERATOR, SERVE, translated

HERE = Path(__file__).parent
RECORDS = HERE / "records"
OURS = ("cosmos_framework.scripts.inference", "examples/cosmos3/")  # what our command stands for
FRAMES = 61  # of the clip, as many as the longest chunk of actions has
DEPLOY = """\
async_chunk: false
stages:
  - stage_id: 0
    max_num_seqs: 1
    enforce_eager: true
    trust_remote_code: true
    model_class_name: Cosmos3OmniDiffusersPipeline
    model_config:
      guardrails: false
      offload_guardrail_models: false
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A command as it is written, and where: document, page and line."""

    command: str
    places: tuple[str, ...]

    @property
    def program(self) -> str:
        """The command of ours that runs it: generate, serve, or curl for a request."""
        if "curl" in self.command.split()[0]:
            return "curl"
        return "serve" if "vllm serve" in self.command else "generate"

    @property
    def words(self) -> list[str]:
        """The words after the program, without the environment."""
        words = shlex.split(self.command)
        if self.program == "serve":
            return words[words.index("serve") + 1 :]
        start = next(i for i, word in enumerate(words) if word.startswith(OURS))
        return words[start + 1 :]

    @property
    def ranks(self) -> int | None:
        """How many processes torchrun starts; None without it."""
        found = re.search(r"--nproc[-_]per[-_]node=\"?(\d+|\$\w+)", self.command)
        if found is None:
            return None
        return int(found[1]) if found[1].isdigit() else 4

    @property
    def environment(self) -> dict[str, str]:
        """The variables before the program."""
        words = shlex.split(self.command)
        return dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))


CHATS: list[dict[str, Any]] = [
    json.loads(row) for row in (HERE / "chats.jsonl").read_text().splitlines()
]
LINES = [
    Line(command=row["command"], places=tuple(row["places"]))
    for row in map(json.loads, (HERE / "commands.jsonl").read_text().splitlines())
]


def of(program: str) -> list[Line]:
    return [line for line in LINES if line.program == program]


def write_inputs(folder: Path) -> None:
    """The records with the files that they name."""
    shutil.copytree(RECORDS, folder, dirs_exist_ok=True)
    Image.new("RGB", (96, 64), "teal").save(folder / "robot.jpg")
    clip(folder / "clip.mp4", frames=FRAMES)
    for name, width in (("av", 9), ("bridge", 10)):
        rows = np.zeros((FRAMES - 1, width)).tolist()
        (folder / f"rows_{name}.json").write_text(json.dumps(rows))
    (folder / "no_guardrails.yaml").write_text(DEPLOY)


def replaced(line: Line, checkpoint: Path, inputs: Path, out: Path) -> list[str]:
    """The words of a command of ``generate`` with the paths of this machine."""
    words = list(line.words)
    for index, word in enumerate(words[:-1]):
        if word in ("--checkpoint", "--checkpoint-path"):
            words[index + 1] = str(checkpoint)
        elif word in ("-o", "--out"):
            words[index + 1] = str(out)
        elif word == "-i":
            words[index + 1] = str(inputs / _record(words[index + 1]))
    return words


def _record(name: str) -> str:
    """The file that stands for an input of the documents."""
    kinds = {"reasoner": "reasoner_image.json", "*": "[ait]*.json", "t2i": "t2i.json"}
    kinds |= {"t2v": "t2v.json", "text2video": "t2v.json", "USE_CASE": "t2v.json"}
    found = next((file for part, file in kinds.items() if part in name), None)
    return found or "action_forward_dynamics_av.json"


# The tables of docs/commands.md: ``python tests/seeds/lines.py`` writes them there.

DOCUMENT = HERE.parents[1] / "docs" / "commands.md"


def verdict(line: Line) -> str:
    """What becomes of a command."""
    if line.program == "curl":
        guarded = re.search(r"guardrails\W+true", line.command) is not None
        return "answered; without guardrails 409 with the install line" if guarded else "answered"
    with TemporaryDirectory() as folder:
        (Path(folder) / "stage.yaml").write_text(DEPLOY)
        words = [f"{folder}/stage.yaml" if w.endswith(".yaml") else w for w in line.words]
        _, notes = translated(line.program, words)
    inert = ", ".join(f"`{note.split()[0]}`" for note in notes)
    return "runs" + (f"; no effect: {inert}" if inert else "")


def flags_table(command: str) -> str:
    rows = []
    for row in FLAGS[command]:
        what = "no effect: " if row.becomes is None and not row.instead else ""
        what += f"refused: {row.instead.removeprefix('left out: ')}" if row.instead else row.effect
        rows.append(f"| {', '.join(f'`{name}`' for name in row.names)} | {what} |")
    return "\n".join(["| flag | what becomes of it |", "|---|---|", *rows])


def commands_table() -> str:
    rows = [
        f"| {'; '.join(line.places)} | `{_short(line.command)}` | {verdict(line)} |"
        for line in LINES
    ]
    return "\n".join(["| document, page, line | command | |", "|---|---|---|", *rows])


def _short(command: str) -> str:
    shown = command.replace("|", "/").replace("`", "'")
    return shown if len(shown) <= 150 else f"{shown[:147]}..."


def document(text: str) -> str:
    """The document with its tables as they are now."""
    tables = {name: flags_table(name) for name in (GENERATE, SERVE, GENERATOR)}
    for name, table in (tables | {"commands": commands_table()}).items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        before, after = text.split(begin)[0], text.split(end)[1]
        text = f"{before}{begin}{table}{end}{after}"
    return text


if __name__ == "__main__":
    DOCUMENT.write_text(document(DOCUMENT.read_text()))
