"""Copies of weights on the host: bits, types and orders are kept, and so is the memory.

The copies are made of tensors of the CPU, which takes all but pinning.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from vllm_cosmos3.parallel.host_copy import HostCopy


def tensors() -> list[Tensor]:
    """Of several types, sizes and orders of their values, one of them empty and one a scalar."""
    torch.manual_seed(0)
    return [
        torch.randn(33, 7),
        torch.randn(5, 3, dtype=torch.bfloat16),
        torch.randn(2, 4, 3, 5).to(memory_format=torch.channels_last),
        torch.randn(8, 16).t(),
        torch.tensor(3.5),
        torch.empty(0),
        torch.arange(300, dtype=torch.uint8)[100:].view(torch.float8_e4m3fn),
    ]


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8).clone()


@torch.inference_mode()
def test_released_and_brought_back_they_are_the_same_bits_in_the_same_order() -> None:
    for buffer in (1, 600, 1 << 20):  # each tensor alone, some together, all in one
        weights = tensors()
        before = [(bits(t), t.shape, t.stride(), t.dtype) for t in weights]
        homes = [t.data_ptr() for t in weights]
        copy = HostCopy(weights, buffer)
        for _ in range(2):
            copy.save()
            copy.release()
            away = [t.data_ptr() for t in weights]
            assert not set(away) & {home for home in homes if home}
            starts = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in weights if t.nbytes)
            assert all(a[1] <= b[0] for a, b in pairwise(starts))
            for weight, (values, *layout) in zip(weights, before, strict=True):
                assert torch.equal(bits(weight), values)
                assert [weight.shape, weight.stride(), weight.dtype] == layout
            copy.bring_back()
            assert not {t.data_ptr() for t in weights if t.nbytes} & set(away)
            for weight, (values, *layout) in zip(weights, before, strict=True):
                assert torch.equal(bits(weight), values)
                assert [weight.shape, weight.stride(), weight.dtype] == layout


@torch.inference_mode()
def test_nothing_is_copied_again_until_the_weights_are_others_nor_is_memory_made() -> None:
    weight = torch.zeros(1000)
    copy = HostCopy([weight])
    copy.save()
    weight.fill_(1)  # which nobody tells
    copy.save()
    copy.put_back()
    assert not weight.any()
    copy.release()
    first = weight.data_ptr()
    copy.bring_back()
    weight.fill_(2)
    copy.changed()
    copy.save()
    weight.fill_(3)
    copy.put_back()
    assert (weight == 2).all()
    copy.release()
    assert weight.data_ptr() == first
