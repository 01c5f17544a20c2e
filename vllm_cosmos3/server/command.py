"""``vllm-cosmos3 serve --surface generator``: flags to options, then our own app.

Flags that vLLM has too mean the same here.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_cosmos3 import droid
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.hub import resolve
from vllm_cosmos3.server.options import SHARED, Options, add_flags, from_mapping, given

if TYPE_CHECKING:  # vLLM and the models, which --help should not wait for
    from vllm_cosmos3.server.app import Listen
    from vllm_cosmos3.server.service import Service

WORKING_MEMORY = 12 * 2**30  # of the generator beside its weights: activations and caches at 720p
MOST_MEMORY = 0.92  # of a device that both together take, as vLLM alone does
LEAST_SHARE = 0.1


def parser() -> argparse.ArgumentParser:
    """The flags of a server without a reasoner, in groups."""
    out = argparse.ArgumentParser(
        prog="vllm-cosmos3 serve CKPT --surface generator", allow_abbrev=False
    )
    web = out.add_argument_group("web")
    web.add_argument("--served-model-name", nargs="+", default=[], metavar="NAME", help="names that requests may use (default: CKPT)")  # fmt: skip
    web.add_argument("--api-key", nargs="+", default=None, metavar="KEY", help="bearer tokens that /v1 asks for (default: VLLM_API_KEY)")  # fmt: skip
    web.add_argument("--allowed-origins", nargs="+", default=[], metavar="URL", help="origins that browsers may call from")  # fmt: skip
    web.add_argument("--ssl-keyfile", metavar="FILE", help="private key of the certificate")
    web.add_argument("--ssl-certfile", metavar="FILE", help="certificate, for https")
    web.add_argument("--root-path", default="", metavar="PATH", help="path that a proxy strips")
    out.add_argument("--revision", help="branch, tag or commit of the repository")
    out.add_argument("--device", help="cuda or cpu (default: what vLLM is built for)")
    add_flags(out)
    # vLLM's names for what only one surface has here.
    for ours, theirs in (
        ("generator_tensor_parallel_size", "--tensor-parallel-size"),
        ("generator_dtype", "--dtype"),
        ("generator_load_format", "--load-format"),
    ):
        out.add_argument(
            theirs,
            dest=ours,
            type=int if "size" in ours else str,
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )
    return out


def take_options(
    given_already: object, checkpoint: str, rest: list[str]
) -> tuple[dict[str, Any], list[str]]:
    """Our options and vLLM's flags among ``rest``, where both surfaces are served.

    The reasoner gets what memory the generator leaves on the device that they share, unless the
    user has divided it.

    Raises:
        InvalidRequest: an option has a wrong value, or the generator does not fit.
    """
    known = argparse.ArgumentParser(prog="vllm-cosmos3 serve CKPT", allow_abbrev=False)
    add_flags(known, without=SHARED)
    args, others = known.parse_known_args(rest)
    values = {**(given_already if isinstance(given_already, dict) else {}), **given(args)}
    options = from_mapping(values)
    words = {word.split("=")[0].replace("_", "-") for word in others}
    if "--gpu-memory-utilization" not in words and not options.generator_devices:
        share = _share_of_reasoner(resolve(checkpoint, weights=False), options)
        if share is not None:
            others += ["--gpu-memory-utilization", f"{share:.2f}"]
    return values, others


def _share_of_reasoner(folder: Path, options: Options) -> float | None:
    """The part of a device's memory that the generator leaves; None where there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    parts = ("transformer", "vae", "sound_tokenizer")
    weights = sum(f.stat().st_size for part in parts for f in (folder / part).glob("*.safetensors"))
    total = int(torch.cuda.get_device_properties(0).total_memory)
    needed = weights / options.generator_tensor_parallel_size + WORKING_MEMORY
    share: float = MOST_MEMORY - needed / total
    if share < LEAST_SHARE:
        raise InvalidRequest(
            "--generator-devices",
            None,
            f"given: the generator needs {needed / 2**30:.0f} of {total / 2**30:.0f} GiB, and the "
            "reasoner does not fit beside it; or use --surface generator",
        )
    return share


def run(checkpoint: str, host: str | None, port: int, rest: list[str]) -> int:
    """Serve the generator of a checkpoint until a signal. The exit status."""
    args = parser().parse_args(rest)
    options = Options(**given(args))
    folder = resolve(checkpoint, args.revision)
    keys = args.api_key or [os.environ.get("VLLM_API_KEY", "")]

    from vllm.platforms import current_platform

    from vllm_cosmos3.server.app import Listen, make_app, serve
    from vllm_cosmos3.server.guardrails import Guardrails
    from vllm_cosmos3.server.service import Service, checked_model

    checked_model(folder, options)
    device = args.device or current_platform.device_type
    if device.split(":")[0] != current_platform.device_type:
        possible = f"{current_platform.device_type}, for the vLLM installed here"
        raise InvalidRequest("--device", device, possible)
    listen = Listen(
        host=host or "0.0.0.0",
        port=port,
        api_keys=tuple(key for key in keys if key),
        origins=tuple(args.allowed_origins),
        ssl_keyfile=args.ssl_keyfile,
        ssl_certfile=args.ssl_certfile,
        root_path=args.root_path,
    )
    names = tuple(args.served_model_name) or (checkpoint,)

    guardrails = Guardrails(options)

    def make_service() -> Service:
        made = Service(folder, names, options, device, guardrails)
        _announce(made, listen)
        return made

    return serve(make_app(make_service, listen), listen)


def _announce(service: Service, listen: Listen) -> None:
    """Say what is served, where and how."""
    from vllm_cosmos3.server import openpi

    options = service.options
    scheme = "https" if listen.ssl_certfile else "http"
    mesh = {
        "tensor parallel": options.generator_tensor_parallel_size,
        "cfg parallel": options.cfg_parallel_size,
        "ulysses": options.ulysses_degree,
    }
    lines = {
        "models": ", ".join(service.names),
        "checkpoint": service.model.kind,
        "surface": "generator: /v1/images/generations, /v1/videos; /docs has all",
        "mesh": ", ".join(f"{name} {size}" for name, size in mesh.items()),
        "queue": f"{options.max_queue} requests",
        "storage": str(options.storage),
        "guardrails": f"{service.guardrails.state} {service.guardrails.reason}".strip(),
        "url": f"{scheme}://{listen.host}:{listen.port}/v1",
    }
    if service.model.kind == droid.KIND:
        socket = f"{scheme.replace('http', 'ws')}://{listen.host}:{listen.port}"
        lines["robots"] = f"{socket}/ or {socket}{openpi.PATH}"
    for name, value in lines.items():
        sys.stdout.write(f"vllm-cosmos3 serve: {name}: {value}\n")
    sys.stdout.flush()
