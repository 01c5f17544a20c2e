"""Random tensors whose scales keep every network of the checkpoint in its working range.

Each tensor is drawn from its own stream, seeded by its name, so that it does not depend on which
other tensors a checkpoint has.
"""

from __future__ import annotations

import math
import zlib
from fnmatch import fnmatch

import torch

from vllm_cosmos3.checkpoint.tensors import Tensors, layer_matrices

LARGEST = 448.0  # of E4M3
INPUT = 6.0  # largest value that a calibration finds in the activations

# Pattern of a name -> (mean, standard deviation). What matches none is a matrix or a kernel.
_SCALES: tuple[tuple[str, float, float], ...] = (
    ("embed_tokens.weight", 0.0, 1.0),
    ("pos_embed.weight", 0.0, 0.5),
    ("*_modality_embed", 0.0, 0.5),
    ("*.bias", 0.0, 0.1),
    ("*.bias.weight", 0.0, 0.1),  # the table of biases of the action adapters
    ("*.gamma", 1.0, 0.1),
    ("*norm*.weight", 1.0, 0.1),
    ("*.alpha", 0.0, 0.2),  # snake parameters are logarithms
    ("*.beta", 0.0, 0.2),
)

# Matrices and kernels are drawn with 1 / sqrt(inputs), which keeps the variance, times this gain.
_GAINS: tuple[tuple[str, float], ...] = (
    ("lm_head.weight", 4.0),  # logits far enough apart that rounding does not reorder them
    ("decoder.conv_out.weight", 0.4),  # pixels, which are cut off at -1 and 1
    ("decoder.block.*.res_unit*.conv2.weight_v", 0.3),  # a chain of 15 residual units
    ("decoder.conv2.weight_v", 0.05),  # the waveform, cut off likewise
    ("encoder.layers.10.weight_v", 0.3),  # sound latents
)


def draw(tensors: Tensors, seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """One random tensor for every name in ``tensors``."""
    values = {name: _draw(name, shape, seed) for name, shape in tensors.items()}
    for name, norm in values.items():
        if name.endswith(".weight_g"):  # near the norm of its kernel, which thus keeps its scale
            kernel = values[name.removesuffix("g") + "v"]
            norm.mul_(0.2).add_(1).mul_(kernel.flatten(1).norm(dim=1).view_as(norm))
    return {name: value.to(dtype) for name, value in values.items()}


def in_fp8(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same with the matrices of the layers in FP8, their scales, and ModelOpt's copies of those."""
    matrices = layer_matrices({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    found = dict(tensors)
    for name in matrices:
        largest, module = tensors[name].float().abs().max(), name.removesuffix(".weight")
        scale, inputs = largest / LARGEST, torch.tensor(INPUT)
        found[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
        found[f"{module}.weight_scale"] = scale
        found[f"{module}.input_scale"] = inputs / LARGEST
        found[f"{module}.weight_quantizer._amax"] = largest.clone()
        found[f"{module}.weight_quantizer._scale"] = scale.clone()
        found[f"{module}.input_quantizer._amax"] = inputs.clone()
    return found


def _draw(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    noise = torch.randn(shape, generator=generator)
    if name.endswith(".weight_g"):
        return noise
    for pattern, mean, std in _SCALES:
        if fnmatch(name, pattern):
            return mean + std * noise
    gain = next((gain for pattern, gain in _GAINS if fnmatch(name, pattern)), 1.0)
    return noise * (gain / math.sqrt(_inputs(name, shape)))


def _inputs(name: str, shape: tuple[int, ...]) -> int:
    """How many values one output is a sum of."""
    if ".conv_t1." in name:  # transposed, kernel twice the stride: every input channel counts twice
        return 2 * shape[0]
    return math.prod(shape[1:])
