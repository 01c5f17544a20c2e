"""Engine options: how a checkpoint is loaded and divided among devices, one table for every surface.

The fields of `EngineOptions` are the keyword arguments of `Cosmos3`, flags of the command line, flags
and ``--additional-config`` keys of the server, and what each rank is told. A new option is a field
here, read where it has its effect.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any

from vllm_cosmos3.checkpoint.kinds import KINDS
from vllm_cosmos3.request.fields import Spec


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
        help="of weights and activations; the solver's state is always float32",
    )
    device: str | None = _option(
        server=None,
        kind="text",
        help="such as cuda, cuda:1 or cpu; default: what vLLM is built for",
    )
    tensor_parallel_size: int = _option(
        1,
        flags=("--tp",),
        server="generator_tensor_parallel_size",
        kind="int",
        low=1,
        high=64,
        help="ranks that share each layer; divides the key-value heads",
    )
    cfg_parallel_size: int = _option(
        1,
        flags=("--cfg",),
        kind="int",
        low=1,
        high=2,
        help="2: the two branches of guidance side by side",
    )
    ulysses_degree: int = _option(
        1, kind="int", low=1, high=64, help="ranks that share the sequence of tokens"
    )
    vae_parallel: str = _option(
        "halo",
        kind="choice",
        choices=("halo", "tile", "off"),
        help="how ranks share the VAE; tile takes less memory and is not exact",
    )
    distributed_executor_backend: str | None = _option(
        server="generator_executor_backend",
        served={"choices": ("mp", "ray", "uni"), "help": "who starts the ranks; default: mp"},
        kind="choice",
        choices=("mp", "ray", "uni", "external_launcher"),
        help="who starts the ranks: ray for several hosts, external_launcher under torchrun, where "
        "only rank 0 gets results; default: mp for several ranks",
    )
    attention_backend: str = _option("auto", kind="text", help="attention kernel")
    load_format: str = _option(
        "auto",
        server="generator_load_format",
        kind="choice",
        choices=("auto", "dummy"),
        help="dummy: random weights, where only the time matters",
    )
    und_residency: str = _option(
        "auto",
        kind="choice",
        choices=("auto", "gpu", "host"),
        help="where the text tower rests: gpu, host (it visits the device to read the texts of a "
        "request), or auto: the host only if a default video would not fit otherwise",
    )
    enable_layerwise_offload: bool = _option(
        False,  # noqa: FBT003 - a default
        kind="bool",
        help="generation layers rest on the host and visit the device at every step, each while the "
        "one before it computes",
    )
    memory_limit: float | None = _option(
        served={"above": False, "help": "that each rank may use; 0, the default: what is free"},
        kind="float",
        low=0,
        above=True,
        high=1e4,
        unit="GiB",
        help="that each rank may use of its device; default: what is free",
    )
    checkpoint_kind: str | None = _option(
        kind="text", help=f"{', '.join(KINDS)}; default: what the files say"
    )

    def __post_init__(self) -> None:
        if self.device is not None:
            object.__setattr__(self, "device", str(self.device))  # of torch, too
        for name, option in OPTIONS.items():
            value = getattr(self, name)
            if value is not None or DEFAULTS[name] is not None:
                object.__setattr__(self, name, option.spec.checked(name, value))

    @property
    def parallel(self) -> ParallelConfig:
        names = (item.name for item in dataclasses.fields(ParallelConfig))
        return ParallelConfig(**{name: getattr(self, name) for name in names})

    def on(self, folder: Path, device: str) -> EngineConfig:
        """The same with the folder and the device that were found for them."""
        return EngineConfig(**{**dataclasses.asdict(self), "model": folder, "device": device})


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
