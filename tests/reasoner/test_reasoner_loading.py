"""vLLM's own loader refuses a checkpoint when any single tensor of the reasoner is absent.

In one process, below the check of the folder: what is tested here also protects checkpoints that
are downloaded while the engine starts.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.image_utils
from safetensors.torch import load_file, save_file

from ports import free_port
from vllm_cosmos3.checkpoint.config import read_json
from vllm_cosmos3.errors import CheckpointError
from vllm_cosmos3.plugin import ARCHITECTURE, register
from vllm_cosmos3.reasoner.required_tensors import expected_tensors


@pytest.fixture(scope="module")
def vllm_config(tiny_checkpoint: Path, vllm_cache: Path) -> Iterator[Any]:
    """The configuration of one rank in this process."""
    settings = {"VLLM_CACHE_ROOT": str(vllm_cache), "VLLM_CPU_KVCACHE_SPACE": "1"}
    patch = pytest.MonkeyPatch()
    for name, value in settings.items():
        patch.setenv(name, value)
    if not torch.accelerator.is_available():  # as vLLM's own CPU worker does
        patch.setattr(torch.accelerator, "empty_cache", lambda: None)
    register()
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(
        model=str(tiny_checkpoint),
        hf_overrides={"architectures": [ARCHITECTURE]},
        enforce_eager=True,
        max_model_len=512,
    ).create_engine_config()
    with set_current_vllm_config(config):
        parallel_state.init_distributed_environment(
            1, 0, f"tcp://127.0.0.1:{free_port()}", 0, "gloo"
        )
        parallel_state.initialize_model_parallel(1)
        yield config
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()
    patch.undo()


def load(config: Any, folder: Path, load_format: str = "auto") -> torch.nn.Module:
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import get_model

    config.model_config.model = str(folder)
    config.load_config = LoadConfig(load_format=load_format)
    config.compilation_config.static_forward_context.clear()  # else layers are named twice
    return get_model(vllm_config=config)


class Breakable:
    """A checkpoint of links, in which one shard at a time is written anew."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.source, self.folder = source, folder
        self.shards = {}
        for part in ("transformer", "vision_encoder"):
            (folder / part).mkdir(parents=True)
            for shard in (source / part).glob("*.safetensors"):
                self.shards[shard] = load_file(shard)
                (folder / part / shard.name).symlink_to(shard)

    def without(self, name: str) -> Path:
        """The folder with all tensors but ``name``."""
        for shard, tensors in self.shards.items():
            link = self.folder / shard.relative_to(self.source)
            link.unlink()
            if name in tensors:
                save_file({n: t for n, t in tensors.items() if n != name}, link)
            else:
                link.symlink_to(shard)
        return self.folder


def test_whole_checkpoint_is_loaded(
    vllm_config: Any, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Looks at what vLLM leaves as it is stored; it packs the linear layers for the CPU."""
    weights = dict(load(vllm_config, tiny_checkpoint).named_parameters())
    shards = Breakable(tiny_checkpoint, tmp_path / "whole").shards.values()
    stored = {name: tensor for shard in shards for name, tensor in shard.items()}
    for place, name in {
        "language_model.model.norm.weight": "norm.weight",
        "language_model.model.embed_tokens.weight": "embed_tokens.weight",
        "language_model.model.layers.1.self_attn.q_norm.weight": "layers.1.self_attn.norm_q.weight",
        "visual.blocks.1.norm1.bias": "blocks.1.norm1.bias",
        "visual.deepstack_merger_list.1.norm.weight": "deepstack_merger_list.1.norm.weight",
    }.items():
        assert torch.equal(weights[place], stored[name])


def test_each_missing_tensor_is_named(
    vllm_config: Any, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    names = expected_tensors(read_json(tiny_checkpoint / "config.json"))
    chosen = {
        name: where
        for name, where in names.items()
        if where.folder == "vision_encoder" or not name.startswith(("layers.1.", "layers.2."))
    }
    broken = Breakable(tiny_checkpoint, tmp_path / "broken")
    for name, where in chosen.items():
        with pytest.raises(CheckpointError) as error:
            load(vllm_config, broken.without(name))
        assert str(error.value) == f"{name} is missing in {where.folder}/ of the checkpoint"


def test_dummy_weights_need_no_files(vllm_config: Any, tmp_path: Path) -> None:
    model = load(vllm_config, tmp_path, load_format="dummy")
    assert all(torch.isfinite(weight).all() for weight in model.parameters())


def test_each_missing_tensor_of_edge_is_named(
    vllm_config: Any, tiny_edge_fp32: Path, tmp_path: Path
) -> None:
    """One of each name of a layer, and all outside of the layers."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(
        model=str(tiny_edge_fp32),
        hf_overrides={"architectures": [ARCHITECTURE]},
        enforce_eager=True,
        max_model_len=512,
    ).create_engine_config()
    names = expected_tensors(read_json(tiny_edge_fp32 / "config.json"))
    chosen = {name: e for name, e in names.items() if not re.search(r"layers\.[1-9]", name)}
    assert {"layers.0.mlp.up_proj.weight", "model.projector.linear_fc1.weight"} <= chosen.keys()
    broken = Breakable(tiny_edge_fp32, tmp_path / "broken")
    with set_current_vllm_config(config):
        load(config, tiny_edge_fp32)
        for name, where in chosen.items():
            with pytest.raises(CheckpointError) as error:
                load(config, broken.without(name))
            assert str(error.value) == f"{name} is missing in {where.folder}/ of the checkpoint"


def methods_of_layers(folder: Path, **arguments: Any) -> dict[str, set[str]]:
    """How the layers of each part of the model multiply, by vLLM's names."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.model_loader.utils import initialize_model

    overrides = {"architectures": [ARCHITECTURE], **arguments.pop("hf_overrides", {})}
    config = EngineArgs(
        model=str(folder),
        hf_overrides=overrides,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=512,
        **arguments,
    ).create_engine_config()
    methods = defaultdict(set)
    with set_current_vllm_config(config):
        for name, layer in initialize_model(config).named_modules():
            if isinstance(layer, LinearBase):
                methods[name.split(".")[0]].add(type(layer.quant_method).__name__)
    return methods


@pytest.mark.usefixtures("vllm_config")
@pytest.mark.parametrize("checkpoint", ["tiny_checkpoint", "tiny_edge_fp32"])
def test_fp8_on_the_fly_is_for_the_language_model(
    checkpoint: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(checkpoint)
    assert methods_of_layers(folder, quantization="fp8") == {
        "visual": {"UnquantizedLinearMethod"},
        "language_model": {"Fp8PerTensorOnlineLinearMethod"},
    }


@pytest.mark.usefixtures("vllm_config")
def test_a_vision_tower_that_is_stored_in_fp8_is_built_so(tiny_checkpoint: Path) -> None:
    stored = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    assert methods_of_layers(tiny_checkpoint, hf_overrides={"quantization_config": stored}) == {
        "visual": {"Fp8LinearMethod"},
        "language_model": {"Fp8LinearMethod"},
    }


def test_a_processor_of_edge_that_needs_another_transformers_is_said(
    vllm_config: Any, tiny_edge_fp32: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with vLLM 0.26 and transformers from 5.15, where the function is not where it looks for it."""
    monkeypatch.delattr(transformers.image_utils, "get_image_size")
    monkeypatch.delitem(
        sys.modules, "vllm.transformers_utils.processors.cosmos3_edge", raising=False
    )
    with pytest.raises(
        Exception, match=r"vLLM [\d.+a-z]+ cannot read media for Edge with"
    ) as error:
        methods_of_layers(tiny_edge_fp32)
    assert "(cannot import name 'get_image_size'" in str(error.value)
    assert "transformers 5.14.1 or older" in str(error.value)
