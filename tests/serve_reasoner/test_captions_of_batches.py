"""Batch files with a reasoner that is served: questions, prompts and captions beside the generator."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from servers import Server

from vllm_cosmos3.cli import main
from vllm_cosmos3.reasoner.offline import Answer
from vllm_cosmos3.reasoner.server import ReasonerServer
from vllm_cosmos3.request.questions import Question

FAST = {
    "size": "64x64",
    "num_steps": 1,
    "guidance": 1,
    "num_frames": 5,
    "prompt": "a boat",
    "seed": 3,
}


def test_captions_answers_and_a_second_try(
    tiny_checkpoint: Path,
    reasoner_server: Server,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    records = [
        {**FAST, "name": "clip", "caption": True},
        {**FAST, "name": "pictures", "num_frames": 1, "caption": True, "num_outputs": 2},
        {
            "name": "text",
            "model_mode": "reasoner",
            "prompt": "what is a boat?",
            "max_new_tokens": 8,
        },
        {**FAST, "name": "plain", "num_frames": 1},
    ]
    file = tmp_path / "x.jsonl"
    file.write_text("\n".join(map(json.dumps, records)))
    command = [
        "generate",
        str(tiny_checkpoint),
        "--input",
        str(file),
        "--out",
        str(tmp_path / "out"),
    ]
    command += ["--reasoner-url", reasoner_server.url, "--keep-going"]
    ask, asked = ReasonerServer.ask, []

    def fails_once(self: ReasonerServer, questions: list[Question]) -> list[Answer]:
        if any(question.video for question in questions) and not asked:
            asked.append(questions)
            raise ConnectionError("gone for a moment")
        return ask(self, [Question(prompt=q.prompt, image=q.image, video=q.video, max_new_tokens=9) for q in questions])  # fmt: skip

    monkeypatch.setattr(ReasonerServer, "ask", fails_once)
    assert main(command) == 0
    said = capsys.readouterr()
    assert "gone for a moment" in said.err
    assert "4 of 4 records have their results" in said.out
    lines = [
        json.loads(line) for line in (tmp_path / "out" / "index.jsonl").read_text().splitlines()
    ]
    found = {line["name"]: line for line in lines}
    assert {name: len(line["captions"]) for name, line in found.items()} == {
        "text": 0, "clip": 1, "pictures": 2, "plain": 0,
    }  # fmt: skip
    assert {name: line["attempts"] for name, line in found.items()} == {
        "text": 1, "clip": 2, "pictures": 1, "plain": 1,
    }  # fmt: skip
    assert all(text for line in lines for text in line["captions"])
    assert (tmp_path / "out" / "text" / "reasoner_text.txt").read_text()
    outputs = json.loads((tmp_path / "out" / "clip" / "sample_outputs.json").read_text())
    assert [outputs["outputs"][0]["content"]["caption"]] == found["clip"]["captions"]
    assert main([*command, "--resume"]) == 0
    assert "4 of 4 records were finished before" in capsys.readouterr().err


def test_what_needs_a_served_reasoner_says_so(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps({**FAST, "caption": True}))
    command = [
        "generate",
        str(tiny_checkpoint),
        "--input",
        str(file),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*command, "--format", "webdataset"]) == 2
    assert "--reasoner-url is missing, must be the URL of a reasoner" in capsys.readouterr().err
    assert main([*command, "--reasoner-url", "http://127.0.0.1:9"]) == 2
    assert "the reasoner at http://127.0.0.1:9 does not answer" in capsys.readouterr().err
