"""``vllm serve`` on a broken checkpoint ends at once, and its last line says what is wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from servers import ARCHITECTURE, BIN, SMALL, run_to_end

from ports import free_port
from vllm_cosmos3.checkpoint.config import read_json

pytestmark = pytest.mark.serve

NAME = "layers.0.self_attn.to_out.weight"


def drop_tensor(folder: Path) -> str:
    index = read_json(folder / "model.safetensors.index.json")
    shard = folder / index["weight_map"][NAME]
    save_file({name: t for name, t in load_file(shard).items() if name != NAME}, shard)
    return f"{NAME} is missing in {folder}/transformer"


def cut_file(folder: Path) -> str:
    shard = folder / "vision_encoder" / "model.safetensors"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-1])
    return f"{shard} is truncated: it has {size - 1} bytes, must have {size}"


def remove_folder(folder: Path) -> str:
    shutil.rmtree(folder / "vision_encoder")
    return f"vision_encoder/ is missing in {folder}"


def serve(folder: Path, cache: Path) -> tuple[int, str]:
    command = [str(BIN / "vllm"), "serve", str(folder), "--hf-overrides", ARCHITECTURE, *SMALL]
    return run_to_end([*command, "--host", "127.0.0.1", "--port", str(free_port())], cache)


def test_start_stops_with_the_sentence(
    tiny_checkpoint: Path, vllm_cache: Path, tmp_path: Path
) -> None:
    damages: list[Callable[[Path], str]] = [drop_tensor, cut_file, remove_folder]
    folders = [tmp_path / damage.__name__ for damage in damages]
    for folder in folders:
        shutil.copytree(tiny_checkpoint, folder)
    sentences = [damage(folder) for damage, folder in zip(damages, folders, strict=True)]
    with ThreadPoolExecutor(len(folders)) as pool:
        results = list(pool.map(lambda folder: serve(folder, vllm_cache), folders))
    for (status, output), sentence in zip(results, sentences, strict=True):
        assert status != 0
        last = output.strip().splitlines()[-1]
        assert last.endswith(f"vllm_cosmos3.errors.CheckpointError: {sentence}")
