"""The notebooks of examples/ run from the first cell to the last, and show what they should."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest
from limits import HANG
from servers import Server

NOTEBOOKS = Path(__file__).parents[2] / "examples" / "notebooks"


def executed(name: str, folder: Path, **variables: str) -> list[list[Any]]:
    """The outputs of every cell of code."""
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    client = nbclient.NotebookClient(
        notebook, timeout=HANG, kernel_name="python3", resources=resources
    )
    client.execute(env={**os.environ, **variables})
    return [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]


def test_generate(tiny_checkpoint: Path, tmp_path: Path) -> None:
    outputs = executed("generate.ipynb", tmp_path, CHECKPOINT=str(tiny_checkpoint))
    shown = [out["data"] for cell in outputs for out in cell if out.output_type == "execute_result"]
    assert ["<video" in data["text/html"] for data in shown] == [True, False, True]
    assert shown[0]["text/plain"].startswith("<Output: 320x192, 17 frames at 24 fps")
    assert len(list((tmp_path / "frames").iterdir())) == 17
    assert {file.suffix for file in tmp_path.glob("boat.*")} == {".mp4", ".webm", ".gif", ".npy"}
    bars = "".join(out.text for cell in outputs for out in cell if out.output_type == "stream")
    assert "denoise" in bars


@pytest.mark.serve
def test_ask(reasoner_server: Server, tmp_path: Path) -> None:
    outputs = executed("ask.ipynb", tmp_path, SERVER=reasoner_server.url)
    assert "image/png" in outputs[1][0]["data"]
    assert outputs[3][0].text.strip()
    assert outputs[-1][0]["data"]["text/plain"].startswith('\'{"boats":')


@pytest.mark.parametrize("file", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda file: file.name)
def test_they_are_stored_without_outputs(file: Path) -> None:
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)
