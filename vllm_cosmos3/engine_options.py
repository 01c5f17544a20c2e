"""Engine options: how a checkpoint is loaded and divided among devices, one table for every surface.

The fields of `EngineOptions` are the keyword arguments of `Cosmos3`, flags of the command line, flags
and ``--additional-config`` keys of the server, and what each rank is told. A new option is a field
here, read where it has its effect.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any

from vllm_cosmos3.checkpoint.adapters.reading import read_adapters
from vllm_cosmos3.checkpoint.config import ModelConfig, read_config
from vllm_cosmos3.checkpoint.kinds import KINDS
from vllm_cosmos3.checkpoint.quantization import MODES, ON_THE_FLY, Quantization
from vllm_cosmos3.checkpoint.tensors import transformer_tensors
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.request.fields import Spec

GPU_BATCH = 8  # most small samples in one forward; docs/numbers.md has what they gain
MAX_BATCH_SIZE = 64  # that an operator may choose
DEVICE = re.compile(r"cuda(:\d+(\s*,\s*\d+)*)?|cpu(:\d+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """An option on every surface: what it accepts, and its names besides that of its field.

    ``flags`` are further spellings on the command line. ``server`` is its name among the options of
    the server, None where vLLM's own flag says it; ``served`` is what the server accepts.
    """

    spec: Spec
    flags: tuple[str, ...] = ()
    server: str | None
    served: Spec


def _option(
    default: Any = None,
    *,
    flags: tuple[str, ...] = (),
    server: str | None = "",
    served: dict[str, Any] | None = None,
    **spec: Any,
) -> Any:
    """A field with its `Option`. The server calls it the same unless ``server`` says otherwise.

    ``served`` replaces parts of the specification on the server.
    """
    made = Spec(**spec)
    option = Option(spec=made, flags=flags, server=server, served=replace(made, **(served or {})))
    return field(default=default, metadata={"option": option})


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """Degrees of the mesh. Their product is the number of ranks; tensor parallel varies fastest."""

    tensor_parallel_size: int = 1
    cfg_parallel_size: int = 1
    ulysses_degree: int = 1
    vae_parallel: str = "halo"  # "halo", "tile" or "off"

    @property
    def degrees(self) -> dict[str, int]:
        """Ranks along each axis of the mesh, from the slowest axis to the fastest."""
        return {
            "cfg": self.cfg_parallel_size,
            "ulysses": self.ulysses_degree,
            "tp": self.tensor_parallel_size,
        }

    @property
    def world_size(self) -> int:
        return math.prod(self.degrees.values())


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """A checkpoint, and how it is loaded and divided among devices.

    Raises:
        InvalidRequest: an option has the wrong type or range.
    """

    model: str | Path
    _: KW_ONLY
    revision: str | None = _option(
        server=None, kind="text", help="branch, tag or commit of the repository"
    )
    dtype: str = _option(
        "bfloat16",
        server="generator_dtype",
        kind="choice",
        choices=("bfloat16", "float16", "float32"),
        help="dtype of weights and activations",
    )
    device: str | None = _option(
        server=None,
        kind="text",
        help="cuda, cuda:1 or cpu; cuda:0,0 by rank (default: vLLM's)",
    )
    tensor_parallel_size: int = _option(
        1,
        flags=("--tp",),
        server="generator_tensor_parallel_size",
        kind="int",
        low=1,
        high=64,
        help="tensor-parallel ranks",
    )
    cfg_parallel_size: int = _option(
        1,
        flags=("--cfg",),
        kind="int",
        low=1,
        high=2,
        help="CFG-parallel ranks; 2: both guidance branches in parallel",
    )
    ulysses_degree: int = _option(
        1, kind="int", low=1, high=64, help="Ulysses sequence-parallel ranks"
    )
    data_parallel_size: int = _option(
        1,
        flags=("--dp", "--generator-replicas"),
        server="generator_replicas",
        kind="int",
        low=1,
        high=256,
        help="replicas behind one queue",
    )
    vae_parallel: str = _option(
        "halo",
        kind="choice",
        choices=("halo", "tile", "off"),
        help="how ranks share the VAE; tile needs less memory but is not exact",
    )
    distributed_executor_backend: str | None = _option(
        server="generator_executor_backend",
        served={"choices": ("mp", "ray", "uni"), "help": "how ranks are started (default: mp)"},
        kind="choice",
        choices=("mp", "ray", "uni", "external_launcher"),
        help="how ranks are started: ray for several hosts, external_launcher under torchrun, where "
        "only rank 0 gets results (default: mp for several ranks)",
    )
    attention_backend: str = _option("auto", kind="text", help="attention kernel")
    quantization: str | None = _option(
        server="generator_quantization",
        kind="choice",
        choices=("none", "fp8"),
        help="fp8: FP8 weights, quantized while loading if the checkpoint is not; not exact "
        "(default: as the checkpoint is stored)",
    )
    fp8_first_steps: int | None = _option(
        kind="int",
        low=0,
        high=200,
        unit="steps",
        help="first steps without FP8 activations (default: the checkpoint's, else 3)",
    )
    fp8_last_steps: int | None = _option(
        kind="int", low=0, high=200, unit="steps", help="last steps, likewise"
    )
    fp8_text: str | None = _option(
        kind="choice",
        choices=MODES,
        help="FP8 activations in the text tower: native, or none: a16 (default: the checkpoint's, else a16)",
    )
    load_format: str = _option(
        "auto",
        server="generator_load_format",
        kind="choice",
        choices=("auto", "dummy"),
        help="dummy: random weights, to measure speed only",
    )
    und_residency: str = _option(
        "auto",
        kind="choice",
        choices=("auto", "gpu", "host"),
        help="text tower on the gpu, or offloaded to the host and copied to the GPU layer by layer while a "
        "prompt is encoded; auto: host only if needed",
    )
    enable_layerwise_offload: bool = _option(
        False,  # noqa: FBT003 - a default
        kind="bool",
        help="keep generation layers in CPU memory and copy each to the GPU at every step while the "
        "previous one computes",
    )
    memory_limit: float | None = _option(
        served={"above": False, "help": "GPU memory limit per rank; 0: all free memory"},
        kind="float",
        low=0,
        above=True,
        high=1e4,
        unit="GiB",
        help="GPU memory limit per rank (default: all free memory)",
    )
    gpu_memory_utilization: float | None = _option(
        server="generator_gpu_memory_utilization",
        served={"above": False},
        kind="float",
        low=0,
        above=True,
        high=1,
        help="fraction of GPU memory to use, as in vLLM",
    )
    lora: tuple[tuple[str, float], ...] = _option(
        (),
        kind="adapters",
        help="LoRA adapter merged at load (default: scale 1); repeatable",
    )
    lora_alpha: float | None = _option(
        kind="float",
        low=0,
        above=True,
        high=1e6,
        help="alpha of adapters whose files do not say theirs",
    )
    max_batch_size: int | None = _option(
        kind="int",
        low=1,
        high=MAX_BATCH_SIZE,
        help=f"small samples in one forward (default: {GPU_BATCH}; CPU: 1)",
    )
    weight_transfer: str | None = _option(
        kind="choice",
        choices=("files", "nccl", "ipc"),
        help="accept new weights of the transformer from a trainer: files that all ranks can read, or "
        "vLLM's weight transfer",
    )
    checkpoint_kind: str | None = _option(
        kind="text",
        help=f"kind of checkpoint: {', '.join(KINDS)} (default: as detected)",
    )

    def __post_init__(self) -> None:
        if self.device is not None:
            object.__setattr__(self, "device", checked_device(self.device))
        if self.gpu_memory_utilization is not None and self.memory_limit is not None:
            possible = "left out, as memory_limit is given"
            value = self.gpu_memory_utilization
            raise InvalidRequest("gpu_memory_utilization", value, possible, "conflict")
        for name, option in OPTIONS.items():
            value = getattr(self, name)
            if value is not None or DEFAULTS[name] is not None:
                object.__setattr__(self, name, option.spec.checked(name, value))

    @property
    def parallel(self) -> ParallelConfig:
        names = (item.name for item in dataclasses.fields(ParallelConfig))
        return ParallelConfig(**{name: getattr(self, name) for name in names})

    def batch_limit(self, device: str, *, exact: bool) -> int:
        """Most samples in one forward on a device, of a request whose preset is exact or not.

        On a GPU the kernel of a product depends on its number of rows, and so do the last bits. On a
        CPU a sample takes as long in a batch as alone.
        """
        on_cpu = device.split(":")[0] == "cpu"
        if exact and not on_cpu:
            return 1
        return self.max_batch_size or (1 if on_cpu else GPU_BATCH)

    def applied(self, model: ModelConfig) -> ModelConfig:
        """The same checkpoint with the quantization and the adapters that the options choose.

        Raises:
            InvalidRequest: the checkpoint cannot be loaded so.
            CheckpointError, Unsupported: an adapter does not suit the checkpoint.
        """
        model = self._quantized(model)
        stored = model.quantization is not None and model.quantization.stored
        if self.weight_transfer is not None and stored:
            possible = "left out: this checkpoint holds FP8 weights, which no trainer sends"
            raise InvalidRequest("weight_transfer", self.weight_transfer, possible, "conflict")
        if self.weight_transfer in ("nccl", "ipc") and self.data_parallel_size > 1:
            possible = "files for several replicas: vLLM's trainer knows the ranks of one"
            raise InvalidRequest("weight_transfer", self.weight_transfer, possible, "conflict")
        if self.lora and stored:
            possible = (
                "left out: this checkpoint holds FP8 weights, which adapters are not rounded into; "
                "take the bfloat16 revision, with quantization=fp8 for the memory"
            )
            raise InvalidRequest("lora", self.lora[0][0], possible, "conflict")
        shapes = transformer_tensors(model.transformer)
        return replace(model, adapters=read_adapters(self.lora, self.lora_alpha, shapes))

    def _quantized(self, model: ModelConfig) -> ModelConfig:
        """The same checkpoint with the quantization that the options choose.

        Raises:
            InvalidRequest: the checkpoint cannot be loaded so.
        """
        found = model.quantization
        if self.quantization == "none" and found is not None:
            possible = "fp8 or left out: this checkpoint holds FP8 weights"
            raise InvalidRequest("quantization", self.quantization, possible)
        if self.quantization == "fp8" and found is None:
            found = Quantization(stored=False) if model.distilled else ON_THE_FLY
        changes = {part: getattr(self, name) for name, part in OF_FP8.items()}
        changes = {part: value for part, value in changes.items() if value is not None}
        if found is None and changes:
            name = next(name for name, part in OF_FP8.items() if part in changes)
            possible = "left out, or given with quantization=fp8"
            raise InvalidRequest(name, getattr(self, name), possible, "conflict")
        return replace(model, quantization=found and replace(found, **changes))

    def on(self, folder: Path, device: str) -> EngineConfig:
        """The same with the folder and the device that were found for them."""
        options = {name: getattr(self, name) for name in OPTIONS}
        return EngineConfig(**{**options, "model": folder, "device": device})


def checked_device(device: object) -> str:
    """The name of a device, or of those of the ranks; one of torch is taken, too.

    Raises:
        InvalidRequest: nothing here runs on such a device.
    """
    name = str(device)
    if not DEVICE.fullmatch(name):
        raise InvalidRequest("device", name, "cuda, cuda:N, cuda:N,N,... by rank, or cpu")
    return name


OF_FP8 = {  # options -> fields of `Quantization`
    "fp8_first_steps": "first_steps",
    "fp8_last_steps": "last_steps",
    "fp8_text": "text",
}
OPTIONS: dict[str, Option] = {
    item.name: item.metadata["option"]
    for item in dataclasses.fields(EngineOptions)
    if "option" in item.metadata
}
DEFAULTS: dict[str, Any] = {
    item.name: item.default for item in dataclasses.fields(EngineOptions) if item.name in OPTIONS
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig(EngineOptions):
    """Everything a rank needs to build its part of the generator. Picklable."""

    model: Path
    device: str = "cpu"

    def limited(self, device_bytes: int | None) -> EngineConfig:
        """The same with a fraction of the memory of a device as a limit. None: nobody counts it.

        Raises:
            InvalidRequest: there is a fraction, and nobody counts.
        """
        fraction = self.gpu_memory_utilization
        if fraction is None:
            return self
        if device_bytes is None:
            possible = "left out on a CPU, or memory_limit given"
            raise InvalidRequest("gpu_memory_utilization", fraction, possible, "conflict")
        gib = fraction * device_bytes / 2**30
        return dataclasses.replace(self, gpu_memory_utilization=None, memory_limit=gib)

    def batch_size(self, *, exact: bool) -> int:
        """`batch_limit` on the device of these options."""
        return self.batch_limit(self.device, exact=exact)

    def read_model(self) -> ModelConfig:
        """What the checkpoint says of itself, with what the options change.

        Raises:
            CheckpointError: as `read_config`.
        """
        return self.applied(read_config(self.model, self.checkpoint_kind))
