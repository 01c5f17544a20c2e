"""LoRA adapters for the tests: random matrices in the names of diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

QUERIES = "layers.0.self_attn.add_q_proj"
DOWN = "layers.1.mlp_moe_gen.down_proj"


def halves(checkpoint: Path, *modules: str, rank: int = 2) -> dict[str, Tensor]:
    """Matrices for these modules of a checkpoint."""
    files = (checkpoint / "transformer").glob("*.safetensors")
    shapes = {name: tensor.shape for file in files for name, tensor in load_file(file).items()}
    generator = torch.Generator().manual_seed(0)
    found = {}
    for module in modules:
        rows, columns = shapes[f"{module}.weight"]
        found[f"transformer.{module}.lora_A.weight"] = torch.randn(rank, columns, generator=generator)  # fmt: skip
        found[f"transformer.{module}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
    return found


def saved(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """A folder with these tensors, and the configuration of peft if anything of it is given."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    if config:
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    return folder


def of_reasoner(folder: Path, checkpoint: Path) -> tuple[Path, Path]:
    """The same adapter of the text tower twice: in the names of transformers and of the checkpoint."""
    ours = {
        "q_proj": "to_q",
        "v_proj": "to_v",
        "o_proj": "to_out",
        "mlp.down_proj": "mlp.down_proj",
    }
    checkpoint_names, transformers_names = {}, {}
    for theirs, name in ours.items():
        module = name if "." in name else f"self_attn.{name}"
        other = theirs if "." in theirs else f"self_attn.{theirs}"
        for old, tensor in halves(checkpoint, f"layers.1.{module}").items():
            path = old.removeprefix("transformer.")
            checkpoint_names[f"base_model.model.{path}"] = 0.4 * tensor
            path = path.replace(module, other)
            transformers_names[f"base_model.model.model.language_model.{path}"] = 0.4 * tensor
    words = "|".join(name.rpartition(".")[2] for name in ours)
    config = {"lora_alpha": 4, "r": 2, "target_modules": rf".*language_model\.layers\.1\..*({words})"}  # fmt: skip
    return (
        saved(folder / "transformers", transformers_names, **config),
        saved(folder / "checkpoint", checkpoint_names, **config),
    )


def adapter(folder: Path, checkpoint: Path) -> Path:
    """An adapter that says its alpha."""
    return saved(folder, halves(checkpoint, QUERIES, DOWN), lora_alpha=4)
