"""``vllm-cosmos3 serve --surface generator``: the flags that vLLM has too, and what they come to.

They mean the same here.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import Any

from vllm_cosmos3.checkpoint.hub import resolve
from vllm_cosmos3.cli.flags import Help, Parser, add_engine_flags, add_server_flag, given
from vllm_cosmos3.engine_options import checked_device
from vllm_cosmos3.errors import Cosmos3Error, did_you_mean
from vllm_cosmos3.imports import uncollected
from vllm_cosmos3.server.options import ENGINE, OPTIONS, SHARED, from_mapping

LOG_LEVELS = ("critical", "error", "warning", "info", "debug", "trace")  # of uvicorn
# Engine options that have a flag of vLLM.
VLLM_NAMES = (
    "revision", "device", "tensor_parallel_size", "data_parallel_size", "dtype", "load_format",
    "gpu_memory_utilization",
)  # fmt: skip


def web_parser() -> argparse.ArgumentParser:
    """The flags that vLLM has too, for a server without a reasoner."""
    out = Parser(usage=argparse.SUPPRESS, allow_abbrev=False, add_help=False)
    out.formatter_class = Help
    web = out.add_argument_group("flags of vLLM that --surface generator takes as well")
    web.add_argument("--served-model-name", nargs="+", default=[], metavar="NAME", help="names that requests may use (default: CKPT)")  # fmt: skip
    web.add_argument("--api-key", nargs="+", default=None, metavar="KEY", help="bearer tokens that /v1 asks for (default: VLLM_API_KEY)")  # fmt: skip
    web.add_argument("--allowed-origins", nargs="+", default=[], metavar="URL", help="origins that browsers may call from")  # fmt: skip
    web.add_argument("--ssl-keyfile", metavar="FILE", help="private key of the certificate")
    web.add_argument("--ssl-certfile", metavar="FILE", help="certificate, for https")
    web.add_argument("--root-path", default="", metavar="PATH", help="path that a proxy strips")
    web.add_argument("--uvicorn-log-level", default="info", choices=LOG_LEVELS, help="log level of the web server (default: info)")  # fmt: skip
    web.add_argument("--disable-uvicorn-access-log", action="store_true", help="do not log each request")  # fmt: skip
    add_engine_flags(web, VLLM_NAMES)
    for name in SHARED:
        add_server_flag(web, name, OPTIONS[name].spec, OPTIONS[name].default)
    return out


def run(checkpoint: str, host: str | None, port: int, values: Mapping[str, Any], rest: list[str]) -> int:  # fmt: skip
    """Serve the generator of a checkpoint until a signal. The exit status.

    ``values`` are the options that were given, ``rest`` the flags that vLLM has too.
    """
    args, unknown = web_parser().parse_known_args(rest)
    if unknown:
        raise Cosmos3Error(
            f"unknown flag {unknown[0].partition('=')[0]} for --surface generator; {_hint(unknown[0])}"
        )
    shared = given(args, (*VLLM_NAMES, *SHARED))
    engine = {ours: shared.pop(name) for ours, name in ENGINE.items() if name in shared}
    for ours, value in engine.items():  # the error should name the flag that was given
        OPTIONS[ours].spec.checked(f"--{ENGINE[ours].replace('_', '-')}", value)
    device, revision = shared.pop("device", None), shared.pop("revision", None)
    if device is not None:
        checked_device(device)
    options = from_mapping({**values, **engine, **shared})
    folder = resolve(checkpoint, revision)
    keys = args.api_key or [os.environ.get("VLLM_API_KEY", "")]

    with uncollected():
        from vllm_cosmos3.server.app import Listen
        from vllm_cosmos3.server.command import serve_generator

    listen = Listen(
        host=host or "0.0.0.0",
        port=port,
        api_keys=tuple(key for key in keys if key),
        origins=tuple(args.allowed_origins),
        ssl_keyfile=args.ssl_keyfile,
        ssl_certfile=args.ssl_certfile,
        root_path=args.root_path,
        log_level=args.uvicorn_log_level,
        access_log=not args.disable_uvicorn_access_log,
    )
    names = tuple(args.served_model_name) or (checkpoint,)
    return serve_generator(folder, names, options, device, listen)


def _hint(flag: str) -> str:
    """What a flag may have been meant to be."""
    known = [option for action in web_parser()._actions for option in action.option_strings]
    known += [f"--{name.replace('_', '-')}" for name in OPTIONS]
    near = did_you_mean(flag.split("=")[0], known, cutoff=0.8)
    return near or "vLLM's flags are for --surface both or reasoner"
