"""LoRA adapters merged at load, against peft's own forward beside the weights: float32, every dialect and mesh."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import peft
import pytest
import torch
from diffusers import Cosmos3OmniTransformer
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from ranks import Ranks
from safetensors.torch import save_file
from test_transformer import CASES, CPU, inputs, reference, velocities
from torch import Tensor

from vllm_cosmos3.engine_options import EngineConfig, ParallelConfig
from vllm_cosmos3.generator.loading import load_models
from vllm_cosmos3.parallel.mesh import Mesh, close_mesh, init_mesh

pytestmark = pytest.mark.parity

CASE = CASES["everything"]
BOUND = 1e-5  # absolute; velocities reach about 4
FRAMEWORK = {
    "add_q_proj": "q_proj_moe_gen",
    "add_k_proj": "k_proj_moe_gen",
    "add_v_proj": "v_proj_moe_gen",
    "to_add_out": "o_proj_moe_gen",
    "to_q": "q_proj",
    "to_k": "k_proj",
    "to_v": "v_proj",
    "to_out": "o_proj",
}
ATTENTION = ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
MESHES = {
    "1x1x2": ParallelConfig(tensor_parallel_size=2),
    "1x2x2": ParallelConfig(ulysses_degree=2, tensor_parallel_size=2),
}


def of_peft(oracle: Cosmos3OmniTransformer, config: LoraConfig, folder: Path) -> Path:
    peft.get_peft_model(oracle, config).save_pretrained(folder)
    return folder


def of_diffusers(oracle: Cosmos3OmniTransformer, config: LoraConfig, folder: Path) -> Path:
    oracle.add_adapter(config)
    oracle.save_lora_adapter(folder)
    return folder / "pytorch_lora_weights.safetensors"


def of_framework(oracle: Cosmos3OmniTransformer, config: LoraConfig, folder: Path) -> Path:
    """An export: adapters beside the weights of their layers, alpha in the configuration."""
    peft.inject_adapter_in_model(config, oracle)
    tensors = {}
    for name, tensor in peft.get_peft_model_state_dict(oracle).items():
        words = [FRAMEWORK.get(word, word) for word in name.split(".")]
        tensors[f"model.net.language_model.model.{'.'.join(words)}"] = tensor.contiguous()
    first = next(iter(tensors)).replace(".lora_A", "")
    tensors[first] = torch.zeros(3)  # the weights of the base, which nobody reads
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    lora = {"lora_rank": config.r, "lora_alpha": config.lora_alpha}
    (folder / "config.json").write_text(json.dumps({"model": {"config": lora}}))
    return folder


@dataclass(frozen=True, kw_only=True)
class Kind:
    """An adapter as one of the trainers makes it."""

    write: Callable[[Cosmos3OmniTransformer, LoraConfig, Path], Path]
    targets: list[str]
    options: Mapping[str, object]


KINDS = {
    "framework": Kind(write=of_framework, targets=[*ATTENTION, "to_v", "to_out"], options={}),
    "diffusers": Kind(write=of_diffusers, targets=[*ATTENTION, "proj_in", "mlp_moe_gen.up_proj"], options={}),
    "peft, patterns": Kind(
        write=of_peft,
        targets=[*ATTENTION, "to_k", "mlp.down_proj", "proj_out", "time_embedder.linear_1"],
        options={
            "use_rslora": True,
            "rank_pattern": {"add_q_proj": 2, "layers.1.self_attn.to_k": 5},
            "alpha_pattern": {"self_attn.add_v_proj": 32, "proj_out": 1},
        },
    ),
    "peft, DoRA": Kind(write=of_peft, targets=[*ATTENTION, "mlp_moe_gen.gate_proj"], options={"use_dora": True}),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Trained:
    path: Path
    expected: list[Tensor]


@pytest.fixture(scope="module")
def base(tiny_checkpoint_fp32: Path) -> list[Tensor]:
    oracle = Cosmos3OmniTransformer.from_pretrained(tiny_checkpoint_fp32 / "transformer").eval()
    return of_oracle(oracle)


@pytest.fixture(scope="module")
def trained(
    tiny_checkpoint_fp32: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Trained]:
    """Adapters with random matrices, and what peft makes of them beside the frozen weights."""
    made = {}
    for seed, (name, kind) in enumerate(KINDS.items()):
        oracle = Cosmos3OmniTransformer.from_pretrained(tiny_checkpoint_fp32 / "transformer")
        torch.manual_seed(seed)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=kind.targets, init_lora_weights=False, **kind.options)  # fmt: skip
        path = kind.write(oracle, config, tmp_path_factory.mktemp("lora") / "adapter")
        made[name] = Trained(path=path, expected=of_oracle(oracle.eval()))
    return made


def of_oracle(oracle: Cosmos3OmniTransformer) -> list[Tensor]:
    with torch.inference_mode():
        return reference(oracle, CASE, *inputs(CASE))


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    mesh = init_mesh(ParallelConfig())
    yield mesh
    close_mesh(mesh)


def of_ours(
    mesh: Mesh, folder: Path, parallel: ParallelConfig, adapters: list[list[tuple[Path, float]]]
) -> list[list[Tensor]]:
    """The velocities with each of these lists of adapters."""
    found = []
    for lora in adapters:
        config = EngineConfig(model=folder, dtype="float32", lora=lora, **asdict(parallel))
        transformer = load_models(config.read_model(), config, mesh, CPU).transformer
        with torch.inference_mode():
            found.append(list(velocities(transformer, CASE, *inputs(CASE))))
    return found


def check(found: list[Tensor], expected: list[Tensor], base: list[Tensor]) -> None:
    for a, b, without in zip(found, expected, base, strict=True):
        assert (a - b).abs().max() <= BOUND
        assert (a - without).abs().max() > 100 * BOUND


@pytest.mark.parametrize("name", KINDS)
def test_merged_is_what_peft_computes_beside(
    name: str, trained: Mapping[str, Trained], base: list[Tensor], mesh: Mesh, tiny_checkpoint_fp32: Path
) -> None:  # fmt: skip
    (found,) = of_ours(mesh, tiny_checkpoint_fp32, ParallelConfig(), [[(trained[name].path, 1.0)]])
    check(found, trained[name].expected, base)


@pytest.mark.parametrize("degrees", MESHES)
def test_the_same_on_several_ranks(
    degrees: str, trained: Mapping[str, Trained], base: list[Tensor], ranks: Ranks, tiny_checkpoint_fp32: Path
) -> None:  # fmt: skip
    adapters = [[(one.path, 1.0)] for one in trained.values()]
    for rank in ranks(MESHES[degrees], of_ours, tiny_checkpoint_fp32, MESHES[degrees], adapters):
        for found, one in zip(rank, trained.values(), strict=True):
            check(found, one.expected, base)


def test_several_adapters_add_up_each_at_its_scale(
    trained: Mapping[str, Trained], base: list[Tensor], mesh: Mesh, tiny_checkpoint_fp32: Path, tmp_path: Path
) -> None:  # fmt: skip
    oracle = Cosmos3OmniTransformer.from_pretrained(tiny_checkpoint_fp32 / "transformer")
    config = LoraConfig(r=3, target_modules=[*ATTENTION, "proj_in"], init_lora_weights=False)
    scales = {of_peft(oracle, config, tmp_path / "other"): 0.5, trained["peft, patterns"].path: 1.25}  # fmt: skip
    oracle = Cosmos3OmniTransformer.from_pretrained(tiny_checkpoint_fp32 / "transformer")
    (first, second) = map(str, scales)
    peft.PeftModel.from_pretrained(oracle, first, "first").load_adapter(second, "second")
    for layer in oracle.modules():
        if isinstance(layer, LoraLayer):
            layer.set_adapter(list(layer.lora_A))
            for name, scale in zip(("first", "second"), scales.values(), strict=True):
                layer.set_scale(name, scale)
    expected = of_oracle(oracle.eval())
    (found,) = of_ours(mesh, tiny_checkpoint_fp32, ParallelConfig(), [list(scales.items())])
    check(found, expected, base)
