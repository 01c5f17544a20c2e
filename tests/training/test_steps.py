"""Two steps of each part of training, on the CPU, and a checkpoint folder from what they leave."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from training import train_autoencoder, train_towers
from training.export import export
from training.optimisation import Muon, orthogonalised
from training.tokenizer import train_demo_tokenizer

SMALL = ["--size", "96", "64", "5", "--steps", "2", "--every", "1"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that two steps leave."""
    folder = tmp_path_factory.mktemp("parts")
    train_demo_tokenizer(200).save(str(folder / "tokenizer.json"))
    call(train_autoencoder, str(folder), *SMALL, "--windows", "60", "--clips", "60",
         "--window", "32", "48", "5", "--batch", "2", "--clips-batch", "2", "--pool", "8",
         "--judged", "2")  # fmt: skip
    call(train_towers, str(folder), str(folder), str(folder / "tokenizer.json"), *SMALL,
         "--pool", "8", "--batch", "2", "--chats", "2", "--structured-every", "2",
         "--judged", "2", "--settings", "3,2,10,0", "3,2,10,1", "--workers", "1")  # fmt: skip
    return folder


def call(module: object, *arguments: str) -> None:
    before, sys.argv = sys.argv, ["train", *arguments]
    try:
        module.main()  # type: ignore[attr-defined]
    finally:
        sys.argv = before


def test_steps_leave_weights_and_scores(parts: Path) -> None:
    vae = json.loads((parts / "vae.json").read_text())
    assert [phase["steps"] for phase in vae["training"]] == [2, 2]
    assert len(vae["mean"]) == len(vae["std"]) == 48
    towers = json.loads((parts / "towers.json").read_text())
    assert towers["steps"] == 2
    assert len(towers["scores"]) == 2
    assert "exact" in towers["reasoner"]
    assert (parts / "sheet.png").exists()


def test_training_goes_on_from_weights(parts: Path, tmp_path: Path) -> None:
    files = [str(f) for f in sorted(parts.glob("transformer-*")) + sorted(parts.glob("vision-*"))]
    call(train_towers, str(tmp_path), str(parts), str(parts / "tokenizer.json"), *SMALL,
         "--pool", "4", "--batch", "2", "--chats", "2", "--judged", "1", "--settings",
         "3,1,10,0", "--workers", "1", "--vision-only", "--init", *files)  # fmt: skip
    towers, vision = "transformer-1.safetensors", "vision-0.safetensors"
    assert (tmp_path / towers).read_bytes() == (parts / towers).read_bytes()
    assert (tmp_path / vision).read_bytes() != (parts / vision).read_bytes()


def test_the_decoder_goes_on_alone(parts: Path, tmp_path: Path) -> None:
    call(train_autoencoder, str(tmp_path), *SMALL, "--windows", "60", "--clips", "0",
         "--window", "32", "48", "5", "--batch", "2", "--pool", "4", "--judged", "1",
         "--decoder-only", "--init", str(parts / "vae.safetensors"))  # fmt: skip
    before, after = (load_file(f / "vae.safetensors") for f in (parts, tmp_path))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("decoder.") for name in changed)
    assert not any(name.startswith(("encoder.", "quant_conv.")) for name in changed)


def test_the_folder_is_complete(parts: Path, tmp_path: Path) -> None:
    export(tmp_path / "demo", [parts])
    size = sum(f.stat().st_size for f in tmp_path.rglob("*.safetensors"))
    assert size <= 24 * 2**20
    assert max(f.stat().st_size for f in tmp_path.rglob("*")) < 16 * 2**20


def test_muon_moves_along_orthogonal_matrices() -> None:
    torch.manual_seed(0)
    x = orthogonalised(torch.randn(3, 24, 40)).float()
    singular = torch.linalg.svdvals(x)
    assert singular.min() > 0.5
    assert singular.max() < 1.3
    matrix = torch.nn.Parameter(torch.zeros(32, 64))
    muon = Muon([matrix], torch.tensor(1e-2), 0.0)
    matrix.grad = torch.randn(32, 64)
    muon.step()
    assert 0.5 < matrix.detach().square().mean().sqrt() / (0.2 * 1e-2) < 1.5
