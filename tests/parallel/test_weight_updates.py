"""New weights of a trainer: as a fresh load of them, or the old ones where anything goes wrong; one rank and two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lora_files import adapter
from ranks import Ranks
from safetensors.torch import load_file, save_file

from vllm_cosmos3 import Cosmos3
from vllm_cosmos3.checkpoint.synthetic import write_checkpoint
from vllm_cosmos3.engine_options import EngineConfig, ParallelConfig
from vllm_cosmos3.errors import InvalidRequest, Sleeping
from vllm_cosmos3.generator.pipeline import Pipeline
from vllm_cosmos3.parallel.mesh import Mesh, close_mesh, init_mesh
from vllm_cosmos3.request.planner import make_plan
from vllm_cosmos3.request.request import from_fields

REQUEST: dict[str, Any] = {"prompt": "a boat", "size": "64x64", "num_frames": 1, "num_inference_steps": 2, "seed": 1, "output_type": "latent"}  # fmt: skip
MATRIX = "layers.0.self_attn.add_q_proj.weight"


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of other weights."""
    folder = tmp_path_factory.mktemp("other") / "tiny"
    write_checkpoint(folder, seed=1, dtype="float32")
    return folder


def made(pipeline: Pipeline) -> np.ndarray:
    state = pipeline.encode(make_plan(from_fields(REQUEST), pipeline.model, pipeline.tokenizer))
    while not state.done:
        pipeline.step(state)
    pipeline.decode(state)
    latents = pipeline.finish(state).samples[0].latents
    assert latents is not None
    return latents["vision"]


def updated(
    mesh: Mesh, folder: Path, other: Path, parallel: ParallelConfig, options: dict[str, Any]
) -> dict[str, np.ndarray]:
    """What is made before, after and of a fresh load; the shards come one by one."""

    def load(folder: Path) -> Pipeline:
        config = EngineConfig(model=folder, dtype="float32", weight_transfer="files", **asdict(parallel), **options)  # fmt: skip
        return Pipeline.load(config, mesh, "cpu")

    pipeline = load(folder)
    found = {"before": made(pipeline)}
    pipeline.start_weight_update()
    shards = sorted((other / "transformer").glob("*.safetensors"))
    pipeline.update_weights({"path": str(shards[0])})
    pipeline.abort_weight_update()
    found["aborted"] = made(pipeline)
    pipeline.start_weight_update()
    with pytest.raises(InvalidRequest, match=f"or a list of {mesh.world.size}, one for each rank"):
        pipeline.update_weights([{"path": str(shards[0])}] * (mesh.world.size + 1))
    for shard in shards:
        pipeline.update_weights([{"path": str(shard)}] * mesh.world.size)
    pipeline.finish_weight_update("second")
    pipeline.keep_weight_update()
    return {**found, "after": made(pipeline), "fresh": made(load(other))}


OPTIONS: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "plain": lambda *_: {},
    "with an adapter": lambda folder, checkpoint: {"lora": adapter(folder, checkpoint)},
    "in FP8": lambda *_: {"quantization": "fp8"},
    "from the host": lambda *_: {"enable_layerwise_offload": True, "und_residency": "host"},
}
TWO = ParallelConfig(tensor_parallel_size=2)


def test_an_update_is_a_fresh_load(tiny_checkpoint_fp32: Path, other: Path) -> None:
    mesh = init_mesh(ParallelConfig())
    try:
        found = updated(mesh, tiny_checkpoint_fp32, other, ParallelConfig(), {})
    finally:
        close_mesh(mesh)
    check(found)


def test_the_same_on_two_ranks_however_weights_are_loaded(
    ranks: Ranks, tiny_checkpoint_fp32: Path, other: Path, tmp_path: Path
) -> None:
    for make in OPTIONS.values():
        options = make(tmp_path, tiny_checkpoint_fp32)
        for found in ranks(TWO, updated, tiny_checkpoint_fp32, other, TWO, options):
            check(found)


def check(found: dict[str, np.ndarray]) -> None:
    assert np.array_equal(found["aborted"], found["before"])
    assert np.array_equal(found["after"], found["fresh"])
    assert np.abs(found["after"] - found["before"]).max() > 0.1


def test_a_part_of_the_weights_and_what_cannot_be(
    tiny_checkpoint_fp32: Path, other: Path, tmp_path: Path
) -> None:
    files = sorted((other / "transformer").glob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    published = {
        "action_modality_embed.weight": tensors["action_modality_embed"]
    }  # in some exports
    published["action_pos_embed.pos_embed"] = torch.zeros(3)
    part = {f"transformer.{MATRIX}": tensors[MATRIX], **published}
    save_file(part, tmp_path / "part.safetensors")
    save_file({MATRIX: torch.zeros(2, 2)}, tmp_path / "misshapen.safetensors")
    save_file({**tensors, "layers.0.nothing": torch.zeros(1)}, tmp_path / "unknown.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no header")
    with Cosmos3(tiny_checkpoint_fp32, device="cpu", dtype="float32", weight_transfer="files") as model:  # fmt: skip
        before = latents(model)
        with pytest.raises(InvalidRequest, match=r"must be with start_weight_update called before"):
            model.update_weights({"path": str(tmp_path / "part.safetensors")})
        for name, words in {
            "misshapen": rf"update_info.shapes is \[2, 2\], must be \[256, 64\] of {MATRIX}",
            "unknown": "update_info.names is 'layers.0.nothing', must be a tensor of transformer/",
            "broken": "must be a safetensors file",
            "absent": "that every rank can read",
        }.items():
            model.init_weight_transfer_engine({})
            model.start_weight_update()
            with pytest.raises(Sleeping, match="is being updated"):
                model.generate(**REQUEST)
            with pytest.raises(InvalidRequest, match="sleep is 'called'"):
                model.sleep()
            with pytest.raises(InvalidRequest, match=words):
                model.update_weights({"path": str(tmp_path / f"{name}.safetensors")})
            assert np.array_equal(latents(model), before)
        model.start_weight_update()
        model.update_weights({"path": str(tmp_path / "part.safetensors")})
        model.finish_weight_update()
        assert np.abs(latents(model) - before).max() > 1e-3
    with Cosmos3(tiny_checkpoint_fp32, device="cpu", dtype="float32") as model, pytest.raises(InvalidRequest, match="weight_transfer is missing"):  # fmt: skip
        model.start_weight_update()


def latents(model: Cosmos3) -> np.ndarray:
    found = model.generate(**REQUEST).latents
    assert found is not None
    return found["vision"]
