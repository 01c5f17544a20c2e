"""Starting the generator's server: checks first, then our own app or a part of the devices."""

from __future__ import annotations

import ssl
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_cosmos3.checkpoint.kinds import KINDS
from vllm_cosmos3.devices import devices, look
from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.imports import uncollected
from vllm_cosmos3.robots import droid
from vllm_cosmos3.server.options import Options
from vllm_cosmos3.server.storage import default_folder, former_default

if TYPE_CHECKING:  # the routes and all below them, which --help should not wait for
    from vllm_cosmos3.server.app import Listen
    from vllm_cosmos3.server.jobs.service import Service


def share_beside(
    folder: Path, root: Mapping[str, Any], options: Options, ranks: int
) -> float | None:
    """Check the generator that is to share devices with a reasoner of so many ranks.

    Gives the part of them that the generator leaves, None where memory is not counted or the
    generator has devices of its own. ``root`` is the root config.json.

    Raises:
        Cosmos3Error: the generator cannot run here, or not beside the reasoner.
    """
    with uncollected():
        from vllm_cosmos3.server.jobs.sampling_defaults import read_sampling_defaults
        from vllm_cosmos3.server.memory_split import share_of_reasoner, sized
        from vllm_cosmos3.stage.placement import max_replicas_per_device, visible_devices

    _check_storage(options)
    read_sampling_defaults(options.default_sampling_params)
    sizing = sized(folder, options, look().type)  # this process is to be vLLM's
    if sizing.placements is None:
        return share_of_reasoner(sizing, root, ranks)
    replicas = max_replicas_per_device(sizing.placements, visible_devices(ranks)[:ranks])
    return share_of_reasoner(sizing, root, ranks, replicas) if replicas else None


def serve_generator(
    folder: Path, names: tuple[str, ...], options: Options, device: str | None, listen: Listen
) -> int:
    """Serve the generator of a checkpoint in an app of our own until a signal. The exit status.

    ``names`` are those of the model; the ``device`` is what vLLM is built for unless it is given.
    """
    with uncollected():
        from vllm_cosmos3.server.app import make_app, serve
        from vllm_cosmos3.server.guardrails import Guardrails
        from vllm_cosmos3.server.jobs.sampling_defaults import read_sampling_defaults
        from vllm_cosmos3.server.jobs.service import Service
        from vllm_cosmos3.server.memory_split import sized

    built_for = devices().type
    device = device or built_for
    if device.split(":")[0] != built_for:
        possible = f"{built_for}, for the vLLM installed here"
        raise InvalidRequest("device", device, possible)
    _check_certificate(listen)
    _check_storage(options)
    read_sampling_defaults(options.default_sampling_params)
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
    lines = {
        "models": ", ".join(service.names),
        "checkpoint": service.model.kind,
        "surface": surface,
        "mesh": ", ".join(f"{name} {size}" for name, size in parallel.degrees.items()),
        "replicas": _replicas(service),
        "memory": str(service.sizing),
        "queue": f"{options.max_queue} requests",
        "storage": str(options.storage),
        "guardrails": ": ".join(
            filter(None, (service.guardrails.state, service.guardrails.reason))
        ),
        "url": f"{url} (the generator loads now; /health/ready is 200 when it can work)",
    }
    if KINDS[service.model.kind].robot == droid.NAME:
        socket = url.replace("http", "ws", 1).removesuffix("/v1")
        lines["robots"] = f"{socket}/ or {socket}{robots.PATH}"
    former = former_default()
    if former is not None and options.storage == default_folder():
        lines["results of earlier versions"] = f"in {former}; --storage-path {former} serves them"
    for name, value in lines.items():
        sys.stdout.write(f"vllm-cosmos3 serve: {name}: {value}\n")
    sys.stdout.flush()
    chat = "chat, " if surface.startswith("both") else ""
    shown = url.removesuffix("/v1").replace("//0.0.0.0:", "//127.0.0.1:")
    service.when_ready = lambda: _ready(f"{shown} ({chat}images, videos)")


def _replicas(service: Service) -> str:
    """How many replicas, and the devices of each where they were assigned."""
    members = service.stage.members
    places = [f"{at} on {member.devices}" for at, member in enumerate(members) if member.devices]
    return f"{len(members)} ({'; '.join(places)})" if places else str(len(members))


def _ready(what: str) -> None:
    sys.stdout.write(f"vllm-cosmos3 serve: ready: {what}\n")
    sys.stdout.flush()
