"""Files of results appear whole, or an old one stays."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from vllm_cosmos3.files import write_text
from vllm_cosmos3.generator.output import Output, Sample


def test_a_text_is_whole_or_the_old_one(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_text(file, "old")
    write_text(file, "new")
    assert file.read_text() == "new"
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "half \ud800")
    assert file.read_text() == "new"
    assert [*tmp_path.iterdir()] == [file]


def test_a_link_to_a_file_stays_one(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real")
    write_text(tmp_path / "link", "text")
    assert (tmp_path / "real").read_text() == "text"
    assert (tmp_path / "link").is_symlink()


def test_pipes_are_written_to_and_folders_are_not(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    heard: list[str] = []
    reader = threading.Thread(target=lambda: heard.append(pipe.read_text()))
    reader.start()
    write_text(pipe, "to a pipe")
    reader.join()
    assert heard == ["to a pipe"]
    assert pipe.is_fifo()
    with pytest.raises(IsADirectoryError):
        write_text(tmp_path, "to a folder")
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "none" / "a", "nowhere")


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_rows_and_latents_replace_a_file_when_they_are_whole(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / f"a{suffix}"
    file.write_text("old")
    rows = np.zeros((2, 3), np.float32)
    output = Output(samples=(Sample(seed=1, action=rows, latents={"action": rows}),), fps=24)

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            output.save(file)
    assert file.read_text() == "old"
    output.save(file)
    assert file.read_bytes() != b"old"
    assert not [*tmp_path.glob(".*.part")]
    if suffix == ".json":
        assert json.loads(file.read_text()) == rows.tolist()
