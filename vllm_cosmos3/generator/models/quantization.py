"""FP8 matrices in vLLM's linear layers: how they are filled, and how they are multiplied.

A matrix is E4M3 [out, in] with a float32 scale for each output. Matrices that vLLM joins, as those of
queries, keys and values, keep their bytes: their scales are repeated over their rows, which gives the
same bits as a product for each of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.utils import set_weight_attrs

from vllm_cosmos3.checkpoint.quantization import Quantization
from vllm_cosmos3.checkpoint.shards import SCALES, Shapes, Target
from vllm_cosmos3.checkpoint.weights import Prepare, as_it_is
from vllm_cosmos3.errors import CheckpointError, Unsupported
from vllm_cosmos3.generator.models.weight_tables import scale_target

logger = logging.getLogger(__name__)

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of E4M3
CAPABILITY = (8, 9)  # of the first GPUs that multiply FP8
DUMMY_INPUT_SCALE = 8 / LARGEST  # where weights are random: activations are near one


@dataclass(slots=True)
class Precision:
    """The mode of a tower's products, which all its layers share: W8A8 if ``native``, else W8A16."""

    native: bool = True


class Fp8Layers(QuantizationConfig):
    """The linear method of a tower's layers, as vLLM asks a quantization configuration for it."""

    def __init__(self, precision: Precision, *, stored: bool) -> None:
        super().__init__()
        self._method = Fp8Linear(precision, stored=stored)

    def get_quant_method(self, _: nn.Module, prefix: str) -> LinearMethodBase:
        return self._method

    # What vLLM asks where it chooses a configuration by itself, which is never the case here.

    def get_name(self) -> str:
        return "cosmos3_fp8"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        major, minor = CAPABILITY
        return 10 * major + minor

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Fp8Layers:
        # vLLM's base asks for it; its loader, which would call it, does not load the generator.
        raise NotImplementedError(config)


class Fp8Linear(LinearMethodBase):
    """Products with FP8 weights.

    Activations are quantized with the layer's static scale where ``stored``, else token by token.
    """

    def __init__(self, precision: Precision, *, stored: bool) -> None:
        self._precision, self._stored = precision, stored

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        rows, loader = sum(output_partition_sizes), attributes["weight_loader"]
        weight = torch.empty(rows, input_size_per_partition, dtype=FP8)
        parameters: dict[str, tuple[Tensor, dict[str, Any]]] = {
            "weight": (weight, {"input_dim": 1, "output_dim": 0, "weight_loader": loader}),
            "weight_scale": (torch.empty(rows), {"output_dim": 0, "weight_loader": loader}),
        }
        if self._stored:
            parameters["input_scale"] = (torch.zeros(1), {"weight_loader": _load_input_scale})
        for name, (tensor, own) in parameters.items():
            parameter = nn.Parameter(tensor, requires_grad=False)
            set_weight_attrs(parameter, own)
            layer.register_parameter(name, parameter)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Nothing: the bytes are multiplied as they are stored."""

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        assert bias is None  # of no layer here
        if not self._precision.native:
            return linear(x, dequantized(layer.weight, layer.weight_scale, x.dtype))
        if self._stored:
            xq, scale = quantized_by_tensor(x, layer.input_scale)
        else:
            xq, scale = quantized_by_token(x)
        return product(xq, scale, layer.weight, layer.weight_scale, x.dtype)


def product(
    xq_SI: Tensor, scale_S1: Tensor, wq_OI: Tensor, scale_O: Tensor, dtype: torch.dtype
) -> Tensor:
    """``x @ w.T`` [S, O] of FP8 operands, summed in float32, each output scaled by its row and column."""
    made: Tensor = torch._scaled_mm(
        xq_SI,
        wq_OI.t(),
        scale_a=scale_S1,
        scale_b=scale_O.unsqueeze(0),
        out_dtype=dtype,
        use_fast_accum=True,
    )
    return made


def quantized_by_tensor(x: Tensor, scale_1: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` [S, I] in FP8 with one scale, and that scale [S, 1] for every token."""
    if x.is_cuda:
        from vllm import _custom_ops

        xq, _ = _custom_ops.scaled_fp8_quant(x.contiguous(), scale_1)
    else:
        xq = _rounded(x.float() / scale_1)
    return xq, scale_1.repeat(x.shape[0]).unsqueeze(1)


def quantized_by_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` [S, I] in FP8, and a scale [S, 1] for each token, the least that holds its values."""
    if x.is_cuda:
        from vllm import _custom_ops

        xq, scale = _custom_ops.scaled_fp8_quant(x.contiguous(), use_per_token_if_dynamic=True)
        return xq, scale
    return quantized_rows(x)


def quantized_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix in FP8 with a float32 scale [rows, 1] for each row: its largest value becomes 448."""
    x = x.float()
    least, most = x.aminmax(dim=1, keepdim=True)
    scale = (torch.maximum(-least, most) / LARGEST).clamp_(min=torch.finfo(torch.float32).tiny)
    return _rounded(x / scale), scale


def quantized_matrix(x: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix in FP8 with one scale, as the published FP8 revisions have it."""
    x = x.float()
    scale = (x.abs().amax() / LARGEST).clamp_(min=torch.finfo(torch.float32).tiny)
    return _rounded(x / scale), scale


def dequantized(wq_OI: Tensor, scale_O: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix that FP8 stands for, computed in float32 and rounded once."""
    return wq_OI.float().mul_(scale_O.unsqueeze(1)).to(dtype)


def _rounded(x: Tensor) -> Tensor:
    return x.clamp_(-LARGEST, LARGEST).to(FP8)


# Loading.


def preparation(
    quantization: Quantization | None,
    matrices: frozenset[str],
    shapes: Shapes,
    device: torch.device,
    *,
    dummy: bool,
) -> Prepare:
    """What becomes of the tensors of a component, in the files or, if ``dummy``, drawn in float32."""
    if quantization is None or not matrices:
        return as_it_is
    if quantization.stored and not dummy:
        return _Stored(shapes)
    return _Quantizing(matrices, device, stored=quantization.stored)


@dataclass(frozen=True, slots=True)
class _Stored:
    """FP8 as the files have it: the scale of a matrix is repeated for each of its outputs."""

    shapes: Shapes

    def __call__(
        self, name: str, target: Target, tensor: Tensor
    ) -> Iterator[tuple[Target, Tensor]]:
        if name.endswith(SCALES):
            value = float(tensor)
            if not 0 < value < float("inf"):
                raise CheckpointError(f"{name} is {value:g}, must be a number above 0")
        if name.endswith(".weight_scale"):
            rows = self.shapes[f"{name.removesuffix('_scale')}"][0]
            tensor = tensor.reshape(1).expand(rows)
        yield target, tensor


@dataclass(frozen=True, slots=True)
class _Quantizing:
    """Matrices as the files have them, quantized on the device with a scale for each output.

    The whole matrix is seen, so that the result does not depend on how it is shared among ranks.
    """

    matrices: frozenset[str]
    device: torch.device
    stored: bool

    def __call__(
        self, name: str, target: Target, tensor: Tensor
    ) -> Iterator[tuple[Target, Tensor]]:
        if name.endswith(SCALES):  # drawn for nothing
            return
        if name not in self.matrices:
            yield target, tensor
            return
        matrix, scale = quantized_rows(tensor.to(self.device))
        yield target, matrix
        yield scale_target(target, ".weight_scale"), scale.squeeze(1)
        if self.stored:
            yield scale_target(target, ".input_scale"), scale.new_tensor(DUMMY_INPUT_SCALE)


def _load_input_scale(parameter: Tensor, scale: Tensor, _: object = None) -> None:
    """One scale for matrices that are joined and so have one input: the largest of theirs."""
    scale = scale.reshape(1).to(parameter.device)
    before = parameter.data
    if bool(before) and not torch.equal(before, scale):
        logger.warning("joined matrices have different input scales; the largest is used")
    parameter.data = torch.maximum(before, scale)


def check_device(quantization: Quantization | None, device: torch.device) -> None:
    """Refuse a GPU that cannot multiply FP8.

    Raises:
        Unsupported: it is too old.
    """
    if quantization is None or device.type != "cuda":
        return
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        have, need = (".".join(map(str, each)) for each in (found, CAPABILITY))
        raise Unsupported(
            f"FP8 needs a GPU of compute capability {need} or higher, this has {have}"
        )


Chosen = Callable[[Precision], Fp8Layers | None]


def layers_of(quantization: Quantization | None) -> Chosen:
    """How the linear layers of a tower are made, for the tower's `Precision`."""
    if quantization is None:
        return lambda _: None
    return lambda precision: Fp8Layers(precision, stored=quantization.stored)
