"""The one place that knows that versions of vLLM, transformers and PyAV differ.

Everything is probed by feature, but for PyAV, whose functions do not say what they take. What is
imported from here is the same in every supported version.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import cache
from http import HTTPStatus
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from vllm_cosmos3.errors import Cosmos3Error, Unsupported
from vllm_cosmos3.imports import uncollected

if TYPE_CHECKING:
    import torch

_DELTA_MESSAGE = (
    "vllm.entrypoints.generate.base.protocol",  # from 0.30
    "vllm.entrypoints.openai.engine.protocol",  # up to 0.28
)
_FRONTEND_ARGS = (
    "vllm.entrypoints.launchers.cli_args",  # from 0.30
    "vllm.entrypoints.openai.cli_args",  # up to 0.28
)


def first_module(names: tuple[str, ...]) -> Any:
    """The first of these modules that exists; ImportError names them all."""
    for name in names:
        try:
            with uncollected():
                return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not name.startswith(str(error.name)):
                raise
    raise ImportError(f"this vLLM has none of {', '.join(names)}")


def has_serve_flag(name: str) -> bool:
    """Whether ``vllm serve`` takes ``--name`` among the flags of its HTTP front end."""
    arguments = first_module(_FRONTEND_ARGS).FrontendArgs
    return name.replace("-", "_") in arguments.__dataclass_fields__


def unknown_to_serve(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words that ``vllm serve`` does not know, and the flags that it has.

    Raises:
        Cosmos3Error: it cannot read the others, in its own words.
    """
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    unknown: list[str] = []

    class Parser(FlexibleArgumentParser):  # type: ignore[misc, unused-ignore]
        def parse_known_args(self, *args: Any) -> tuple[Any, list[str]]:
            found, rest = super().parse_known_args(*args)
            unknown.extend(rest)
            return found, []

        def error(self, message: str) -> NoReturn:
            raise Cosmos3Error(message)

    parser = first_module(_FRONTEND_ARGS).make_arg_parser(Parser())
    parser.parse_args(list(words))
    return unknown, [*parser._option_string_actions]


def end_engine(client: Any, seconds: float) -> None:
    """End an offline engine of vLLM, whose process has so many seconds for it, and its ZeroMQ context.

    vLLM leaves the context to the garbage collector, as a thread has yet to close its sockets. An
    engine in this process has neither.
    """
    client.shutdown(timeout=seconds)
    if hasattr(client, "output_queue_thread"):
        client.output_queue_thread.join(seconds)
        client.resources.ctx.destroy(linger=0)


def swagger_ui() -> Path:
    """Folder with Swagger UI, which vLLM brings along for its flag --enable-offline-docs."""
    found = find_spec("vllm")  # of a part of it would import vLLM
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / "entrypoints/serve/instrumentator/static"


def knows_model_type(name: str) -> bool:
    """Whether transformers or vLLM has a configuration class for ``model_type``."""
    from transformers import CONFIG_MAPPING
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    return name in CONFIG_MAPPING or name in _CONFIG_REGISTRY


def any_titles() -> dict[str, str]:
    """What ``av.open`` is told so that titles may be in any encoding; from PyAV 19 they always may."""
    import av

    return {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}


def http_error(status: HTTPStatus, message: str) -> Exception:
    """An exception that vLLM's HTTP server answers with ``status``; with 400 where it cannot."""
    import vllm.exceptions

    graceful = getattr(vllm.exceptions, "GracefulHTTPError", None)
    return ValueError(message) if graceful is None else graceful(message, status)


def let_sleep(queue: Any) -> None:
    """Let the reader of a queue of vLLM's executor sleep until a message is there.

    By itself it looks without a pause for a second after each one, which takes a core.
    """
    condition = getattr(queue, "_spin_condition", None)
    if condition is not None:
        condition.busy_loop_s = 0.0


def device_index(parallel_config: Any, local_rank: int) -> int:
    """The number that a worker's device has for torch.

    Ray's workers see all devices of their host and are told which are the mesh's; in versions that do not
    tell them they see those of the mesh only.
    """
    assigned = getattr(parallel_config, "assigned_physical_gpu_ids", None)
    if assigned is None:
        return local_rank
    from vllm.platforms import current_platform, interface

    interface.set_assigned_physical_gpu_ids(
        assigned
    )  # also for what asks how devices are connected
    return int(current_platform.logical_device_id_to_visible_device_id(local_rank))


def image_formats() -> tuple[str, ...] | None:
    """Pillow's formats that vLLM decodes; None where it does not choose."""
    import vllm.multimodal.image

    return getattr(vllm.multimodal.image, "ALLOWED_IMAGE_FORMATS", None)


@cache
def clips_keep_files() -> bool:
    """Whether vLLM takes a clip along with the bytes of its file, as of pictures; from 0.28."""
    import numpy as np
    from vllm.multimodal.media import MediaWithBytes
    from vllm.multimodal.parse import MultiModalDataParser

    clip = MediaWithBytes((np.zeros((1, 1, 1, 3), np.uint8), {}), b"")
    try:
        MultiModalDataParser().parse_mm_data({"video": [clip]})
    except AssertionError:
        return False
    return True


def is_shadow_cache(processed: Any) -> bool:
    """Whether a cache of processed media holds only the names of what the engine has."""
    module = first_module(("vllm.multimodal.cache.lru", "vllm.multimodal.cache"))
    names = ("LruKeyReplicatedSenderCache", "MultiModalProcessorSenderCache")
    known = tuple(getattr(module, name) for name in names if hasattr(module, name))
    return isinstance(processed, known)


class MediaCache(NamedTuple):
    """vLLM's cache of downloads."""

    get: Callable[[str], bytes | None]
    put: Callable[[str, bytes], None]


def media_cache(connector: Any) -> MediaCache:
    """The cache of downloads of vLLM's media connector; one that keeps nothing where it has none."""
    if not hasattr(connector, "_get_cached_bytes"):
        return MediaCache(lambda _: None, lambda *_: None)
    return MediaCache(connector._get_cached_bytes, connector._put_cached_bytes)


def name_text_architecture(config: Any) -> None:
    """Say of the text part of ``config`` what it is; vLLM 0.28 asks on the CPU and fails without."""
    if not config.text_config.architectures:
        config.text_config.architectures = ["Qwen3ForCausalLM"]


def has_edge_reasoner() -> bool:
    """Whether vLLM has the model of Edge's reasoner; 0.25 has not, 0.26 has."""
    return find_spec("vllm.model_executor.models.cosmos3_edge") is not None


def missing_for_edge() -> str | None:
    """What vLLM's processor of Edge's media does not find in this transformers; None where it has all.

    That of 0.26 needs a name that transformers 5.14.1 was the last to have.
    """
    try:
        importlib.import_module("vllm.transformers_utils.processors.cosmos3_edge")
    except ImportError as error:
        return error.msg.partition(" (")[0]
    return None


def normalises_on_device(model_config: Any) -> bool:
    """Whether vLLM's vision encoder takes pixels as bytes; 0.26 cannot."""
    return bool(getattr(model_config.multimodal_config, "mm_device_do_normalize", False))


def use_fused_norms(vllm_config: Any) -> None:
    """Let RMSNorm take the platform's kernels, which vLLM's own workers choose when they start.

    From 0.24 RMSNorm is an operation with a list of implementations; before that there is nothing
    to choose.
    """
    kernels = getattr(vllm_config, "kernel_config", None)
    priority = getattr(kernels, "ir_op_priority", None)
    if priority is not None and hasattr(priority, "set_default"):
        priority.set_default()


def fused_qk_norm_rope(
    head_dim: int, dtype: torch.dtype, device: torch.device
) -> Callable[..., None] | None:
    """vLLM's kernel that norms and rotates queries and keys in place, if it takes such heads here.

    None where vLLM has none for this device, for float32, or for heads of ``head_dim``.
    """
    import torch
    import vllm._custom_ops

    if dtype == torch.float32 or device.type != "cuda":
        return None
    if not hasattr(torch.ops._C, "fused_qk_norm_rope"):
        return None
    kernel = vllm._custom_ops.fused_qk_norm_rope
    return kernel if takes_heads(kernel, head_dim, dtype, device) else None


@cache
def takes_heads(
    kernel: Callable[..., None], head_dim: int, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether the kernel norms and rotates a token with one head of ``head_dim`` each: it is asked.

    Builds have instances for some sizes of heads (64, 128 and 256 so far) and raise for others.
    """
    import torch

    qkv = torch.ones(1, 3 * head_dim, dtype=dtype, device=device)
    weight = torch.ones(head_dim, dtype=dtype, device=device)
    row = torch.zeros(1, dtype=torch.int64, device=device)
    try:
        kernel(qkv, 1, 1, 1, head_dim, 1e-6, weight, weight, weight.view(1, -1), True, row)  # noqa: FBT003
    except RuntimeError:
        return False
    return True


def __getattr__(name: str) -> Any:
    """Classes that moved, resolved on first use so that importing this module stays cheap."""
    if name == "DeltaMessage":
        return first_module(_DELTA_MESSAGE).DeltaMessage
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def weight_transfer_engine(
    backend: str, rank: int, world: int, device: torch.device, model: object
) -> Any:
    """vLLM's engine of this name that receives weights for a rank and hands them to ``model.load_weights``.

    Raises:
        Unsupported: this vLLM has none, or one of another form.
    """
    try:
        from vllm.config.weight_transfer import WeightTransferConfig
        from vllm.distributed.weight_transfer import WeightTransferEngineFactory
        from vllm.distributed.weight_transfer.base import WeightTransferEngine
    except ImportError:
        parameters: list[str] = []
    else:
        parameters = [*signature(WeightTransferEngine.__init__).parameters]
    if parameters != ["self", "config", "vllm_config", "device", "model"]:  # from 0.30
        raise Unsupported(f"this vLLM has no weight transfer by {backend} that fits; take files")
    place = SimpleNamespace(rank=rank, world_size=world, data_parallel_index=0)
    config = SimpleNamespace(parallel_config=place, model_config=None)
    engine: Any = WeightTransferEngineFactory.create_engine(
        WeightTransferConfig(backend=backend), config, device, model
    )
    return engine
