"""Checkpoints that are stored as what differs from a base: put together, kept, and refused."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_cosmos3.checkpoint.config import read_config, read_json
from vllm_cosmos3.checkpoint.derived import write_derived
from vllm_cosmos3.checkpoint.hub import full_name, resolve
from vllm_cosmos3.checkpoint.synthetic import write_checkpoint
from vllm_cosmos3.checkpoint.tensors import transformer_tensors
from vllm_cosmos3.errors import CheckpointError

KINDS = ("distilled-i2v", "distilled-t2i", "policy-droid")
TRAINED = ("proj_in.weight", "layers.1.mlp_moe_gen.up_proj.weight")


def transformer(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in (folder / "transformer").glob("*.safetensors") for k, v in load_file(f).items()}  # fmt: skip


def assert_index_is_true(index: Path) -> None:
    """It names all tensors of the files that it names, and how many bytes they have."""
    values = read_json(index)
    held = {
        name: (file, tensor.nbytes)
        for file in set(values["weight_map"].values())
        for name, tensor in load_file(index.parent / file).items()
    }
    assert values["weight_map"] == {name: file for name, (file, _) in held.items()}
    assert values["metadata"]["total_size"] == sum(size for _, size in held.values())


@pytest.fixture
def base(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base checkpoint of the test's own, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return shutil.copytree(tiny_checkpoint, tmp_path / "base")


def derived(base: Path, kind: str = "policy-droid", **other: torch.Tensor) -> Path:
    """A folder beside the base with what differs."""
    folder = base.with_name("derived")
    folder.mkdir(exist_ok=True)
    old = transformer(base)
    new = {name: -old[name] for name in TRAINED} | other
    save_file(new, folder / "changed.safetensors")
    (folder / "derived.json").write_text(json.dumps({"base": "../base", "kind": kind}))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_complete(kind: str, base: Path, tmp_path: Path) -> None:
    """The files are those of a checkpoint of that kind, the tensors the base's but for the changed ones."""
    found = resolve(derived(base, kind))
    write_checkpoint(tmp_path / "written", kind=kind)
    names = {p.relative_to(tmp_path / "written") for p in (tmp_path / "written").rglob("*.*")}
    assert {p.relative_to(found) for p in found.rglob("*.*")} == names
    for name in names:
        if name.name.endswith(".safetensors.index.json"):
            assert_index_is_true(found / name)
        elif name.suffix == ".json":
            assert read_json(found / name) == read_json(tmp_path / "written" / name), name
    assert read_config(found).kind == kind
    old, new = transformer(base), transformer(found)
    assert new.keys() == transformer_tensors(read_config(found).transformer).keys() < old.keys()
    for name, tensor in new.items():
        assert torch.equal(tensor, -old[name] if name in TRAINED else old[name]), name
    assert (found / "vae" / "diffusion_pytorch_model.safetensors").read_bytes() == (
        base / "vae" / "diffusion_pytorch_model.safetensors"
    ).read_bytes()


def test_it_is_put_together_once(base: Path, tmp_path: Path) -> None:
    folder = derived(base)
    with ThreadPoolExecutor(3) as pool:
        (found,) = set(pool.map(resolve, [folder] * 3))
    assert found.parent.parent == tmp_path / "cache" / "vllm-cosmos3" / "derived"
    assert [p.name for p in found.parent.iterdir()] == ["derived"]  # no unfinished ones
    written = found.joinpath("config.json").stat().st_mtime_ns
    assert full_name(folder) == str(found)
    assert found.joinpath("config.json").stat().st_mtime_ns == written


def test_new_weights_are_not_masked_by_old_ones(base: Path) -> None:
    first = resolve(derived(base))
    bias = torch.ones_like(transformer(base)["proj_in.bias"])
    second = resolve(derived(base, **{"proj_in.bias": bias}))
    assert torch.equal(transformer(second)["proj_in.bias"], bias)
    vae = base / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({k: v + 1 for k, v in load_file(vae).items()}, vae)  # in place
    third = resolve(derived(base))
    assert len({first, second, third}) == 3
    assert (first / "vae" / vae.name).read_bytes() != (third / "vae" / vae.name).read_bytes()


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("base", r"derived\.json: base is '\.\./none', must be the folder of a checkpoint"),
        ("kind", r"kind is 'edge', must be one of distilled-i2v, distilled-t2i, policy-droid"),
        ("absent", r"changed\.safetensors is missing in .*derived: the weights that differ from .*base"),
        ("corrupt", r"changed\.safetensors is truncated or corrupt"),
        ("name", r"changed\.safetensors: head\.weight is no tensor of the transformer of .*base"),
        ("shape", r"proj_in\.bias is bfloat16 \[3\], must be bfloat16 \[\d+\] as in .*base"),
        ("dtype", r"proj_in\.bias is float32 \[\d+\], must be bfloat16 \[\d+\] as in .*base"),
        ("cache", r"derived cannot be put together in .*: .*; XDG_CACHE_HOME names another place"),
    ],
)  # fmt: skip
def test_each_fault_is_one_sentence(
    fault: str, sentence: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bias = transformer(base)["proj_in.bias"]
    other = {
        "name": {"head.weight": torch.zeros(1)},
        "shape": {"proj_in.bias": bias[:3].clone()},
        "dtype": {"proj_in.bias": bias.float()},
    }
    folder = derived(base, "edge" if fault == "kind" else "policy-droid", **other.get(fault, {}))
    if fault == "base":
        (folder / "derived.json").write_text('{"base": "../none", "kind": "policy-droid"}')
    elif fault == "absent":
        (folder / "changed.safetensors").unlink()
    elif fault == "corrupt":
        os.truncate(folder / "changed.safetensors", 100)
    elif fault == "cache":
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match=sentence) as caught:
        resolve(folder)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("cache/vllm-cosmos3/derived/*/*"))


def test_a_base_of_another_kind_is_refused(base: Path, tmp_path: Path) -> None:
    policy = resolve(derived(base))
    with pytest.raises(CheckpointError, match=r"is of the kind policy-droid, must be of the kind"):
        write_derived(tmp_path / "out", policy, tmp_path / "derived" / "changed.safetensors", "distilled-i2v")  # fmt: skip
