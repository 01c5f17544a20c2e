"""Layers that visit the device: the same results, two at a time, and nothing left behind."""

from __future__ import annotations

import gc
from itertools import pairwise

import pytest
import torch
from live_tensors import LiveTensors
from torch import Tensor, nn

from vllm_cosmos3.parallel.offload import HostLayers

CPU = torch.device("cpu")
WIDTH = 64


def layers(count: int = 5) -> list[nn.Module]:
    """Of several dtypes and sizes, one of them without parameters."""
    torch.manual_seed(0)
    made: list[nn.Module] = [nn.Linear(WIDTH, WIDTH, bias=index % 2 == 0) for index in range(count)]
    norm = nn.LayerNorm(WIDTH, dtype=torch.bfloat16)
    return [*made[:2], nn.Tanh(), Cast(norm), *made[2:]]


class Cast(nn.Module):
    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.norm, self.odd = norm, nn.Parameter(torch.ones(3, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.bfloat16()).float() * self.odd[0]


def through(sequence: object, x: Tensor) -> Tensor:
    for layer in sequence:  # type: ignore[attr-defined]
        x = layer(x)
    return x


@torch.inference_mode()
def test_results_are_the_same_bits_and_weights_go_home() -> None:
    stack, x = layers(), torch.randn(3, WIDTH)
    expected = through(stack, x)
    before = [p.clone() for layer in stack for p in layer.parameters()]
    hosted = HostLayers(stack, CPU)
    homes = [p.data_ptr() for layer in stack for p in layer.parameters()]
    for _ in range(2):
        assert torch.equal(through(hosted, x), expected)
    after = [p for layer in stack for p in layer.parameters()]
    assert [p.data_ptr() for p in after] == homes
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert len(hosted) == len(stack)


@torch.inference_mode()
def test_a_layer_computes_with_a_copy() -> None:
    """Away from home while it is used, and back when the next one has its turn."""
    stack = [nn.Linear(WIDTH, WIDTH) for _ in range(3)]
    hosted = HostLayers(stack, CPU)
    homes = [layer.weight.data_ptr() for layer in stack]
    for index, layer in enumerate(hosted):
        assert layer is stack[index]
        away = [a.weight.data_ptr() != home for a, home in zip(stack, homes, strict=True)]
        assert away == [other == index for other in range(3)]


@torch.inference_mode()
def test_two_layers_are_on_the_device_at_a_time() -> None:
    with LiveTensors() as live:
        hosted = HostLayers([nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(6)], CPU)
        gc.collect()
        at_home = live.now
        live.peak = 0
        for _ in hosted:
            pass
    assert at_home == 6 * 4 * WIDTH * WIDTH
    assert live.peak - at_home == 2 * 4 * WIDTH * WIDTH
    gc.collect()
    assert live.now == at_home


@pytest.mark.parametrize("kept", [True, False])
@torch.inference_mode()
def test_an_error_in_a_layer_leaves_them_usable(kept: bool) -> None:
    """Also while the error, and with it the broken iteration, is still referred to."""
    stack, x = layers(), torch.randn(3, WIDTH)
    expected = through(stack, x)
    hosted = HostLayers(stack, CPU)
    homes = [p.data_ptr() for layer in stack for p in layer.parameters()]
    errors = []
    for stop in range(3):
        try:
            for index, _ in enumerate(hosted):
                if index == stop:
                    raise MemoryError(index)
        except MemoryError as error:
            errors += [error] * kept
    assert torch.equal(through(hosted, x), expected)
    errors.clear()
    gc.collect()
    assert [p.data_ptr() for layer in stack for p in layer.parameters()] == homes
    assert torch.equal(through(hosted, x), expected)


def test_parameters_do_not_overlap() -> None:
    stack = layers()
    HostLayers(stack, CPU)
    spans = sorted(
        (p.data_ptr(), p.data_ptr() + p.nbytes) for layer in stack for p in layer.parameters()
    )
    assert all(before[1] <= after[0] for before, after in pairwise(spans))
