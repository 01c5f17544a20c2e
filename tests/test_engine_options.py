"""Engine options: one table gives the arguments of Python, the flags, and what the server takes."""

from __future__ import annotations

import argparse
import inspect
import pickle
from pathlib import Path

import pytest

from vllm_cosmos3 import Cosmos3
from vllm_cosmos3.cli.flags import add_engine_flags, given
from vllm_cosmos3.engine_options import DEFAULTS, OPTIONS, EngineConfig, EngineOptions
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.server.options import OPTIONS as SERVER
from vllm_cosmos3.server.options import from_mapping


def test_cosmos3_takes_the_documented_arguments() -> None:
    found = inspect.signature(Cosmos3).parameters
    assert {name: parameter.default for name, parameter in found.items()} == {
        "model": inspect.Parameter.empty,
        "revision": None,
        "dtype": "bfloat16",
        "device": None,
        "tensor_parallel_size": 1,
        "cfg_parallel_size": 1,
        "ulysses_degree": 1,
        "data_parallel_size": 1,
        "vae_parallel": "halo",
        "distributed_executor_backend": None,
        "attention_backend": "auto",
        "quantization": None,
        "fp8_first_steps": None,
        "fp8_last_steps": None,
        "fp8_text": None,
        "load_format": "auto",
        "und_residency": "auto",
        "enable_layerwise_offload": False,
        "memory_limit": None,
        "gpu_memory_utilization": None,
        "lora": (),
        "lora_alpha": None,
        "max_batch_size": None,
        "weight_transfer": None,
        "checkpoint_kind": None,
        "progress": None,
    }
    assert found["model"].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert found["dtype"].kind is inspect.Parameter.KEYWORD_ONLY
    for name in OPTIONS:
        assert f"    {name}: " in str(Cosmos3.__init__.__doc__)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"dtype": "int8"}, "dtype is 'int8', must be one of bfloat16, float16, float32"),
        ({"dtype": None}, "dtype is missing, must be one of bfloat16"),
        ({"tensor_parallel_size": 0}, "must be an integer from 1 to 64"),
        ({"tensor_parallel_size": "2"}, "tensor_parallel_size is '2', must be an integer"),
        ({"cfg_parallel_size": 3}, "cfg_parallel_size is 3, must be an integer from 1 to 2"),
        ({"memory_limit": 0}, "memory_limit is 0, must be a number above 0"),
        ({"memory_limit": float("nan")}, "memory_limit is nan, must be a number above 0"),
        ({"gpu_memory_utilization": 1.5}, "must be a number above 0 up to 1"),
        ({"device": "tpu"}, "device is 'tpu', must be cuda, cuda:N, cuda:N,N,... by rank, or cpu"),
        ({"device": "cuda:0,x"}, "device is 'cuda:0,x', must be cuda, cuda:N"),
        ({"gpu_memory_utilization": 0.5, "memory_limit": 8}, "left out, as memory_limit is given"),
        ({"enable_layerwise_offload": 1}, "enable_layerwise_offload is 1, must be true or false"),
        (
            {"distributed_executor_backend": "slurm"},
            "must be one of mp, ray, uni, external_launcher",
        ),
    ],
)
def test_an_option_that_cannot_be(option: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        EngineOptions("/", **option)


def test_flags_give_what_python_takes() -> None:
    parser = argparse.ArgumentParser()
    add_engine_flags(parser, OPTIONS)
    assert given(parser.parse_args([]), OPTIONS) == {}
    flags = "--tp 2 --cfg 2 --ulysses-degree 4 --memory-limit 20.5 --enable-layerwise-offload"
    assert given(parser.parse_args(flags.split()), OPTIONS) == {
        "tensor_parallel_size": 2,
        "cfg_parallel_size": 2,
        "ulysses_degree": 4,
        "memory_limit": 20.5,
        "enable_layerwise_offload": True,
    }


def test_a_fraction_of_a_device_is_a_limit() -> None:
    config = EngineConfig(model=Path("/"), device="cuda", gpu_memory_utilization=0.5)
    assert config.limited(80 * 2**30).memory_limit == 40
    with pytest.raises(InvalidRequest, match="left out on a CPU"):
        config.limited(None)
    assert from_mapping({"generator_gpu_memory_utilization": 0.4}).engine == {
        "gpu_memory_utilization": 0.4
    }


def test_every_option_is_one_of_the_server_unless_vllm_has_it() -> None:
    names = {option.server or name for name, option in OPTIONS.items() if option.server is not None}
    assert names <= SERVER.keys()
    assert {name for name, option in OPTIONS.items() if option.server is None} == {
        "revision",
        "device",
    }
    assert from_mapping({"generator_replicas": 2}).engine == {"data_parallel_size": 2}
    values = {
        "generator_dtype": "float32",
        "ulysses_degree": 2,
        "generator_executor_backend": "ray",
    }
    assert from_mapping(values).engine == {
        "dtype": "float32",
        "ulysses_degree": 2,
        "distributed_executor_backend": "ray",
    }


@pytest.mark.parametrize(
    ("limit", "on_cpu", "on_gpu"),
    [(None, [1, 1], [1, 8]), (4, [4, 4], [1, 4]), (1, [1, 1], [1, 1])],
)
def test_exact_requests_are_not_batched_on_a_gpu(
    limit: int | None, on_cpu: list[int], on_gpu: list[int]
) -> None:
    options = EngineOptions("nvidia/Cosmos3-Nano", max_batch_size=limit)
    sizes = {
        device: [options.on(Path("/"), device).batch_size(exact=exact) for exact in (True, False)]
        for device in ("cpu", "cuda:1")
    }
    assert sizes == {"cpu": on_cpu, "cuda:1": on_gpu}


def test_the_server_takes_zero_and_nothing_for_what_is_not_set() -> None:
    values = {"memory_limit": 0, "checkpoint_kind": ""}
    assert from_mapping(values).engine == {"memory_limit": None, "checkpoint_kind": None}


def test_the_server_starts_its_ranks_itself() -> None:
    with pytest.raises(InvalidRequest, match="must be one of mp, ray, uni") as refused:
        from_mapping({"generator_executor_backend": "external_launcher"})
    assert refused.value.field == "generator_executor_backend"


def test_a_rank_gets_the_folder_and_the_device_that_were_found() -> None:
    options = EngineOptions("nvidia/Cosmos3-Nano", ulysses_degree=2, memory_limit=8)
    config = options.on(Path("/checkpoint"), "cuda:0")
    assert config == EngineConfig(
        model=Path("/checkpoint"), device="cuda:0", ulysses_degree=2, memory_limit=8.0
    )
    assert config.parallel.world_size == 2
    assert pickle.loads(pickle.dumps(config)) == config
    assert {name: getattr(EngineOptions("/"), name) for name in OPTIONS} == DEFAULTS
