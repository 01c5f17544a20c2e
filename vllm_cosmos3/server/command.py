"""``vllm-cosmos3 serve --surface generator``: flags to options, then our own app.

Flags that vLLM has too mean the same here.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import ssl
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_cosmos3.checkpoint.hub import resolve
from vllm_cosmos3.errors import InvalidRequest, did_you_mean
from vllm_cosmos3.robots import droid
from vllm_cosmos3.server.options import SHARED, Options, add_flags, given

if TYPE_CHECKING:  # vLLM and the models, which --help should not wait for
    from vllm_cosmos3.server.app import Listen
    from vllm_cosmos3.server.jobs.service import Service


LOG_LEVELS = ("critical", "error", "warning", "info", "debug", "trace")  # of uvicorn


def web_parser() -> argparse.ArgumentParser:
    """The flags that vLLM has too, for a server without a reasoner."""
    out = argparse.ArgumentParser(usage=argparse.SUPPRESS, allow_abbrev=False, add_help=False)
    web = out.add_argument_group("flags of vLLM that --surface generator takes as well")
    web.add_argument("--served-model-name", nargs="+", default=[], metavar="NAME", help="names that requests may use (default: CKPT)")  # fmt: skip
    web.add_argument("--api-key", nargs="+", default=None, metavar="KEY", help="bearer tokens that /v1 asks for (default: VLLM_API_KEY)")  # fmt: skip
    web.add_argument("--allowed-origins", nargs="+", default=[], metavar="URL", help="origins that browsers may call from")  # fmt: skip
    web.add_argument("--ssl-keyfile", metavar="FILE", help="private key of the certificate")
    web.add_argument("--ssl-certfile", metavar="FILE", help="certificate, for https")
    web.add_argument("--root-path", default="", metavar="PATH", help="path that a proxy strips")
    web.add_argument("--uvicorn-log-level", default="info", choices=LOG_LEVELS, help="of the web server (default: info)")  # fmt: skip
    web.add_argument("--disable-uvicorn-access-log", action="store_true", help="no line for each request")  # fmt: skip
    web.add_argument("--revision", help="branch, tag or commit of the repository")
    web.add_argument("--device", help="cuda or cpu (default: what vLLM is built for)")
    add_flags(web, only=SHARED)
    # vLLM's names for what only one surface has here.
    for ours, theirs in (
        ("generator_tensor_parallel_size", "--tensor-parallel-size"),
        ("generator_dtype", "--dtype"),
        ("generator_load_format", "--load-format"),
    ):
        web.add_argument(
            theirs,
            dest=ours,
            type=int if "size" in ours else str,
            default=argparse.SUPPRESS,
            metavar=theirs.rsplit("-", 1)[-1].upper(),
            help=f"the same as --{ours.replace('_', '-')}",
        )
    return out


def share_beside(
    folder: Path, root: Mapping[str, Any], options: Options, ranks: int
) -> float | None:
    """Check the generator that is to share devices with a reasoner of so many ranks.

    Gives the part of them that the generator leaves, None where memory is not counted or the
    generator has devices of its own. ``root`` is the root config.json.

    Raises:
        Cosmos3Error: the generator cannot run here, or not beside the reasoner.
    """
    from vllm.platforms import current_platform

    from vllm_cosmos3.server.memory_split import share_of_reasoner, sized

    _check_storage(options)
    sizing = sized(folder, options, current_platform.device_type)
    return None if options.generator_devices else share_of_reasoner(sizing, root, ranks)


def run(checkpoint: str, host: str | None, port: int, values: Mapping[str, Any], rest: list[str]) -> int:  # fmt: skip
    """Serve the generator of a checkpoint until a signal. The exit status.

    ``values`` are the options that were given, ``rest`` the flags that vLLM has too.
    """
    args, unknown = web_parser().parse_known_args(rest)
    if unknown:
        raise InvalidRequest(unknown[0], "given", _hint(unknown[0]))
    options = Options(**values, **given(args))
    folder = resolve(checkpoint, args.revision)
    keys = args.api_key or [os.environ.get("VLLM_API_KEY", "")]

    from vllm.platforms import current_platform

    from vllm_cosmos3.server.app import Listen, make_app, serve
    from vllm_cosmos3.server.guardrails import Guardrails
    from vllm_cosmos3.server.jobs.service import Service
    from vllm_cosmos3.server.memory_split import sized

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
        log_level=args.uvicorn_log_level,
        access_log=not args.disable_uvicorn_access_log,
    )
    _check_certificate(listen)
    _check_storage(options)
    names = tuple(args.served_model_name) or (checkpoint,)
    sizing, guardrails = sized(folder, options, device), Guardrails(options)
    scheme = "https" if listen.ssl_certfile else "http"
    url = f"{scheme}://{listen.host}:{listen.port}/v1"

    def make_service() -> Service:
        made = Service(sizing, names, options, guardrails)
        announce(made, "generator: /v1/images/generations, /v1/videos; /docs has all", url)
        return made

    return serve(make_app(make_service, listen), listen)


def _check_storage(options: Options) -> None:
    """Stop the start where jobs cannot be kept, rather than when the models are loaded."""
    from vllm_cosmos3.server.jobs.journal import Journal

    Journal(options.storage).close()


def _check_certificate(listen: Listen) -> None:
    """Stop the start where uvicorn could not read the certificate."""
    if listen.ssl_certfile is None:
        if listen.ssl_keyfile is not None:
            raise InvalidRequest("--ssl-certfile", None, "given with --ssl-keyfile", "conflict")
        return
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
            listen.ssl_certfile, listen.ssl_keyfile
        )
    except OSError as error:
        possible = f"a certificate whose key is in --ssl-keyfile ({error.strerror or error})"
        raise InvalidRequest("--ssl-certfile", listen.ssl_certfile, possible) from None


def announce(service: Service, surface: str, url: str) -> None:
    """Say what is served, where and how."""
    from vllm_cosmos3.server.routes import robots

    options, parallel = service.options, service.sizing.engine.parallel
    mesh = {
        "tensor parallel": parallel.tensor_parallel_size,
        "cfg parallel": parallel.cfg_parallel_size,
        "ulysses": parallel.ulysses_degree,
    }
    lines = {
        "models": ", ".join(service.names),
        "checkpoint": service.model.kind,
        "surface": surface,
        "mesh": ", ".join(f"{name} {size}" for name, size in mesh.items()),
        "memory": str(service.sizing),
        "queue": f"{options.max_queue} requests",
        "storage": str(options.storage),
        "guardrails": f"{service.guardrails.state} {service.guardrails.reason}".strip(),
        "url": f"{url} (the generator loads now; /health/ready is 200 when it can work)",
    }
    if service.model.kind == droid.KIND:
        socket = url.replace("http", "ws", 1).removesuffix("/v1")
        lines["robots"] = f"{socket}/ or {socket}{robots.PATH}"
    for name, value in lines.items():
        sys.stdout.write(f"vllm-cosmos3 serve: {name}: {value}\n")
    sys.stdout.flush()


def _hint(flag: str) -> str:
    """What a flag may have been meant to be."""
    known = [option for action in web_parser()._actions for option in action.option_strings]
    known += [f"--{item.name.replace('_', '-')}" for item in dataclasses.fields(Options)]
    near = did_you_mean(flag.split("=")[0], known, cutoff=0.8)
    hint = near or "vLLM's flags are for --surface both or reasoner"
    return f"left out: --surface generator has no such flag; {hint}"
