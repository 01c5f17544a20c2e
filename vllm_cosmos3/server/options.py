"""How the server is set up: one frozen record, from flags or from vLLM's ``--additional-config``."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vllm_cosmos3 import engine_options
from vllm_cosmos3.errors import InvalidRequest, did_you_mean
from vllm_cosmos3.request.fields import Spec
from vllm_cosmos3.request.presets import PresetRule
from vllm_cosmos3.request.request import PRESETS
from vllm_cosmos3.server.storage import default_folder

DEVICE = r"\s*(\d+|(GPU|MIG)-[\w/-]+)\s*"  # an index or a UUID, as in CUDA_VISIBLE_DEVICES
DEVICES = re.compile(rf"{DEVICE}(,{DEVICE})*")
CALLS = ("load", "encode", "step", "decode", "finish")  # of a stage, which its ranks make together


def _option(default: Any, group: str, kind: str, help: str, /, **spec: Any) -> Any:
    data = {"group": group, "spec": Spec(kind=kind, help=help, **spec)}
    return dataclasses.field(default=default, metadata=data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Everything about the generator's surface that an operator chooses.

    ``engine`` has the checked values of the `EngineOptions` that were given, under their own names.

    Raises:
        InvalidRequest: a value has the wrong type or range.
    """

    storage_path: str = _option(
        "",
        "jobs",
        "text",
        "folder of the job journal and the results (default: vllm-cosmos3 in $XDG_STATE_HOME or "
        "~/.local/state, shared by all servers of a user)",
    )
    file_ttl: float = _option(
        86_400.0,
        "jobs",
        "float",
        "how long results are kept",
        unit="seconds",
        low=0,
        above=True,
        high=1e9,
    )
    record_ttl: float = _option(
        604_800.0,
        "jobs",
        "float",
        "how long records of jobs are kept",
        unit="seconds",
        low=0,
        above=True,
        high=1e9,
    )
    storage_quota: int = _option(
        100 * 2**30,
        "jobs",
        "int",
        "maximum total size of stored results; the oldest are deleted first",
        unit="bytes",
        low=1,
        high=2**60,
    )
    max_queue: int = _option(
        32, "load", "int", "maximum number of waiting requests; more get 429", low=1, high=100_000
    )
    max_queue_gpu_seconds: float = _option(
        86_400.0,
        "load",
        "float",
        "maximum estimated GPU time of waiting work; more get 429",
        unit="seconds",
        low=0,
        above=True,
        high=1e9,
    )
    request_deadline: float = _option(
        3_600.0,
        "load",
        "float",
        "time limit per request, queueing included",
        unit="seconds",
        low=0,
        above=True,
        high=1e6,
    )
    sync_deadline: float = _option(
        600.0,
        "load",
        "float",
        "time limit per request to /v1/videos/sync and /v1/images, queueing included",
        unit="seconds",
        low=0,
        above=True,
        high=1e6,
    )
    drain_seconds: float = _option(
        600.0,
        "load",
        "float",
        "time accepted requests get to finish after SIGTERM",
        unit="seconds",
        low=0,
        high=1e6,
    )
    max_upload: int = _option(
        512 * 2**20,
        "inputs",
        "int",
        "maximum size of a request body, and of one fetched file",
        unit="bytes",
        low=1024,
        high=2**40,
    )
    upload_idle: float = _option(
        30.0,
        "inputs",
        "float",
        "idle time after which an upload is aborted",
        unit="seconds",
        low=0,
        above=True,
        high=3600,
    )
    fetch_seconds: float = _option(
        30.0,
        "inputs",
        "float",
        "time limit for fetching a URL",
        unit="seconds",
        low=0,
        above=True,
        high=3600,
    )
    robot_action_space: str = _option(
        "joint_pos", "inputs", "choice", "action space the policy was trained in: joints, or (midtrain) the end effector", choices=("joint_pos", "midtrain"),
    )  # fmt: skip
    robot_openpi_idle_timeout: float = _option(
        0.0,
        "inputs",
        "float",
        "idle time after which a robot's WebSocket is closed; 0: never",
        unit="seconds",
        low=0,
        high=1e6,
    )
    max_sessions: int = _option(
        8, "load", "int", "sessions of a simulator that may be open at once", low=1, high=10_000
    )
    session_idle_timeout: float = _option(
        300.0,
        "load",
        "float",
        "time without a message after which a session of a simulator is closed; 0: never",
        unit="seconds",
        low=0,
        high=1e6,
    )
    weight_update_timeout: float = _option(
        600.0,
        "load",
        "float",
        "time without a call of the trainer after which a weight update is given up, with the old weights; 0: never",
        unit="seconds",
        low=0,
        high=1e6,
    )
    allowed_local_media_path: str = _option(
        "", "inputs", "text", "folder that file:// URLs may read (default: none)"
    )
    allowed_media_domains: str = _option(
        "",
        "inputs",
        "text",
        "hosts that URLs may name, e.g. a.com,b.org (default: every public one)",
    )
    allow_private_media: bool = _option(
        False,  # noqa: FBT003 - a default
        "inputs",
        "bool",
        "also fetch from private and loopback addresses",
    )
    guardrails: str = _option(
        "auto", "guardrails", "choice", "auto: on if installed; required: refuse to start without; off",
        choices=("auto", "required", "off"),
    )  # fmt: skip
    guardrail_checker: str = _option(
        "vllm_cosmos3.server.guardrails:CosmosGuardrail",
        "guardrails",
        "text",
        "class that checks prompts and frames, as module:Class",
    )
    playground: bool = _option(
        True,  # noqa: FBT003 - a default
        "page",
        "bool",
        "serve the page at / to try the models in",
    )
    call_limits: str = _option(
        "",
        "load",
        "text",
        "time limit in seconds of each call to the ranks (load, encode, step, decode, finish), e.g."
        " step=120,decode=900; ranks that take longer are replaced (default: 1800 each)",
    )
    generator_devices: str = _option(
        "",
        "generator",
        "text",
        "devices of the generator, e.g. 1,2,3, given to replicas in this order; 0,0 for two replicas on "
        "one (default: all visible ones)",
    )
    default_sampling_params: str = _option(
        "",
        "generator",
        "text",
        'JSON object with defaults for the fields of videos, such as {"num_frames": 121}',
    )
    preset: str = _option(
        "", "generator", "choice", "preset of requests that name none", choices=("", *PRESETS)
    )
    presets: str = _option(
        "", "generator", "text", "presets that requests may name, such as exact,high (default: all)"
    )
    engine: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            if item.metadata:
                value = item.metadata["spec"].checked(item.name, getattr(self, item.name))
                object.__setattr__(self, item.name, value)
        if os.path.expanduser(self.storage_path).startswith("~"):
            raise InvalidRequest("storage_path", self.storage_path, "in the home of a known user")
        if not self.storage_path:
            object.__setattr__(self, "storage_path", str(default_folder()))
        path, checker = self.allowed_local_media_path, self.guardrail_checker
        if path and not Path(path).is_dir():
            raise InvalidRequest("allowed_local_media_path", path, "a folder")
        if not re.fullmatch(r"\w+(\.\w+)*:\w+", checker):
            raise InvalidRequest("guardrail_checker", checker, "module:Class")
        if self.generator_devices and not DEVICES.fullmatch(self.generator_devices):
            possible = "devices as in CUDA_VISIBLE_DEVICES, such as 1,2,3, or 0,0 for two replicas"
            raise InvalidRequest("generator_devices", self.generator_devices, possible)
        read_call_limits(self.call_limits)
        PresetRule.read(self.preset, self.presets)

    @property
    def storage(self) -> Path:
        return Path(self.storage_path).expanduser()


def read_call_limits(text: str) -> dict[str, float]:
    """Seconds by the name of a call, from NAME=SECONDS joined by commas.

    Raises:
        InvalidRequest: it is not written so, or no call has that name.
    """
    limits = {}
    for part in text.split(",") if text else ():
        name, _, seconds = part.strip().partition("=")
        if name not in CALLS or not re.fullmatch(r"\d+(\.\d+)?", seconds) or not float(seconds):
            possible = f"NAME=SECONDS joined by commas, where NAME is one of {', '.join(CALLS)}"
            raise InvalidRequest("call_limits", text, possible)
        limits[name] = float(seconds)
    return limits


class Described(NamedTuple):
    """An option as the operator meets it."""

    group: str
    spec: Spec
    default: Any


OPTIONS = {
    item.name: Described(item.metadata["group"], item.metadata["spec"], item.default)
    for item in dataclasses.fields(Options)
    if item.metadata
}
# Names of the engine options here, which vLLM's own flags leave free.
ENGINE = {
    option.server or name: name
    for name, option in engine_options.OPTIONS.items()
    if option.server is not None
}
OPTIONS |= {
    ours: Described("generator", engine_options.OPTIONS[name].served, engine_options.DEFAULTS[name])
    for ours, name in ENGINE.items()
}


def from_mapping(values: Mapping[str, Any]) -> Options:
    """Options from flags, or from the JSON object ``cosmos3`` of ``--additional-config``.

    Raises:
        InvalidRequest: an unknown name, with the nearest one, or a wrong value.
    """
    engine: dict[str, Any] = {}
    for name, value in values.items():
        if name not in OPTIONS:
            hint = did_you_mean(name, OPTIONS) or f"there are {', '.join(OPTIONS)}"
            field = f"additional-config.cosmos3.{name}"
            raise InvalidRequest(field, value, hint, "unknown_parameter")
        if name in ENGINE:
            _, spec, default = OPTIONS[name]
            checked = spec.checked(name, value)
            engine[ENGINE[name]] = (checked or None) if default is None else checked
    own = {name: value for name, value in values.items() if name not in ENGINE}
    return Options(**own, engine=engine)


KEEP_ALIVE = 75
"""Seconds that an idle connection is kept: longer than clients and balancers keep theirs (httpx and
OpenAI's client 5, AWS 60), so that none of them sends a request on a connection that is being closed."""
ONE_PROCESS = (  # of vLLM's --api-server-count
    "1, as each API process would start a generator of its own: --generator-replicas makes replicas "
    "behind one process; or run several servers, each on its devices, with the same --storage-path"
)
ONE_ENGINE = (  # of vLLM's --data-parallel-size
    "1 beside a generator, as it starts several API processes: --generator-replicas is for the "
    "generator, --surface reasoner serves replicas of the reasoner"
)
SHARED = ("allowed_local_media_path", "allowed_media_domains")  # flags of vLLM too
