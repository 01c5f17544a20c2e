"""Two steps of each part of training, on the CPU, and a checkpoint folder from what they leave."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from training import distil, modes, train_autoencoder, train_sound, train_towers
from training.export import export, write_derived
from training.optimisation import Kind, Muon, orthogonalised, train
from training.questions import ASK
from training.scenes import Canvas
from training.tokenizer import train_demo_tokenizer
from training.transformer import is_text
from vllm_cosmos3 import Cosmos3
from vllm_cosmos3.errors import InvalidRequest

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


class Capturable(TorchDispatchMode):
    """Refuses what no CUDA graph can hold: values from Python's memory, or that Python waits for."""

    REFUSED = ("aten::lift_fresh", "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")  # fmt: skip

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        assert func.name() not in self.REFUSED, func.name()
        if func.name().startswith("aten::index"):  # of a mask: as many values as it has ones
            assert all(i is None or i.dtype != torch.bool for i in args[1]), func.name()
        return func(*args, **(kwargs or {}))


def train_capturable(named: Any, kinds: Sequence[Kind], *rest: Any) -> dict[str, object]:
    """The training loop, after each kind of step was taken as a CUDA graph would be recorded."""
    for kind in kinds:
        kind.loss()  # fills caches, as the steps before a recording do
        with Capturable():
            kind.loss().backward()
    return train(named, kinds, *rest)


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


def test_the_generation_tower_goes_on_alone(parts: Path, tmp_path: Path) -> None:
    """Text tower and vision encoder stay, to which a policy and four steps belong."""
    files = [str(f) for f in sorted(parts.glob("transformer-*")) + sorted(parts.glob("vision-*"))]
    call(train_towers, str(tmp_path), str(parts), str(parts / "tokenizer.json"), *SMALL,
         "--pool", "4", "--batch", "2", "--judged", "1", "--settings", "3,1,10,0", "--workers", "1",
         "--generation-only", "--init", *files)  # fmt: skip
    before, after = weights(parts), weights(tmp_path)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) > 40
    assert not any(map(is_text, changed))
    vision = "vision-0.safetensors"
    assert (tmp_path / vision).read_bytes() == (parts / vision).read_bytes()


def test_further_modes_are_taught_in_turns(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"pictures": (Canvas(96, 64, 1),), "sizes": (Canvas(64, 96, 5),)}
    monkeypatch.setattr(modes, "CANVASES", small)
    monkeypatch.setattr(train_towers, "train", train_capturable)
    train_sound.main([str(tmp_path), "--steps", "2", "--every", "1", "--batch", "2", "--pool", "2",
                      "--hops", "5", "--judged", "1", "--least", "0"])  # fmt: skip
    files = [str(f) for f in sorted(parts.glob("transformer-*")) + sorted(parts.glob("vision-*"))]
    call(train_towers, str(tmp_path), str(parts), str(parts / "tokenizer.json"), "--size", "96", "64",
         "5", "--steps", "24", "--every", "1", "--pool", "4", "--batch", "2", "--chats", "0",
         "--structured-every", "0", "--muon-rate", "0", "--judged", "1", "--settings", "3,1,10,0", "--workers", "1",
         "--modes", *modes.MODES, "--sound", str(tmp_path / "sound.safetensors"), "--init", *files)  # fmt: skip
    log = json.loads((tmp_path / "towers.json").read_text())
    assert all(value > 0 for value in log["log"][-1][2:])  # each kind of step was taken
    assert set(log["questions"]) == {*ASK, "box, mean IoU"}
    before, after = (weights(folder) for folder in (parts, tmp_path))
    assert not torch.equal(before["action_proj_in.fc.weight"], after["action_proj_in.fc.weight"])
    assert not torch.equal(before["audio_proj_in.weight"], after["audio_proj_in.weight"])
    export(tmp_path / "demo", [parts, tmp_path])
    with Cosmos3(tmp_path / "demo", device="cpu") as model:
        out = model.generate(
            prompt="a red square", size="96x64", num_frames=5, fps=12, num_inference_steps=1,
            generate_sound=True,
        )  # fmt: skip
    assert out.sound is not None
    assert np.abs(out.sound).max() > 0  # not the silence of an untrained one


def test_no_weights_are_left_by_which_nothing_is_heard(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"heard again: 0\.000 .* must be at least 0\.95"):
        train_sound.main([str(tmp_path), "--steps", "2", "--every", "1", "--batch", "2", "--pool", "2",
                          "--hops", "5", "--judged", "1"])  # fmt: skip
    assert "heard again" in json.loads((tmp_path / "sound.json").read_text())
    assert not list(tmp_path.glob("*.safetensors"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in folder.glob("transformer-*") for k, v in load_file(f).items()}


def test_four_steps_are_distilled_into_a_checkpoint_of_their_kind(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distil, "train", train_capturable)
    files = [str(f) for f in sorted(parts.glob("transformer-*"))]
    distil.main([str(tmp_path), str(parts), str(parts / "tokenizer.json"), *SMALL, "--pool", "4",
                 "--batch", "4", "--path", "2", "--muon-rate", "0", "--judged", "2", "--workers", "1", "--init", *files])  # fmt: skip
    changed = load_file(tmp_path / "changed.safetensors")
    assert changed
    assert not any(is_text(name) for name in changed)
    assert sum(v.nbytes for v in changed.values()) <= 8 * 2**20
    base, made = tmp_path / "base", tmp_path / "demo-4step"
    export(base, [parts])
    write_derived(made, base, tmp_path / "changed.safetensors", "distilled-i2v")
    picture = torch.zeros(64, 96, 3, dtype=torch.uint8).numpy()
    with Cosmos3(made, device="cpu") as model:
        out = model.generate(
            prompt="a red square", image=picture, size="96x64", num_frames=5, fps=12
        )
    assert out.effective["num_inference_steps"] == 4
    assert out.video is not None


def test_a_policy_is_what_differs_in_the_generation_tower(parts: Path, tmp_path: Path) -> None:
    files = [str(f) for f in sorted(parts.glob("transformer-*")) + sorted(parts.glob("vision-*"))]
    call(train_towers, str(tmp_path), str(parts), str(parts / "tokenizer.json"), *SMALL, "--pool", "4",
         "--batch", "2", "--muon-rate", "0", "--workers", "1", "--modes", "policy", "--changed",
         "--init", *files)  # fmt: skip
    changed = load_file(tmp_path / "changed.safetensors")
    assert changed
    assert not any(is_text(name) for name in changed)
    before = weights(parts)
    assert not all(torch.equal(before[name], tensor) for name, tensor in changed.items())
    export(tmp_path / "base", [parts])
    write_derived(
        tmp_path / "policy", tmp_path / "base", tmp_path / "changed.safetensors", "policy-droid"
    )
    picture = torch.zeros(64, 96, 3, dtype=torch.uint8).numpy()
    with Cosmos3(tmp_path / "policy", device="cpu") as model:
        out = model.generate(
            prompt="Lift it.",
            action_mode="policy",
            domain_name="umi",
            image=picture,
            size="96x64",
            num_inference_steps=1,
        )
        with pytest.raises(InvalidRequest, match="policy"):
            model.generate(prompt="a red square")
    assert out.action is not None


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
