"""What is asked of kernels instead of assumed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import in_new_process

from vllm_cosmos3.compat import device_index, fused_qk_norm_rope, swagger_ui, takes_heads
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.generator.weight_updates import OfVllm
from vllm_cosmos3.parallel.axis import Axis

CPU = torch.device("cpu")


@pytest.mark.parametrize("head", [32, 64, 96, 128, 256])
def test_a_kernel_is_asked_which_heads_it_takes(head: int) -> None:
    asked: list[tuple[int, ...]] = []

    def kernel(qkv: torch.Tensor, *arguments: Any) -> None:
        asked.append(tuple(qkv.shape))
        if arguments[3] not in (64, 128, 256):
            raise RuntimeError(f"Unsupported head dimension for fusedQKNormRope: {arguments[3]}")

    for _ in range(2):
        assert takes_heads(kernel, head, torch.bfloat16, CPU) == (head in (64, 128, 256))
    assert asked == [(1, 3 * head)]  # once


def test_an_argument_that_no_kernel_takes_is_not_hidden() -> None:
    """As when a version of vLLM changes the signature: silence would cost speed, for nobody to see."""
    with pytest.raises(TypeError):
        takes_heads(lambda _: None, 64, torch.bfloat16, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_fused_kernel_on_the_cpu(dtype: torch.dtype) -> None:
    assert fused_qk_norm_rope(128, dtype, CPU) is None


def of_two_devices() -> list[int]:
    told = SimpleNamespace(assigned_physical_gpu_ids=[2, 5])
    return [device_index(told, local_rank) for local_rank in (0, 1)]


def test_a_worker_of_ray_has_the_device_that_it_was_given() -> None:
    assert in_new_process(of_two_devices) == [2, 5]
    assert device_index(SimpleNamespace(), 1) == 1  # which sees no others


def test_swagger_ui_is_where_it_is_looked_for() -> None:
    assert (swagger_ui() / "swagger-ui.css").stat().st_size > 1000
    assert b"SwaggerUIBundle" in (swagger_ui() / "swagger-ui-bundle.js").read_bytes()


def test_vllms_engines_for_weight_transfer_hand_tensors_to_a_receiver() -> None:
    """What is used of them; meeting a trainer needs GPUs."""
    got: list[tuple[str, torch.Tensor]] = []
    axis = Axis(name="world", size=2, rank=1, group=None)
    receiver = OfVllm("nccl", axis, torch.device("cpu"))
    engine = receiver._engine
    assert engine.model is receiver
    assert (engine.parallel_config.rank, engine.parallel_config.world_size) == (1, 2)
    told = {"names": ["a"], "dtype_names": ["float32"], "shapes": [[2]]}
    engine.receive_weights = lambda info: engine.model.load_weights([(info.names[0], torch.zeros(2))])  # fmt: skip
    receiver.receive(told, got.extend)
    assert [name for name, _ in got] == ["a"]
    for method, wrong in ((receiver.init, {"port": 1}), (lambda info: receiver.receive(info, got.extend), {"names": ["a"]})):  # fmt: skip
        with pytest.raises(InvalidRequest, match="as vLLM's backend has it"):
            method(wrong)
