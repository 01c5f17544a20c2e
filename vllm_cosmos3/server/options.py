"""How the server is set up: one frozen record, from flags or from vLLM's ``--additional-config``."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import tempfile
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_cosmos3.checkpoint.kinds import KINDS
from vllm_cosmos3.errors import InvalidRequest, did_you_mean
from vllm_cosmos3.request.fields import Spec


def _option(default: Any, group: str, kind: str, help: str, /, **spec: Any) -> Any:
    data = {"group": group, "spec": Spec(kind=kind, help=help, **spec)}
    return dataclasses.field(default=default, metadata=data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Everything about the generator's surface that an operator chooses.

    Raises:
        InvalidRequest: a value has the wrong type or range.
    """

    storage_path: str = _option(
        "",
        "jobs",
        "text",
        "folder of the job journal and of what was made; default: cosmos3-storage in the folder for "
        "temporary files, which all servers of a machine share",
    )
    file_ttl: float = _option(
        86_400.0,
        "jobs",
        "float",
        "until a result is deleted",
        unit="seconds",
        low=0,
        above=True,
        high=1e9,
    )
    record_ttl: float = _option(
        604_800.0,
        "jobs",
        "float",
        "until the record of a job is deleted as well",
        unit="seconds",
        low=0,
        above=True,
        high=1e9,
    )
    storage_quota: int = _option(
        100 * 2**30,
        "jobs",
        "int",
        "of all results; the oldest are deleted",
        unit="bytes",
        low=1,
        high=2**60,
    )
    max_queue: int = _option(32, "load", "int", "requests that wait", low=1, high=100_000)
    max_queue_gpu_seconds: float = _option(
        86_400.0,
        "load",
        "float",
        "estimated work that waits",
        unit="seconds",
        low=0,
        above=True,
        high=1e9,
    )
    request_deadline: float = _option(
        3_600.0,
        "load",
        "float",
        "that a request may take, waiting included",
        unit="seconds",
        low=0,
        above=True,
        high=1e6,
    )
    sync_deadline: float = _option(
        600.0,
        "load",
        "float",
        "that a request to /v1/videos/sync or for images may take",
        unit="seconds",
        low=0,
        above=True,
        high=1e6,
    )
    drain_seconds: float = _option(
        600.0,
        "load",
        "float",
        "that requests may go on after SIGTERM",
        unit="seconds",
        low=0,
        high=1e6,
    )
    max_upload: int = _option(
        512 * 2**20,
        "inputs",
        "int",
        "of one request or of one fetched file",
        unit="bytes",
        low=1024,
        high=2**40,
    )
    upload_idle: float = _option(
        30.0,
        "inputs",
        "float",
        "without a byte until an upload is given up",
        unit="seconds",
        low=0,
        above=True,
        high=3600,
    )
    fetch_seconds: float = _option(
        30.0,
        "inputs",
        "float",
        "until fetching a URL is given up",
        unit="seconds",
        low=0,
        above=True,
        high=3600,
    )
    robot_action_space: str = _option(
        "joint_pos", "inputs", "choice", "what the policy was trained to move: joints, or (midtrain)"
        " the end effector", choices=("joint_pos", "midtrain"),
    )  # fmt: skip
    robot_openpi_idle_timeout: float = _option(
        0.0,
        "inputs",
        "float",
        "without a message until a robot's WebSocket is closed; 0: never",
        unit="seconds",
        low=0,
        high=1e6,
    )
    allowed_local_media_path: str = _option(
        "", "inputs", "text", "folder that file:// URLs may read; default: none"
    )
    allowed_media_domains: str = _option(
        "",
        "inputs",
        "text",
        "hosts that URLs may name, such as a.com,b.org; default: every public one",
    )
    allow_private_media: bool = _option(
        False,  # noqa: FBT003 - a default
        "inputs",
        "bool",
        "fetch from private and loopback addresses as well",
    )
    guardrails: str = _option(
        "auto", "guardrails", "choice", "auto: when installed; required: or do not start; off",
        choices=("auto", "required", "off"),
    )  # fmt: skip
    guardrail_checker: str = _option(
        "vllm_cosmos3.server.guardrails:CosmosGuardrail",
        "guardrails",
        "text",
        "module:Class that checks prompts and frames",
    )
    generator_devices: str = _option(
        "",
        "generator",
        "text",
        "devices of the generator, such as 1,2,3; default: all that are visible",
    )
    generator_dtype: str = _option(
        "bfloat16",
        "generator",
        "choice",
        "of weights and activations",
        choices=("bfloat16", "float16", "float32"),
    )
    generator_load_format: str = _option(
        "auto", "generator", "choice", "dummy: random weights", choices=("auto", "dummy")
    )
    checkpoint_kind: str = _option(
        "", "generator", "text", f"{', '.join(KINDS)}; default: what the files say"
    )
    generator_tensor_parallel_size: int = _option(
        1, "generator", "int", "ranks that share each layer", low=1, high=64
    )
    cfg_parallel_size: int = _option(
        1, "generator", "int", "2: both branches of guidance at once", low=1, high=2
    )
    ulysses_degree: int = _option(
        1, "generator", "int", "ranks that share the sequence", low=1, high=64
    )
    vae_parallel: str = _option(
        "halo", "generator", "choice", "how ranks share the VAE", choices=("halo", "tile", "off")
    )
    und_residency: str = _option(
        "auto",
        "generator",
        "choice",
        "where the text tower rests; auto: on the host if a default request would not fit otherwise",
        choices=("auto", "gpu", "host"),
    )
    enable_layerwise_offload: bool = _option(
        False,  # noqa: FBT003 - a default
        "generator",
        "bool",
        "layers rest on the host and visit the device at every step",
    )
    memory_limit: float = _option(
        0.0,
        "generator",
        "float",
        "that a rank may use; 0: what is free",
        unit="GiB",
        low=0,
        high=1e4,
    )
    attention_backend: str = _option("auto", "generator", "text", "attention kernel")
    generator_executor_backend: str = _option(
        "mp", "generator", "choice", "who runs the ranks", choices=("mp", "ray", "uni")
    )

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = item.metadata["spec"].checked(item.name, getattr(self, item.name))
            object.__setattr__(self, item.name, value)
        if os.path.expanduser(self.storage_path).startswith("~"):
            raise InvalidRequest("storage_path", self.storage_path, "in the home of a known user")
        if not self.storage_path:
            object.__setattr__(self, "storage_path", f"{tempfile.gettempdir()}/cosmos3-storage")
        path, checker = self.allowed_local_media_path, self.guardrail_checker
        if path and not Path(path).is_dir():
            raise InvalidRequest("allowed_local_media_path", path, "a folder")
        if not re.fullmatch(r"\w+(\.\w+)*:\w+", checker):
            raise InvalidRequest("guardrail_checker", checker, "module:Class")

    @property
    def storage(self) -> Path:
        return Path(self.storage_path).expanduser()


def from_mapping(values: Mapping[str, Any]) -> Options:
    """Options from the JSON object ``cosmos3`` of ``--additional-config``.

    Raises:
        InvalidRequest: an unknown name, with the nearest one, or a wrong value.
    """
    names = [item.name for item in dataclasses.fields(Options)]
    for name in values:
        if name not in names:
            near = did_you_mean(name, names)
            hint = f"left out; {near}" if near else f"one of {', '.join(names)}"
            raise InvalidRequest(f"additional-config.cosmos3.{name}", values[name], hint)
    return Options(**values)


ONE_PROCESS = (  # of vLLM's --api-server-count
    "1, as each API process would start a generator of its own: run several servers, each on its "
    "devices, with the same --storage-path"
)
SHARED = ("allowed_local_media_path", "allowed_media_domains")  # flags of vLLM too


def add_groups(parser: argparse.ArgumentParser) -> None:
    """The flags of all options that vLLM has no flag for, in groups."""
    groups: dict[str, list[str]] = {}
    for item in dataclasses.fields(Options):
        if item.name not in SHARED:
            groups.setdefault(item.metadata["group"], []).append(item.name)
    for name, names in groups.items():
        title = name if name == "generator" else f"generator: {name}"
        add_flags(parser.add_argument_group(title), only=names)


def add_flags(group: argparse._ArgumentGroup, *, only: Container[str]) -> None:
    """One flag for each of these options. A flag that is not given leaves no attribute."""
    for item in dataclasses.fields(Options):
        if item.name not in only:
            continue
        spec, flag = item.metadata["spec"], f"--{item.name.replace('_', '-')}"
        unit = f" [{spec.unit}]" if spec.unit else ""
        if spec.kind == "bool":
            group.add_argument(
                flag,
                action=argparse.BooleanOptionalAction,
                default=argparse.SUPPRESS,
                help=spec.help,
            )
            continue
        shown = f"{item.default:,.15g}" if spec.kind in ("int", "float") else item.default
        default = f" (default: {shown})" if shown != "" else ""
        group.add_argument(
            flag,
            type={"int": int, "float": float}.get(spec.kind, str),
            choices=spec.choices or None,
            metavar=None if spec.choices else item.name.rsplit("_", 1)[-1].upper(),
            default=argparse.SUPPRESS,
            help=f"{spec.help}{unit}{default}",
        )


def given(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags of `add_flags` were given."""
    names = [item.name for item in dataclasses.fields(Options)]
    return {name: vars(args)[name] for name in names if name in vars(args)}
